"""timm's Swin Transformers, which attend within windows that every other layer shifts.

Dimensions: B' windows of all samples, W windows of one, n positions in a window, D width, H heads,
d head width.
"""

from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import Args, Kwargs, module_query_key
from tokenmixup.hosts.timm_stages import TimmStages
from tokenmixup.hosts.windows import WindowedHost, Windows, shape_of


class TimmSwin(WindowedHost, TimmStages):
    """timm's Swin, with images of a fixed or of any size, and windows of any size."""

    family = "timm SwinTransformer"
    host_classes = ("timm.models.swin_transformer.SwinTransformer",)
    stages = "layers"
    block_classes = ("timm.models.swin_transformer.SwinTransformerBlock",)
    block_read = (
        *("norm1", "attn", "dim", "window_size", "shift_size", "input_resolution"),
        *("dynamic_mask", "attn_mask", "get_attn_mask"),
    )
    attention_classes = ("timm.models.swin_transformer.WindowAttention",)
    read = ("qkv", "num_heads", "scale", "_get_rel_pos_bias")
    arguments = ("x", "mask")

    def grid(self, host: nn.Module, block: nn.Module) -> tuple[int, int] | None:
        """None where the host takes images of any size."""
        if cast(Any, host).dynamic_img_size:
            return None
        rows, columns = cast(Any, block).input_resolution
        return rows, columns

    def windows(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Windows:
        """Rolled, then padded."""
        block = cast(Any, layer)
        return Windows(shape_of(args), tuple(block.window_size), tuple(block.shift_size))

    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`."""
        attention = cast(Any, layer).attn
        query, key = module_query_key(windows, attention.qkv, attention.num_heads, False)
        return query, key, attention.scale

    def window_bias(self, layer: nn.Module, windows: Windows) -> Tensor:
        """The relative-position bias, and the host's mask where the windows are shifted."""
        block = cast(Any, layer)
        bias = self.relative_bias(block.attn).unsqueeze(0)  # (1, 1, H, n, n)
        mask = block.attn_mask
        if block.dynamic_mask:
            mask = block.get_attn_mask(bias.new_empty((1, *windows.padded, 1)))
        return bias if mask is None else bias + mask.unsqueeze(1)

    def relative_bias(self, attention: Any) -> Tensor:
        """(1, H, n, n)."""
        return attention._get_rel_pos_bias()
