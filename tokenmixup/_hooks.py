"""The hooks that carry out TokenMixup inside a host's own forward pass.

They act only in a training pass of their `TokenMixupModel`, also when activation checkpointing runs
it again; otherwise they change nothing.

Dimensions: B batch, N tokens, T patch tokens, D width, C classes, M remembered tokens.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenmixup._session import Session, StepRecord
from tokenmixup._watch import Watch
from tokenmixup.config import HorizontalConfig, VerticalConfig
from tokenmixup.horizontal import horizontal_step, scorenet_loss
from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    class_name,
    forward_hooks,
    input_saliency,
    layer_saliency,
    parallel_class,
    what_to_do_about,
)
from tokenmixup.rules import Rules
from tokenmixup.scorenet import ScoreNet
from tokenmixup.vertical import remembering


@dataclass(frozen=True)
class Attachment:
    """What all hooks of one model share."""

    adapter: HostAdapter
    layouts: tuple[TokenLayout, ...]
    """Of each layer."""
    session: Session
    rules: Rules
    horizontal: HorizontalConfig | None
    vertical: VerticalConfig | None
    watch: Watch | None
    """Of HTM."""

    def mixing(self, index: int) -> bool:
        """Whether HTM acts at this layer."""
        return self.horizontal is not None and index in self.horizontal.layers

    def attending(self, index: int) -> bool:
        """Whether this is a VTM layer."""
        return self.vertical is not None and index in self.vertical.layers

    def remembering(self, index: int) -> bool:
        """Whether a later VTM layer attends to what this layer remembers."""
        return remembering(self.layouts, self.vertical, index)


class _Hook:
    """Base of all hooks, by which :func:`has_hooks` knows them.

    Hooks are objects rather than closures so that copies and pickles of a model get hooks of
    their own, bound to the copy.
    """

    def __init__(self, shared: Attachment, index: int, layer: nn.Module) -> None:
        self.shared = shared
        self.index = index
        self.layer = layer
        self.layout = shared.layouts[index]

    def _remember(self, record: StepRecord, again: bool, tokens: Tensor) -> None:
        """Keep the tokens at the chosen positions."""
        config = self.shared.vertical
        assert config is not None
        remembered = self.shared.rules.remember(
            tokens, record.positions[self.index], config, self.layout.num_prefix_tokens
        )
        if not again:
            record.memory[self.index] = remembered

    def _choose(self, record: StepRecord, saliency: Tensor) -> None:
        """Choose the positions to remember."""
        config = self.shared.vertical
        assert config is not None
        _refuse_second_run(self.index, record.positions)
        record.positions[self.index] = self.shared.rules.choose(self.index, saliency, config.kappa)

    def _remembered(self, record: StepRecord) -> Remembered:
        """What this VTM layer attends to: what earlier layers of its stage remember."""
        near = [
            layer
            for layer in range(self.index)
            if layer in record.memory and self.shared.layouts[layer].stage == self.layout.stage
        ]
        tokens = torch.cat([record.memory[layer] for layer in near], dim=1)
        return Remembered(tokens, tuple(record.positions[layer] for layer in near))


class _LayerHook(_Hook):
    """At a layer's input: mix (HTM), then remember (VTM) or leave that to its projection's hook."""

    def __init__(
        self,
        shared: Attachment,
        index: int,
        layer: nn.Module,
        scorenets: nn.ModuleDict,
    ) -> None:
        super().__init__(shared, index, layer)
        self.mixes = shared.mixing(index)
        self.remembers = shared.remembering(index)
        self.scorenets = scorenets  # not the ScoreNet itself, which peft replaces by a copy
        self.attention = shared.adapter.attention(layer)
        self.projection = shared.adapter.projection(layer) if self.remembers else None

    def __call__(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        record, again = self.shared.session.current()
        if record is None:
            return None
        _refuse_without_gradients(record, self.index)
        adapter = self.shared.adapter
        tokens = adapter.tokens(args, kwargs)
        self._check(record, tokens)
        if self.mixes:
            tokens = self._mix(record, again, tokens, args, kwargs)
        # what has taken the projection's place does not have its hook
        if self.projection is not None and adapter.projection(layer) is self.projection:
            record.entering[self.index] = (tokens, args, kwargs)
        elif self.remembers:
            if not again:
                self._choose(record, self._input_saliency(record, tokens, args, kwargs))
            self._remember(record, again, tokens)
        return adapter.with_tokens(tokens, args, kwargs) if self.mixes else None

    def _check(self, record: StepRecord, tokens: Tensor) -> None:
        attention = self.shared.adapter.attention(self.layer)
        # fully_shard changes the class in place
        sharded = None if torch.compiler.is_compiling() else parallel_class(attention)
        if attention is not self.attention or sharded:
            found = sharded or class_name(type(attention))
            raise UnsupportedHostError(
                f"the attention of layer {self.index} was replaced by a {found} after TokenMixup "
                f"was attached: {what_to_do_about(found)}"
            )
        layout, patches = self.layout, self.layout.num_patch_tokens
        if tokens.dim() != 3 or tokens.shape[-1] != layout.width:
            raise ValueError(
                f"layer {self.index} was called with tokens of shape {tuple(tokens.shape)}, but "
                f"{self.shared.adapter.family} promises (B, N, {layout.width})"
            )
        num_tokens = record.num_tokens.setdefault(
            layout.stage,
            tokens.shape[1] if patches is None else layout.num_prefix_tokens + patches,
        )
        if tokens.shape[1] != num_tokens:
            raise ValueError(
                f"layer {self.index} was called with {tokens.shape[1]} tokens instead of "
                f"{num_tokens}: a host that drops, merges or adds tokens has no "
                "lasting token grid: tokens would be exchanged between different places. If its "
                "input size was changed after TokenMixup was attached: detach(), then attach again"
            )

    def _mix(
        self, record: StepRecord, again: bool, tokens: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        watch = self.shared.watch
        assert watch is not None, "only layers that mix are called here"
        config = watch.config
        targets = record.decisions[self.index][0] if again else record.targets
        assert targets is not None, "TokenMixupModel asks for targets where HTM is attached"
        if len(tokens) != len(targets):
            raise ValueError(
                f"layer {self.index} was called with tokens of {len(tokens)} samples, but there "
                f"are targets of {len(targets)}: put views of an image into the batch before the "
                "model, each with targets of its own"
            )
        difficulty, scorenet = None, None
        if str(self.index) in self.scorenets:
            # Also when run again: checkpointing expects the same tensors to be saved.
            scorenet = cast(ScoreNet, self.scorenets[str(self.index)])
            difficulty, losses = scorenet_loss(scorenet, tokens, targets, config)
            if not again:
                record.scorenet_losses.append(losses)
        if not again:
            _refuse_second_run(self.index, record.decisions)
            saliency = self._input_saliency(record, tokens, args, kwargs)
            step = horizontal_step(
                self.shared.rules, self.index, targets, saliency, difficulty, config
            )
            record.decisions[self.index] = (targets, step.decision)
            record.targets = watch.observe(f"layer {self.index}", scorenet, targets, step)
            record.stats.append(partial(_named, f"htm/layer{self.index}/", step.stats))
        decision = record.decisions[self.index][1]
        return self.shared.rules.mix(tokens, decision, self.layout.num_prefix_tokens)

    def _input_saliency(
        self, record: StepRecord, tokens: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        adapter = self.shared.adapter
        record.measuring = True
        try:
            return input_saliency(adapter, self.layout, self.layer, tokens, args, kwargs)
        finally:
            record.measuring = False


class _ProjectionHook(_Hook):
    """At the output of a layer's projection: choose and remember by its queries and keys."""

    only_reads = True  # for `hosts.base.plain_linear`

    def __call__(self, projection: nn.Module, args: Args, output: Tensor) -> None:
        record, again = self.shared.session.current()
        if record is None or self.index not in record.entering:
            return
        tokens, layer_args, layer_kwargs = record.entering.pop(self.index)
        if not again:
            own = output[:, : tokens.shape[1]]  # without the remembered tokens of a VTM layer
            self._choose(record, self._projected_saliency(own, layer_args, layer_kwargs))
        self._remember(record, again, tokens)

    @torch.no_grad()
    def _projected_saliency(self, projected: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
        adapter, layout = self.shared.adapter, self.layout
        query_key = adapter.projected_query_key(self.layer, projected, layout.class_token)
        return layer_saliency(adapter, layout, self.layer, query_key, args, kwargs)


def _named(prefix: str, stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The statistics of an HTM layer, by their full names."""
    return {prefix + name: value for name, value in stats.items()}


def _remembered_tokens(index: int, count: int, device: torch.device) -> dict[str, Tensor]:
    """The statistics of a VTM layer."""
    found = torch.full((), count, dtype=torch.float32, device=device)
    return {f"vtm/layer{index}/remembered_tokens": found}


class _AttendHook(_Hook):
    """At the input of a VTM layer's attention: add the remembered tokens to its keys and values."""

    def __call__(
        self, attention: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        record, again = self.shared.session.current()
        if record is None or record.measuring:
            return None
        _refuse_without_gradients(record, self.index)
        remembered = record.attending[self.index] = self._remembered(record)
        if not again:
            _refuse_second_run(self.index, record.attended)
            count, device = remembered.tokens.shape[1], remembered.tokens.device
            record.stats.append(partial(_remembered_tokens, self.index, count, device))
            record.attended.add(self.index)
        return self.shared.adapter.with_memory(self.layer, remembered, args, kwargs)


class _OwnTokensHook(_Hook):
    """At the output of a VTM layer's attention: drop the remembered tokens' part."""

    def __call__(self, attention: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        record, _ = self.shared.session.current()
        if record is None or record.measuring:
            return None
        remembered = record.attending.pop(self.index)
        return self.shared.adapter.own_tokens(self.layer, remembered, output, args, kwargs)


def _refuse_second_run(index: int, done: Container[int]) -> None:
    if index in done:
        raise RuntimeError(
            f"layer {index} runs a second time in one training pass (two views of an image, or "
            "layers in a loop): tokens and labels would be mixed twice. Put the views into one "
            "batch, or attach TokenMixup to the encoder alone and call that once for each view"
        )


def _refuse_without_gradients(record: StepRecord, index: int) -> None:
    if record.grad_enabled and not torch.is_grad_enabled():
        raise RuntimeError(
            f"layer {index} runs without gradients inside a training step that has them, which "
            "would lose ScoreNet's loss and the remembered tokens' gradient. Reentrant activation "
            "checkpointing does this (use use_reentrant=False), and a host that runs layers under "
            "torch.no_grad() (freeze them by requires_grad_(False) instead)"
        )


def install_hooks(
    layers: Sequence[nn.Module], shared: Attachment, scorenets: nn.ModuleDict
) -> list[RemovableHandle]:
    """Put the hooks on the layers, and return the handles that remove them."""
    handles = []
    for index, layer in enumerate(layers):
        if shared.mixing(index) or shared.remembering(index):
            hook = _LayerHook(shared, index, layer, scorenets)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            if hook.projection is not None:
                reading = _ProjectionHook(shared, index, layer)
                handles.append(hook.projection.register_forward_hook(reading))
        if shared.attending(index):
            attention = shared.adapter.attention(layer)
            attend, own = _AttendHook(shared, index, layer), _OwnTokensHook(shared, index, layer)
            handles.append(attention.register_forward_pre_hook(attend, with_kwargs=True))
            handles.append(attention.register_forward_hook(own, with_kwargs=True))
    return handles


class _Mark(_Hook):
    """On the host itself, where it costs its layers no fused path."""

    def __call__(self, host: nn.Module, args: Args) -> None:
        """Do nothing: it is there to be found."""


def mark(host: nn.Module, shared: Attachment) -> RemovableHandle:
    """Let :func:`has_hooks` know the host, also while its layers have no hooks."""
    return host.register_forward_pre_hook(_Mark(shared, -1, host))


def has_hooks(host: nn.Module) -> bool:
    """Whether hooks of TokenMixup are on any part of the host."""
    return any(isinstance(hook, _Hook) for part in host.modules() for hook in forward_hooks(part))


def has_others_hooks(layers: Sequence[nn.Module]) -> bool:
    """Whether hooks of anybody else are on any part of the layers."""
    parts = [part for layer in layers for part in layer.modules()]
    return any(not isinstance(hook, _Hook) for part in parts for hook in forward_hooks(part))
