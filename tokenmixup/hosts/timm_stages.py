"""What timm's hosts with stages share.

Dimensions: D width, C classes, R x C grid of the patch tokens.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

from torch import nn

from tokenmixup.hosts.base import Args, Kwargs, TokenLayout, argument, linear_outputs
from tokenmixup.hosts.timm_vit import TimmNames

Size = tuple[int, int]
"""Rows and columns of a grid."""
Grid = Size | None
"""None where they depend on the image."""


class TimmStages(TimmNames):
    """Base of the adapters for timm's hosts with stages, whose layers are counted through them."""

    stages: ClassVar[str]
    """The name of the list of stages, each with its `blocks`."""

    @abstractmethod
    def inputs(self, host: nn.Module) -> Iterable[tuple[int, Grid, int]]:
        """Width, grid and stage of the tokens that enter each layer."""

    def blocks(self, host: nn.Module) -> dict[str, nn.Module]:
        """Those of the first stage, then those of the second, and so on."""
        return {
            f"{self.stages}[{s}].blocks[{b}]": block
            for s, stage in enumerate(getattr(host, self.stages))
            for b, block in enumerate(stage.blocks)
        }

    def by_stage(self, host: nn.Module) -> list[tuple[int, Any]]:
        """Each layer behind the number of the stage that it belongs to."""
        stages = enumerate(getattr(host, self.stages))
        return [(number, block) for number, stage in stages for block in stage.blocks]

    def prefix_tokens(self, host: nn.Module) -> int:
        """P, 1 for a class token; most have none."""
        return 0

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """By :meth:`inputs`."""
        classes, prefix = linear_outputs(cast(Any, host).get_classifier()), self.prefix_tokens(host)
        return [
            TokenLayout(
                width=width,
                num_prefix_tokens=prefix,
                class_token=prefix > 0,
                num_patch_tokens=None if grid is None else grid[0] * grid[1],
                num_classes=classes,
                stage=stage,
                grid=grid,
            )
            for width, grid, stage in self.inputs(host)
        ]

    def layout(self, host: nn.Module) -> TokenLayout:
        """Of the first layer."""
        return self.layouts(host)[0]


def feat_size(args: Args, kwargs: Kwargs) -> Size:
    """The grid of a layer's tokens, where the layer is called with it."""
    rows, columns = argument(1, "feat_size", args, kwargs)
    return rows, columns
