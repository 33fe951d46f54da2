"""Vertical TokenMixup: remembering and attending, and the paper's wrapper around an attention.

Dimensions: B batch, N tokens, P prefix tokens, D width, H heads, K kappa, M remembered tokens.
"""

import logging
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokenmixup.config import VerticalConfig, layer_indices
from tokenmixup.functional import attention_saliency, gather_tokens, salient_positions

logger = logging.getLogger(__name__)


def remembered_before(memory: Mapping[int, Tensor], layer: int) -> Tensor | None:
    """All tokens that layers before ``layer`` remembered, (B, M, D), lowest layer first."""
    earlier = [memory[index] for index in sorted(memory) if index < layer]
    return torch.cat(earlier, dim=1) if earlier else None


def remember(
    tokens: Tensor, positions: Tensor, config: VerticalConfig, num_prefix_tokens: int
) -> Tensor:
    """What a layer remembers of its input (B, N, D): the tokens (B, K, D) at positions (B, K)."""
    if config.stop_gradient:
        tokens = tokens.detach()
    return gather_tokens(tokens, positions, num_prefix_tokens)


class VerticalMemory:
    """Tokens that the wrappers of one model remember during a forward pass, per thread.

    Copying or pickling a model copies the bond between its wrappers, not the tokens.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, dict[int, Tensor]] = {}

    def tokens(self) -> dict[int, Tensor]:
        """Remembered tokens of this thread's pass, layer index -> (B, K, D)."""
        return self._tokens.setdefault(threading.get_ident(), {})

    def clear(self) -> None:
        """Forget what this thread's pass remembered."""
        self._tokens.pop(threading.get_ident(), None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokens": {}}


class _Construction(threading.local):
    """The memory of the model whose wrappers this thread is building, and its last index.

    The published interface gives wrappers nothing to tell which model they belong to but the
    order in which they are built.
    """

    memory: VerticalMemory | None = None
    last_index: int = -1


_construction = _Construction()


def _memory_for(layer_index: int) -> VerticalMemory:
    if _construction.memory is None or layer_index <= _construction.last_index:
        _construction.memory = VerticalMemory()
    _construction.last_index = layer_index
    return _construction.memory


class VerticalTokenMixupLayer(nn.Module):
    """The paper's wrapper: lets a self-attention attend to tokens of earlier layers in training.

    Wrap the attention of *every* encoder layer up to the last of ``apply_layers``. The wrapped
    ``attention`` is called ``attention(x, *args, **kwargs)`` on tokens that are already
    normalised, and returns ``(output, attention map)``. Layers before the last of
    ``apply_layers`` remember their K most salient tokens; a layer in ``apply_layers`` runs its
    attention on its own tokens followed by the remembered ones and keeps the rows of its own, so
    that its queries are its own tokens and its keys and values are all of them. In evaluation the
    attention alone runs.

    Wrappers of one model share a memory. It is found by the order of construction: a wrapper
    belongs to the model of the one built before it in the same thread as long as ``layer_index``
    rises. Where layers are built in another order, pass the same ``memory`` to each.

    Args:
        attention: the self-attention.
        layer_index: 0-based index of its encoder layer.
        apply_layers: indices of the layers that attend to remembered tokens; not layer 0.
        kappa: tokens that each layer remembers.
        vtm_attn_dim: D, checked against the tokens.
        vtm_attn_numheads: H, checked against the attention map.
        vtm_stopgrad: keep gradients out of the remembered tokens.
        has_cls: whether token 0 is a class token, whose row of the map is then the saliency.
        report_every: training steps from one report to the next.
        verbose: report the number of remembered tokens through ``logging`` (INFO).
        memory: the model's memory, by default found as above.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        attention: nn.Module,
        layer_index: int,
        apply_layers: list[int] | tuple[int, ...],
        kappa: int,
        vtm_attn_dim: int,
        vtm_attn_numheads: int,
        vtm_stopgrad: bool = False,
        has_cls: bool = True,
        report_every: int = 50,
        verbose: bool = True,
        *,
        memory: VerticalMemory | None = None,
    ) -> None:
        super().__init__()
        self.config = VerticalConfig(
            layers=layer_indices("apply_layers", apply_layers, lowest=1),
            kappa=kappa,
            stop_gradient=vtm_stopgrad,
        )
        (layer_index,) = layer_indices("layer_index", (layer_index,), lowest=0)
        if vtm_attn_dim < 1 or vtm_attn_numheads < 1 or vtm_attn_dim % vtm_attn_numheads:
            raise ValueError(
                "vtm_attn_dim must be a multiple of vtm_attn_numheads, both >= 1, "
                f"got {vtm_attn_dim} and {vtm_attn_numheads}"
            )
        if report_every < 1:
            raise ValueError(f"report_every must be >= 1 training steps, got {report_every}")
        self.attention = attention
        self.layer_index = layer_index
        self.width = vtm_attn_dim
        self.heads = vtm_attn_numheads
        self.num_prefix_tokens = int(has_cls)
        self.report_every = report_every
        self.verbose = verbose
        self.steps = 0
        self._memory = memory if memory is not None else _memory_for(layer_index)

    def reset(self) -> None:
        """Forget the remembered tokens of this model; one call on any of its layers will do."""
        self._memory.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attention output (B, N, D) and map (B, H, N, N) of normalised tokens x (B, N, D)."""
        if not self.training or self.layer_index > self.config.layers[-1]:
            return self.attention(x, *args, **kwargs)
        if x.shape[-1] != self.width:
            raise ValueError(
                f"vtm_attn_dim is {self.width}, but layer {self.layer_index} got tokens of shape "
                f"{tuple(x.shape)}"
            )
        if self.layer_index == 0:
            self._memory.clear()  # what a pass that broke off may have left
        remembered = self._remembered()
        num_tokens = x.shape[1]
        keys = x if remembered is None else torch.cat((x, remembered), dim=1)
        result = self.attention(keys, *args, **kwargs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(
                f"the attention of layer {self.layer_index} must return (output, attention map), "
                f"got {type(result).__name__}"
            )
        output, attention = result
        if attention.dim() != 4 or attention.shape[1] != self.heads:
            raise ValueError(
                f"vtm_attn_numheads is {self.heads}, but the attention of layer "
                f"{self.layer_index} returned a map of shape {tuple(attention.shape)}"
            )
        if remembered is not None:
            output = output[:, :num_tokens]
            own = attention[:, :, :num_tokens, :num_tokens]
            # The softmax over its own tokens alone; rows that gave them nothing stay zero.
            total = own.sum(-1, keepdim=True)
            attention = own / total.clamp_min(torch.finfo(total.dtype).tiny)
        if self.layer_index < self.config.layers[-1]:
            saliency = attention_saliency(attention, self.num_prefix_tokens)
            positions = salient_positions(saliency, self.config.kappa)
            self._memory.tokens()[self.layer_index] = remember(
                x, positions, self.config, self.num_prefix_tokens
            )
        return output, attention

    def _remembered(self) -> Tensor | None:
        if self.layer_index not in self.config.layers:
            return None
        memory = self._memory.tokens()
        missing = [index for index in range(self.layer_index) if index not in memory]
        if missing:
            raise RuntimeError(
                f"VTM layer {self.layer_index} found no tokens of layer(s) "
                f"{', '.join(map(str, missing))}: wrap the attention of every earlier layer, build "
                "the wrappers in the order of the layers (or give them one `memory`), and call "
                "reset() only after the last layer"
            )
        remembered = remembered_before(memory, self.layer_index)
        self._report(0 if remembered is None else remembered.shape[1])
        return remembered

    def _report(self, remembered: int) -> None:
        if not torch.is_grad_enabled():  # HTM asks for the map: no training step of its own
            return
        self.steps += 1
        if self.verbose and self.steps % self.report_every == 1 % self.report_every:
            logger.info(
                "VTM layer %d step %d [kappa %d]: attends to %d remembered tokens",
                self.layer_index,
                self.steps,
                self.config.kappa,
                remembered,
            )
