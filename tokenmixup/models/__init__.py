"""Models of the paper. Importing this registers every CCT with timm."""

from tokenmixup.models.cct import CCT, CCT_NAMES

__all__ = ["CCT", "CCT_NAMES"]
