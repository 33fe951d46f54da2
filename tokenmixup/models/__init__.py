"""The paper's models. Importing this module registers every CCT with timm."""

from tokenmixup.models.cct import CCT, CCT_NAMES

__all__ = ["CCT", "CCT_NAMES"]
