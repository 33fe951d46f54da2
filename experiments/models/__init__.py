"""Models of the experiments. Importing this registers every CCT with timm."""

from tokenmixup.models import CCT, CCT_NAMES

__all__ = ["CCT", "CCT_NAMES"]
