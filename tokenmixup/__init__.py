"""TokenMixup: attention-guided, token-level data augmentation for vision transformers.

Choi, Choi and Kim, NeurIPS 2022, https://arxiv.org/abs/2210.07562.
"""

from tokenmixup import functional
from tokenmixup.config import HorizontalConfig, VerticalConfig
from tokenmixup.horizontal import HorizontalTokenMixupLayer
from tokenmixup.model import TokenMixupModel, TokenMixupOutput, attach
from tokenmixup.vertical import VerticalTokenMixupLayer

__all__ = [
    "HorizontalConfig",
    "HorizontalTokenMixupLayer",
    "TokenMixupModel",
    "TokenMixupOutput",
    "VerticalConfig",
    "VerticalTokenMixupLayer",
    "attach",
    "functional",
]
__version__ = "0.1.0"
