"""TokenMixup: attention-guided, token-level data augmentation for vision transformers.

Choi, Choi and Kim, NeurIPS 2022, https://arxiv.org/abs/2210.07562.
"""

from typing import TYPE_CHECKING, Any

from tokenmixup.config import HorizontalConfig, VerticalConfig

if TYPE_CHECKING:
    from tokenmixup import functional
    from tokenmixup._attach import attach
    from tokenmixup._watch import TokenMixupWarning
    from tokenmixup.horizontal import HorizontalTokenMixupLayer
    from tokenmixup.model import TokenMixupModel, TokenMixupOutput
    from tokenmixup.vertical import VerticalTokenMixupLayer

__all__ = [
    "HorizontalConfig",
    "HorizontalTokenMixupLayer",
    "TokenMixupModel",
    "TokenMixupOutput",
    "TokenMixupWarning",
    "VerticalConfig",
    "VerticalTokenMixupLayer",
    "attach",
    "functional",
]
__version__ = "0.1.0"


_SUBMODULES = ("functional", "horizontal", "hosts", "model", "rules", "scorenet", "vertical")


def __getattr__(name: str) -> Any:
    """Import what needs torch at its first use: settings alone load in milliseconds."""
    if name not in __all__ and name not in _SUBMODULES:
        raise AttributeError(f"module 'tokenmixup' has no attribute {name!r}")
    import tokenmixup.functional  # first, as the others ask for it while they are imported

    if name != "functional":
        import tokenmixup._attach
        import tokenmixup.vertical

        globals().update(
            HorizontalTokenMixupLayer=tokenmixup.horizontal.HorizontalTokenMixupLayer,
            TokenMixupModel=tokenmixup.model.TokenMixupModel,
            TokenMixupOutput=tokenmixup.model.TokenMixupOutput,
            TokenMixupWarning=tokenmixup._watch.TokenMixupWarning,
            VerticalTokenMixupLayer=tokenmixup.vertical.VerticalTokenMixupLayer,
            attach=tokenmixup._attach.attach,
        )
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
