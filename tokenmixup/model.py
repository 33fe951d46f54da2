"""`attach`: TokenMixup on an unmodified host, by hooks alone.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, C classes, K kappa.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenmixup._hooks import Attachment, has_hooks, install_hooks
from tokenmixup._session import Session, StepRecord
from tokenmixup._targets import soft_targets
from tokenmixup.config import HorizontalConfig, VerticalConfig
from tokenmixup.hosts import HostAdapter, TokenLayout, UnsupportedHostError, find_adapter
from tokenmixup.rules import Rules
from tokenmixup.scorenet import ScoreNet


class TokenMixupOutput(NamedTuple):
    """What a training forward pass returns.

    Attributes:
        logits: (B, C).
        targets: soft targets (B, C), mixed; None where none were given.
        scorenet_loss: 0-d, mean over the batch, lambda applied, summed over the HTM layers.
        stats: 0-d tensors on the model's device, by name (``htm/layer3/easy_share``, ...).
    """

    logits: Tensor
    targets: Tensor | None
    scorenet_loss: Tensor
    stats: dict[str, Tensor]


class TokenMixupModel(nn.Module):
    """A host with TokenMixup on it; made by :func:`attach`.

    In training ``model(images, targets)`` returns a :class:`TokenMixupOutput`; in evaluation
    ``model(images)`` runs ``model.backbone(images)`` and nothing else, and returns its logits.

    Attributes:
        backbone: the host itself, its state-dict keys unchanged.
        scorenets: the ScoreNet of each HTM layer, by layer index.
        horizontal: settings of HTM, or None.
        vertical: settings of VTM, or None.
        layout: how the host lays out its tokens.
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
        self.layout = adapter.layout(backbone)
        self.num_classes = num_classes
        self.rules = rules
        self.scorenets = nn.ModuleDict()
        if horizontal is not None and horizontal.scorenet is not None:
            assert num_classes is not None, "attach asks for num_classes where there is a ScoreNet"
            for layer in horizontal.layers:
                self.scorenets[str(layer)] = ScoreNet(
                    self.layout.width,
                    num_classes,
                    horizontal.scorenet,
                    self.layout.num_prefix_tokens,
                    self.layout.class_token,
                )
        parameter = next(backbone.parameters())
        self.scorenets.to(parameter.device, parameter.dtype)
        self._session = Session()
        shared = Attachment(adapter, self.layout, self._session, rules, horizontal, vertical)
        layers = adapter.layers(backbone)
        self._handles = install_hooks(layers, shared, self.scorenets)
        self._is_attached = bool(self._handles)  # torch.compile cannot look at the handles
        # the host's mode, without a change of parts of it that are in another
        self.training = backbone.training
        self.scorenets.train(backbone.training)

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
            logits = self.adapter.logits(self.backbone(images))
            if self._is_attached and not torch.compiler.is_compiling():
                self._session.mark_backward(None, logits)
            return logits
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

    def _collect(self, record: StepRecord, logits: Tensor) -> TokenMixupOutput:
        self._check_carried_out(record)
        loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for losses in record.scorenet_losses:
            loss = loss + losses.mean()
        if not torch.compiler.is_compiling():
            for output in (loss, logits):
                self._session.mark_backward(record, output)
        return TokenMixupOutput(logits, record.targets, loss, record.stats)

    def _check_carried_out(self, record: StepRecord) -> None:
        mixing = self.horizontal.layers if self.horizontal is not None else ()
        attending = self.vertical.layers if self.vertical is not None else ()
        for name, layers, done in (
            ("HTM", mixing, record.decisions.keys()),
            ("VTM", attending, record.attended),
            ("VTM's remembering", range(max(attending, default=0)), record.memory.keys()),
        ):
            missing = [index for index in layers if index not in done]
            if missing:
                raise RuntimeError(
                    f"{name} was not carried out at layer(s) {', '.join(map(str, missing))}: the "
                    "host did not call them as usual in this step. If parts of the model are "
                    "compiled, attach first, then compile the whole TokenMixupModel with "
                    "torch.compile(model, fullgraph=True), which names any graph break"
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

    def detach(self) -> nn.Module:
        """Remove TokenMixup and return the host exactly as it was before :func:`attach`.

        Do not train this model afterwards.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._is_attached = False
        return self.backbone

    def no_weight_decay(self) -> set[str]:
        """The host's own list, with the names that its parameters have here."""
        return {f"backbone.{name}" for name in self.adapter.no_weight_decay(self.backbone)}

    def extra_repr(self) -> str:
        """The host's family and the settings."""
        return "\n".join(
            (
                f"(host): {self.adapter.family}",
                f"(horizontal): {self.horizontal}",
                f"(vertical): {self.vertical}",
            )
        )


def attach(
    model: nn.Module,
    *,
    horizontal: HorizontalConfig | None = None,
    vertical: VerticalConfig | None = None,
    num_classes: int | None = None,
    rules: Rules | None = None,
) -> TokenMixupModel:
    """Put TokenMixup on a host model without editing it.

    The host keeps its class, its forward pass, its state-dict keys and its fused attention. With
    neither ``horizontal`` nor ``vertical`` the result is the plain host behind the same interface,
    for training loops that serve all variants. It is in training or evaluation mode as the host is.

    Args:
        model: the host, of one of the supported families.
        horizontal: settings of Horizontal TokenMixup.
        vertical: settings of Vertical TokenMixup.
        num_classes: C, where the host does not know it.
        rules: for research, the decisions that differ from the paper's; one instance per model.

    Raises:
        UnsupportedHostError: (a ValueError) the host is of no supported family.
        ValueError: the settings do not fit the host, or TokenMixup is attached to it already.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model must be a model (torch.nn.Module), such as "
            f"timm.create_model({model if isinstance(model, str) else 'vit_base_patch16_224'!r}); "
            f"got {model!r}"
        )
    if isinstance(model, TokenMixupModel) or has_hooks(model):
        raise ValueError(
            "TokenMixup is attached to this model already: give all layers in one call of attach, "
            "or detach() first (a copied backbone keeps its hooks, which do nothing: copy the "
            "TokenMixupModel and detach() that)"
        )
    for name, value, kind in (
        ("horizontal", horizontal, HorizontalConfig),
        ("vertical", vertical, VerticalConfig),
        ("rules", rules, Rules),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__} or None, got {value!r}")
    adapter = find_adapter(model)
    layout = adapter.layout(model)
    _check_layers(horizontal, vertical, adapter.layers(model))
    _check_kappa(vertical, layout)
    classes = _known_classes(num_classes, layout.num_classes, horizontal)
    return TokenMixupModel(model, adapter, horizontal, vertical, classes, rules or Rules())


def _check_layers(
    horizontal: HorizontalConfig | None,
    vertical: VerticalConfig | None,
    layers: Sequence[nn.Module],
) -> None:
    depth = len(layers)
    for config in (horizontal, vertical):
        if config is not None and config.layers[-1] >= depth:
            raise ValueError(
                f"{type(config).__name__}.layers names layer {config.layers[-1]}, but the model "
                f"has {depth} layers, 0 to {depth - 1}"
            )
    if (horizontal is not None or vertical is not None) and len(set(layers)) < depth:
        raise UnsupportedHostError(
            f"the model's {depth} layers are {len(set(layers))} modules: some run more than once "
            "per pass, and TokenMixup cannot tell such layers apart"
        )


def _check_kappa(vertical: VerticalConfig | None, layout: TokenLayout) -> None:
    patches = layout.num_patch_tokens
    if vertical is not None and patches is not None and vertical.kappa > patches:
        raise ValueError(
            f"VerticalConfig.kappa is {vertical.kappa}, but a layer has only {patches} patch tokens"
        )


def _known_classes(
    given: int | None, of_host: int | None, horizontal: HorizontalConfig | None
) -> int | None:
    if given is not None and of_host is not None and given != of_host:
        raise ValueError(f"num_classes is {given}, but the model's classifier has {of_host}")
    classes = of_host if given is None else given
    if classes is None and horizontal is not None and horizontal.scorenet is not None:
        raise ValueError(
            "the model has no classifier to read num_classes from, and ScoreNet needs it: "
            "pass num_classes to attach"
        )
    return classes
