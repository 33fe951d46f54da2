"""Vertical TokenMixup: remembering and attending, and the paper's wrapper around an attention.

Dimensions: B batch, N tokens, P prefix tokens, D width, H heads, K kappa, M remembered tokens.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenmixup._memory import VerticalMemory, memory_for
from tokenmixup._session import in_backward
from tokenmixup.config import VerticalConfig, layer_indices
from tokenmixup.functional import attention_saliency, gather_tokens, salient_positions
from tokenmixup.hosts.base import TokenLayout

logger = logging.getLogger(__name__)


def remembering(layouts: Sequence[TokenLayout], config: VerticalConfig | None, layer: int) -> bool:
    """Whether a layer remembers tokens: those that a later VTM layer of its stage attends to.

    Tokens of another stage have another width, which that layer cannot project.
    """
    attending = () if config is None else config.layers
    return any(layer < one and layouts[one].stage == layouts[layer].stage for one in attending)


def remember(
    tokens: Tensor, positions: Tensor, config: VerticalConfig, num_prefix_tokens: int
) -> Tensor:
    """What a layer remembers of its input (B, N, D): the tokens (B, K, D) at positions (B, K)."""
    if config.stop_gradient:
        tokens = tokens.detach()
    return gather_tokens(tokens, positions, num_prefix_tokens)


class VerticalTokenMixupLayer(nn.Module):
    """The paper's wrapper: lets a self-attention attend to tokens of earlier layers in training.

    Wrap the attention of *every* encoder layer up to the last of ``apply_layers``. The wrapped
    ``attention`` is called ``attention(x, *args, **kwargs)`` on normalised tokens, and returns
    ``(output, attention map)``. Layers before the last of
    ``apply_layers`` remember their ``kappa`` most salient tokens; a layer in ``apply_layers`` runs
    its attention on its own tokens followed by the remembered ones and keeps the rows of its own,
    so that its queries are its own tokens and its keys and values are all of them. In evaluation
    the attention alone runs.

    Wrappers of one model share a memory, found by the order of construction: as long as
    ``layer_index`` rises, a wrapper belongs to the model of the previous one built in the same
    thread. If layers are built in another order, pass the same ``memory`` to each.

    Activation checkpointing of the wrapped layers is an error; use `tokenmixup.attach` instead.

    Args:
        attention: the self-attention.
        layer_index: 0-based index of its encoder layer.
        apply_layers: indices of the layers that attend to remembered tokens; not layer 0.
        kappa: tokens that each layer remembers.
        vtm_attn_dim: D, checked against the tokens.
        vtm_attn_numheads: H, checked against the attention map.
        vtm_stopgrad: keep gradients out of the remembered tokens.
        has_cls: whether token 0 is a class token, whose row of the map is then the saliency.
        report_every: training steps between reports; compiled steps are neither counted nor
            reported.
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
        self._memory = memory if memory is not None else memory_for(layer_index)

    def reset(self) -> None:
        """Forget the remembered tokens of this model; a call on one of its layers is enough."""
        self._memory.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Attention output (B, N, D) and map (B, H, N, N) of normalised tokens x (B, N, D).

        Raises:
            ValueError: the tokens, or what the attention returns, have another shape.
            RuntimeError: an earlier layer remembered nothing, or activation checkpointing runs
                this layer again.
        """
        if not self.training or self.layer_index > self.config.layers[-1]:
            return self.attention(x, *args, **kwargs)
        self._refuse_recomputation()
        if x.dim() != 3 or x.shape[-1] != self.width:
            raise ValueError(
                f"tokens must be (B, N, D) with D = vtm_attn_dim = {self.width}, but layer "
                f"{self.layer_index} got shape {tuple(x.shape)}"
            )
        if self.layer_index == 0:
            self._memory.clear()  # what a pass that broke off may have left
        remembered = self._remembered()
        keys = x if remembered is None else torch.cat((x, remembered), dim=1)
        output, attention = self._checked(self.attention(keys, *args, **kwargs), keys)
        if remembered is not None:
            num_tokens = x.shape[1]
            output = output[:, :num_tokens]
            own = attention[:, :, :num_tokens, :num_tokens]
            # the softmax over its own tokens alone; rows that gave them nothing stay zero
            total = own.sum(-1, keepdim=True)
            attention = own / total.clamp_min(torch.finfo(total.dtype).tiny)
        if self.layer_index < self.config.layers[-1]:
            saliency = attention_saliency(attention, self.num_prefix_tokens)
            positions = salient_positions(saliency, self.config.kappa)
            tokens = remember(x, positions, self.config, self.num_prefix_tokens)
            self._memory.tokens()[self.layer_index] = tokens
        elif torch.is_grad_enabled():  # HTM asks for the map first, without gradients
            self._memory.clear()
        return output, attention

    def _refuse_recomputation(self) -> None:
        if in_backward():
            raise RuntimeError(
                f"VTM layer {self.layer_index} was called inside a backward pass: activation "
                "checkpointing runs it again, and the tokens that it attended to are gone. "
                "tokenmixup.attach works with checkpointing (use_reentrant=False); "
                "VerticalTokenMixupLayer does not: leave the layers that it wraps out of it"
            )

    def _checked(self, result: Any, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What the attention returned for its input (B, M, D), own and remembered tokens."""
        name = f"the attention of layer {self.layer_index}"
        output, attention = result if isinstance(result, tuple) else (result, None)
        if not isinstance(attention, Tensor):
            raise ValueError(
                f"{name} must return (output, attention map), but the map is missing; if it "
                "computes one on demand only, have it do so"
            )
        batch, count, _ = keys.shape
        shape, expected = tuple(attention.shape), (batch, self.heads, count, count)
        if shape != expected:
            raise ValueError(
                f"{name} must return a map (B, H, N, N) = {expected} of H = vtm_attn_numheads = "
                f"{self.heads} heads over the {count} tokens that it is given, got shape {shape}"
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
                "reset() only after the last layer. A layer that is in evaluation mode, or left "
                "out in a pass, remembers nothing"
            )
        remembered = torch.cat([memory[index] for index in range(self.layer_index)], dim=1)
        self._report(remembered.shape[1])
        return remembered

    def _report(self, remembered: int) -> None:
        if torch.compiler.is_compiling():  # a count would be a constant of the compiled code
            return
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
