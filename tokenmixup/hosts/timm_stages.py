"""What timm's hosts with stages share.

Dimensions: R x C grid of the patch tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import nn

from tokenmixup.hosts.base import TokenLayout, linear_outputs
from tokenmixup.hosts.timm_vit import TimmNames


class TimmStages(TimmNames):
    """Base of the adapters for timm's hosts with stages, whose layers are counted through them."""

    stages: ClassVar[str]
    """The name of the list of stages, each with its `blocks`."""

    @abstractmethod
    def grid(self, host: nn.Module, block: nn.Module) -> tuple[int, int] | None:
        """(R, C) at the input of a block, None where it depends on the image."""

    def blocks(self, host: nn.Module) -> dict[str, nn.Module]:
        """Those of the first stage, then those of the second, and so on."""
        return {
            f"{self.stages}[{s}].blocks[{b}]": block
            for s, stage in enumerate(getattr(host, self.stages))
            for b, block in enumerate(stage.blocks)
        }

    def stage(self, host: nn.Module, index: int) -> int:
        """The number of the stage in which layer ``index`` has its input."""
        sizes = [len(stage.blocks) for stage in getattr(host, self.stages)]
        return next(s for s in range(len(sizes)) if index < sum(sizes[: s + 1]))

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """Patch tokens alone, by stage."""
        classes = linear_outputs(cast(Any, host).get_classifier())
        layouts = []
        for index, block in enumerate(self.layers(host)):
            grid = self.grid(host, block)
            layouts.append(
                TokenLayout(
                    width=self.width(block),
                    num_prefix_tokens=0,
                    class_token=False,
                    num_patch_tokens=None if grid is None else grid[0] * grid[1],
                    num_classes=classes,
                    stage=self.stage(host, index),
                    grid=grid,
                )
            )
        return layouts

    def width(self, block: nn.Module) -> int:
        """D at the input of a block."""
        return cast(Any, block).dim

    def layout(self, host: nn.Module) -> TokenLayout:
        """Of the first layer."""
        return self.layouts(host)[0]
