"""Models of the experiments. Importing this registers every CCT with timm and with TokenMixup."""

from experiments.models.cct import CCT, CCT_NAMES
from experiments.models.cct_host import CCTAdapter
from tokenmixup.hosts import register_adapter

__all__ = ["CCT", "CCT_NAMES", "CCTAdapter"]

register_adapter(CCTAdapter())
