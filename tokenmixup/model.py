"""A host with TokenMixup on it: its training pass, and what that returns.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, C classes, K kappa.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenmixup._hooks import Attachment, has_others_hooks, install_hooks, mark
from tokenmixup._session import Session, StepRecord
from tokenmixup._statistics import Statistics
from tokenmixup._targets import one_hot_targets, soft_targets
from tokenmixup._watch import Watch
from tokenmixup.config import HorizontalConfig, VerticalConfig
from tokenmixup.functional import soft_cross_entropy
from tokenmixup.hosts import HostAdapter, TokenLayout, unwrapped
from tokenmixup.hosts.base import class_name
from tokenmixup.rules import Rules
from tokenmixup.scorenet import ScoreNet

_SETTINGS = ("horizontal", "vertical", "rules")


class TokenMixupOutput(NamedTuple):
    """What a training forward pass returns.

    Attributes:
        logits: (B, C).
        targets: soft targets (B, C), mixed; None where none were given. As they were given where
            the model is not ``enabled``.
        scorenet_loss: 0-d, mean over the batch, lambda applied, summed over the HTM layers.
        stats: 0-d tensors on the model's device, by name (``htm/layer3/easy_share``, ...). They
            are computed when the first is read, from the saliency and the masks of the step, which
            are kept until then; a compiled model computes them in each step.
    """

    logits: Tensor
    targets: Tensor | None
    scorenet_loss: Tensor
    stats: Mapping[str, Tensor]

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """The loss to train with, 0-d: that of the logits on the mixed targets, and ScoreNet's.

        Args:
            criterion: called with ``logits`` and soft targets (B, C), returns a 0-d loss; by
                default the mean cross-entropy. Class indices, as they come back where TokenMixup
                is switched off, reach it as one-hot targets.

        Raises:
            ValueError: the step had no targets, or the criterion's loss is not 0-d.
        """
        if self.targets is None:
            raise ValueError(
                "this step had no targets to compute a loss with: call model(images, targets)"
            )
        indices = self.targets.dim() == 1  # of classes, where TokenMixup is switched off
        if criterion is not None:
            targets = one_hot_targets(self.targets, *self.logits.shape) if indices else self.targets
            loss = criterion(self.logits, targets)
        elif indices:
            loss = F.cross_entropy(self.logits.to(self.scorenet_loss.dtype), self.targets)
        else:
            loss = soft_cross_entropy(self.logits, self.targets).mean()
        if loss.dim():
            raise ValueError(
                f"the criterion must return a 0-d loss, but returned {tuple(loss.shape)}: take "
                "the mean over the batch"
            )
        return loss + self.scorenet_loss


class TokenMixupModel(nn.Module):
    """A host with TokenMixup on it; made by :func:`tokenmixup.attach`.

    In training ``model(images, targets)`` returns a :class:`TokenMixupOutput`; in evaluation
    ``model(images)`` runs ``model.backbone(images)`` and nothing else, and returns its logits.

    Public attributes and methods of the host (``config``, ``pretrained_cfg``,
    ``set_grad_checkpointing``, ``save_pretrained``, ...) are read through this model. Where they
    hold names of parameters (:meth:`no_weight_decay`, ``group_matcher``) they hold those that the
    parameters have here. To set one here is an error: ``model.backbone.name = value`` sets it.

    Attributes:
        backbone: the host itself, its state-dict keys unchanged.
        enabled: whether training passes mix. While False they are those of the plain host, and
            targets come back as they went in.
        scorenets: the ScoreNet of each HTM layer, by layer index.
        horizontal: settings of HTM, or None.
        vertical: settings of VTM, or None.
        layouts: how the host lays out its tokens, at each layer.
        num_classes: C.
        rules: the decisions in training, :class:`~tokenmixup.rules.Rules`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        adapter: HostAdapter,
        horizontal: HorizontalConfig | None,
        vertical: VerticalConfig | None,
        num_classes: int | None,
        rules: Rules,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter
        self.horizontal = horizontal
        self.vertical = vertical
        host = unwrapped(backbone)
        self.layouts = tuple(adapter.layouts(host))
        # Those themselves: later others may stand in their places, which wrap them.
        self._layers = tuple(adapter.layers(host))
        self.num_classes = num_classes
        self.rules = rules
        self.scorenets = nn.ModuleDict()
        if horizontal is not None and horizontal.scorenet is not None:
            assert num_classes is not None, "attach asks for num_classes where there is a ScoreNet"
            for layer in horizontal.layers:
                layout = self.layouts[layer]
                self.scorenets[str(layer)] = ScoreNet(
                    layout.width,
                    num_classes,
                    horizontal.scorenet,
                    layout.num_prefix_tokens,
                    layout.class_token,
                )
        parameter = next(backbone.parameters())
        self.scorenets.to(parameter.device, parameter.dtype)
        self._session = Session()
        self._shared = Attachment(
            adapter,
            self.layouts,
            self._session,
            rules,
            horizontal,
            vertical,
            None if horizontal is None else Watch(horizontal),
        )
        self._mark = mark(host, self._shared)
        self._handles: list[RemovableHandle] = []
        self._is_attached = horizontal is not None or vertical is not None
        self.enabled = True
        # the host's mode, without a change of parts of it that are in another
        self.training = backbone.training
        self.scorenets.train(backbone.training)

    @property
    def layout(self) -> TokenLayout:
        """How the host lays out its tokens, at its first layer; without stages, at every layer."""
        return self.layouts[0]

    def _place_hooks(self) -> None:
        """Have the hooks on the host: in training, and in evaluation where they cost nothing.

        A fused path of the host's evaluation runs only without them, and without anybody else's:
        then ours stay as well, so that all keep their order.
        """
        if self._is_attached and (self.training or not self.adapter.fused_evaluation):
            if not self._handles:
                self._handles = install_hooks(self._layers, self._shared, self.scorenets)
        elif not self._is_attached or not has_others_hooks(self._layers):
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def __getattr__(self, name: str) -> Any:
        """Attributes of the host, private ones excepted: tools look for theirs on each module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # a copy in the making has no backbone yet
            if name.startswith("_") or "backbone" not in self.__dict__.get("_modules", {}):
                raise
        if name in self.adapter.refused:
            raise RuntimeError(self.adapter.refused[name])
        backbone = self.backbone
        try:
            value = getattr(backbone, name)
        except AttributeError as error:
            host = class_name(type(unwrapped(backbone)))
            raise AttributeError(
                f"neither TokenMixupModel nor its host, a {host}, has the attribute {name!r}"
            ) from error
        if name == "group_matcher":
            return partial(_prefixed_matcher, value, self._host_prefix())
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """A change of mode places the hooks; nothing of the host is hidden by what it never reads.

        Lightning restores modes after a validation by setting ``training``, without ``train()``.
        """
        modules = self.__dict__.get("_modules", {})
        if name in _SETTINGS and name in self.__dict__:
            raise AttributeError(
                f"{name!r} is what TokenMixup was attached with, and does not change: detach(), "
                "attach with the new settings, and take the ScoreNets along: "
                "new.scorenets.load_state_dict(old.scorenets.state_dict())"
            )
        if (
            "enabled" in self.__dict__  # the constructor is done
            and not name.startswith("_")
            and not (name in self.__dict__ or name in modules or hasattr(type(self), name))
            and hasattr(modules["backbone"], name)
        ):
            raise AttributeError(
                f"{name!r} is the host's: set it there: model.backbone.{name} = ..."
            )
        super().__setattr__(name, value)
        if name == "training":
            self._place_hooks()

    def _host_prefix(self) -> str:
        """What stands before the names of the host's parameters."""
        host = unwrapped(self.backbone)
        return next(f"{name}." for name, module in self.named_modules() if module is host)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        """Logits (B, C) in evaluation; in training a :class:`TokenMixupOutput`.

        Args:
            images: what the host takes.
            targets: in training, soft targets (B, C) or class indices (B,); needed for HTM, and for
                a loss by what is returned: without them VTM alone returns None as targets.

        Raises:
            ValueError: targets in evaluation, none in training with HTM, of a wrong shape, or a row
                that is negative or does not sum to 1. On an accelerator and in compiled code HTM
                finds such rows, and nothing does where VTM is alone.
        """
        if not self.training:
            if targets is not None:
                raise ValueError(
                    "targets were given in evaluation mode, where nothing is mixed: call "
                    "model.train() before a training step, or model(images) to evaluate"
                )
            return self._host_logits(images)
        if not self.enabled:
            return self._plain(images, targets)
        if not self._is_attached and (self.horizontal or self.vertical):
            raise RuntimeError(
                "detach() removed TokenMixup from this model: train the model that it returned, or "
                "attach TokenMixup to that again"
            )
        # torch marks what DataParallel makes in this way
        if not torch.compiler.is_compiling() and "_is_replica" in self.__dict__:
            raise RuntimeError(
                "TokenMixup does not work with torch.nn.DataParallel, whose replicas share hooks "
                "that belong to the original: use DistributedDataParallel, also on one machine"
            )
        self._check_classifier()
        self._check_sharding()
        targets = self._soft_targets(images, targets)
        self.rules.begin(self, images, targets)
        if torch.compiler.is_compiling():
            record = self._session.begin_traced(targets)
            try:  # dynamo cannot trace step(), a context manager of its own
                output = self.backbone(images)
            finally:
                self._session.end_traced()
        else:
            with self._session.step(targets) as record:
                output = self.backbone(images)
        return self._collect(record, self.adapter.logits(output))

    def _host_logits(self, images: Tensor) -> Tensor:
        """Logits (B, C) of a pass that is the plain host's."""
        logits = self.adapter.logits(self.backbone(images))
        if self._is_attached and not torch.compiler.is_compiling():
            self._session.mark_backward(None, logits)
        return logits

    def _plain(self, images: Tensor, targets: Tensor | None) -> TokenMixupOutput:
        """A training pass without TokenMixup."""
        logits = self._host_logits(images)
        loss = _no_loss(logits)
        # DistributedDataParallel waits for a gradient of every parameter.
        for parameter in self.scorenets.parameters():
            loss = loss + 0 * parameter.sum()
        return TokenMixupOutput(logits, targets, loss, {})

    def _check_classifier(self) -> None:
        classes = self.adapter.layout(unwrapped(self.backbone)).num_classes
        if classes is not None and classes != self.num_classes:
            raise RuntimeError(
                f"the classifier now has {classes} classes, but had {self.num_classes} when "
                "TokenMixup was attached, and ScoreNet has as many: detach(), replace the "
                "classifier, then attach again"
            )

    def _check_sharding(self) -> None:
        if torch.compiler.is_compiling():
            return
        # torch marks in this way what fully_shard and FullyShardedDataParallel take care of
        mark = "_is_fsdp_managed_module"
        if any(mark in layer.__dict__ for layer in self._layers) and any(
            mark not in scorenet.__dict__ for scorenet in self.scorenets.values()
        ):
            raise RuntimeError(
                "parts of this model are sharded, but its ScoreNets are not, and would be trained "
                "apart in each process: shard the whole model last, fully_shard(model) on what "
                "attach returned"
            )

    def _collect(self, record: StepRecord, logits: Tensor) -> TokenMixupOutput:
        self._check_carried_out(record)
        means = [losses.mean() for losses in record.scorenet_losses]
        loss = sum(means[1:], means[0]) if means else _no_loss(logits)
        if torch.compiler.is_compiling():
            return TokenMixupOutput(logits, record.targets, loss, _merged(record.stats))
        for output in (loss, logits):
            self._session.mark_backward(record, output)
        stats = Statistics(partial(_merged, record.stats))
        return TokenMixupOutput(logits, record.targets, loss, stats)

    def _check_carried_out(self, record: StepRecord) -> None:
        shared, indices = self._shared, range(len(self.layouts))
        for name, acts, done in (
            ("HTM", shared.mixing, record.decisions),
            ("VTM", shared.attending, record.attended),
            ("VTM's remembering", shared.remembering, record.memory),
        ):
            missing = [index for index in indices if acts(index) and index not in done]
            if missing:
                raise RuntimeError(
                    f"{name} was not carried out at layer(s) {', '.join(map(str, missing))}: the "
                    "host did not call them as usual in this step. If parts of the model are "
                    "compiled, attach first, then compile the whole TokenMixupModel with "
                    "torch.compile(model, fullgraph=True), which names any graph break. With "
                    "fully_shard and activation checkpointing compile the layers' MLPs instead. "
                    "A host that leaves layers out at random (LayerDrop) must not do so"
                )

    def _soft_targets(self, images: Tensor, targets: Tensor | None) -> Tensor | None:
        if targets is None:
            if self.horizontal is not None:
                raise ValueError(
                    "Horizontal TokenMixup relabels what it mixes: in training mode call "
                    "model(images, targets), or model.eval() first to evaluate"
                )
            return None
        return soft_targets(targets, images.shape[0], self.num_classes)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of every module; where names or ScoreNets are others, the error says so in words."""
        # not by "backbone." alone, which a host's own part may be called
        parts = [f"{name}." for name, _ in self.backbone.named_children()]
        parts += [name for name, _ in self.backbone.named_parameters(recurse=False)]
        beginnings = ("scorenets.", *(f"backbone.{part}" for part in parts))
        if not any(name.startswith(beginnings) for name in state_dict):
            raise RuntimeError(
                "names of a TokenMixupModel's weights begin with `backbone.` or `scorenets.`, but "
                f"those that were given begin as {next(iter(state_dict), None)!r}: load weights of "
                "the host itself by model.backbone.load_state_dict(...), and take off what a "
                "wrapper put before the names (`module.` of DistributedDataParallel, `_orig_mod.` "
                "of torch.compile)"
            )
        own = [f"scorenets.{name}" for name in self.scorenets.state_dict()]
        there = [name for name in state_dict if name.startswith("scorenets.")]
        if strict and set(there) != set(own):
            raise RuntimeError(
                f"the weights are of a model with {_named(there)}, this one has {_named(own)}: "
                "attach with the HorizontalConfig of that training (layers, scorenet)"
            )
        return super().load_state_dict(state_dict, strict, assign)

    def detach(self) -> nn.Module:
        """Remove TokenMixup and return the host exactly as it was before :func:`tokenmixup.attach`.

        Do not train this model afterwards.
        """
        self._is_attached = False
        self._place_hooks()
        self._mark.remove()
        return self.backbone

    def no_weight_decay(self) -> set[str]:
        """The host's own list, with the names that its parameters have here."""
        names = self.adapter.no_weight_decay(unwrapped(self.backbone))
        return {self._host_prefix() + name for name in names}

    def extra_repr(self) -> str:
        """The host's family and the settings."""
        return "\n".join(
            (
                f"(host): {self.adapter.family}",
                f"(horizontal): {self.horizontal}",
                f"(vertical): {self.vertical}",
            )
        )


def _merged(parts: Sequence[Callable[[], Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The statistics of all layers."""
    return {name: value for part in parts for name, value in part().items()}


def _named(scorenets: Iterable[str]) -> str:
    """Where ScoreNets are, and how they pool, by the names of their parameters."""
    names = sorted({name.split(".")[1] for name in scorenets}, key=int)
    if not names:
        return "no ScoreNet"
    pooled = any(".pool." in name for name in scorenets)
    many = "s" if len(names) > 1 else ""
    return (
        f"ScoreNet{many} {'with' if pooled else 'without'} attention pooling at layer{many} "
        f"{', '.join(names)}"
    )


def _no_loss(logits: Tensor) -> Tensor:
    """A 0-d zero in float32 or wider."""
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))


def _prefixed_matcher(matcher: Callable[..., Any], prefix: str, coarse: bool = False) -> Any:
    """timm's patterns for groups of layers, for names that begin with a prefix.

    What no pattern matches, the ScoreNets included, is timm's last group, that of the head.
    """

    def prefixed(pattern: str) -> str:
        # timm matches from the start of a name. A ^ that is neither escaped nor in brackets
        # says so again, and would be wrong behind the prefix.
        free = re.sub(r"(\\.|\[\^?\]?[^\]]*\])|\^", lambda found: found[1] or "", pattern)
        return rf"^{re.escape(prefix)}(?:{free})"

    return {
        group: None
        if patterns is None
        else prefixed(patterns)
        if isinstance(patterns, str)
        else [(prefixed(pattern), suffix) for pattern, suffix in patterns]
        for group, patterns in matcher(coarse=coarse).items()
    }
