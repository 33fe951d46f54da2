"""A task for timm's `train.py`, in place of its `ClassificationTask`.

Dimensions: B batch, C classes.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.loss import (
    BinaryCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from tokenmixup.integrations._shared import refuse_vain_tau, settings_of, smoothed
from tokenmixup.model import TokenMixupModel

_ALLOWED = (
    "torch's CrossEntropyLoss and timm's LabelSmoothingCrossEntropy, SoftTargetCrossEntropy, "
    "BinaryCrossEntropy and PolyCrossEntropy"
)


class TokenMixupTask(ClassificationTask):
    """timm's classification task for a model that :func:`tokenmixup.attach` returned.

    Training steps mix, and add ScoreNet's loss. What timm evaluates and averages for evaluation is
    the plain host, and checkpoints hold the host's own keys, so that timm's ``validate.py`` and
    ``inference.py`` read them as they read any other; ScoreNets and settings lie beside them, as
    ``task_state``.

    Labels are smoothed *before* the model mixes them, as the criterion says; the criterion then
    sees soft targets. Where nothing is mixed the loss is the criterion's own.

    Args:
        model: what :func:`tokenmixup.attach` returned, before it is compiled or wrapped.
        criterion: torch's ``CrossEntropyLoss``, or timm's ``LabelSmoothingCrossEntropy``,
            ``SoftTargetCrossEntropy``, ``BinaryCrossEntropy`` or ``PolyCrossEntropy``.
        criterion_kwargs: of timm's ``create_classification_loss``, instead of a criterion.
        device: of the criterion.
        dtype: of the task.
        verbose: log the criterion's name.

    Raises:
        ValueError: the model has no TokenMixup, the criterion cannot take mixed labels, or ``tau``
            lies below every difficulty that smoothed labels can have, so that HTM would do nothing.
    """

    def __init__(
        self,
        model: TokenMixupModel,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
    ) -> None:
        if not isinstance(model, TokenMixupModel):
            raise ValueError(
                f"TokenMixupTask needs a model with TokenMixup, got {type(model).__name__}: write "
                "model = tokenmixup.attach(model, ...) right after create_model"
            )
        super().__init__(model, criterion, criterion_kwargs, device, dtype, verbose)
        self.eval_model: nn.Module = model.backbone
        self._num_classes = model.num_classes
        self._smoothing, self._takes_soft = _what_to_do(self.criterion)
        refuse_vain_tau(model, self._smoothing, "label smoothing")

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Mix, and compute the loss.

        Args:
            input: images, as the host takes them.
            target: class indices (B,), or soft targets (B, C), as timm's Mixup makes them.

        Returns:
            ``loss`` to train with, ``output`` (logits), ``scorenet_loss`` (part of ``loss``), and
            the statistics of the step.
        """
        out = self.trainable_module(input, self._soft_targets(target))
        return {
            **out.stats,
            "loss": out.loss(self.criterion if self._takes_soft else None),
            "output": out.logits,
            "scorenet_loss": out.scorenet_loss.detach(),
        }

    def _soft_targets(self, target: Tensor) -> Tensor:
        """Smoothed class indices; soft targets as they are."""
        if not target.is_floating_point():
            return smoothed(target, self._smoothing, self._num_classes)
        if self._smoothing and not self._takes_soft:
            raise ValueError(
                f"{type(self.criterion).__name__} smooths class indices, but these targets are "
                "soft already: use SoftTargetCrossEntropy with Mixup, which does the smoothing"
            )
        return target

    def compile(self, backend: str = "inductor", mode: str | None = None, **kwargs: Any) -> Any:
        """Compile the training step's forward pass, and apart from it the plain host."""
        options = dict(kwargs, backend=backend, mode=mode)
        self.trainable_module = cast(nn.Module, torch.compile(self.trainable_module, **options))
        self.eval_model = cast(nn.Module, torch.compile(self.eval_model, **options))
        return self.eval_model

    def setup_ema(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Average the weights of host and ScoreNets; what is evaluated is the averaged host."""
        average = super().setup_ema(*args, **kwargs)
        self.eval_model_ema = self._attached(ema=True).backbone
        return average

    def get_clip_parameters(self, exclude_head: bool = False) -> Any:
        """Parameters to clip; without its head (timm: the last two) and without ScoreNets."""
        if not exclude_head:
            return super().get_clip_parameters()
        return list(self._attached().backbone.parameters())[:-2]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """ScoreNets' state, and the settings."""
        model = self._attached(module, ema)
        return {"scorenets": model.scorenets.state_dict(), **settings_of(model)}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Load ScoreNets.

        Raises:
            ValueError: the checkpoint is of a training without TokenMixup, or with other settings.
        """
        restart = "begin a new training from its weights (timm's --initial-checkpoint)"
        if state is None:
            raise ValueError(
                "the checkpoint is of a training without TokenMixup (it has no task_state), which "
                f"cannot be resumed with it: {restart}"
            )
        model = self._attached(module, ema)
        for name, own in settings_of(model).items():
            if state[name] != own:
                raise ValueError(
                    f"the checkpoint was trained with {name}={state[name]}, but this model has "
                    f"{name}={own}: resume with the same settings, or {restart}"
                )
        model.scorenets.load_state_dict(state["scorenets"], strict=strict)

    def _attached(self, module: nn.Module | None = None, ema: bool = False) -> TokenMixupModel:
        module = self.get_trainable_module(ema=ema) if module is None else module
        return cast(TokenMixupModel, unwrap_model(module))


def _what_to_do(criterion: Any) -> tuple[float, bool]:
    """How much to smooth class indices, and whether the criterion itself takes soft targets.

    Those that do not are cross-entropies of them.

    Raises:
        ValueError: mixed labels have no meaning for the criterion.
    """
    # subclasses may compute something else
    kind, reason = type(criterion), f"allowed are {_ALLOWED}"
    if kind is SoftTargetCrossEntropy:
        return 0.0, False
    if kind is LabelSmoothingCrossEntropy:
        return criterion.smoothing, False
    if kind is nn.CrossEntropyLoss:
        if criterion.weight is not None:
            reason = "weights of classes need one class per image: use BinaryCrossEntropy's"
        elif criterion.ignore_index != nn.CrossEntropyLoss().ignore_index:
            reason = "ignore_index needs one class per image"
        elif criterion.reduction != "mean":
            reason = f"its reduction must be 'mean', got {criterion.reduction!r}"
        else:
            return criterion.label_smoothing, False
    elif kind in (BinaryCrossEntropy, PolyCrossEntropy):
        binary = kind is BinaryCrossEntropy
        if binary and criterion.smooth_dense:
            reason = "smooth_dense is for several labels per image"
        elif criterion.reduction != "mean" and not (binary and criterion.sum_classes):
            reason = f"its reduction must be 'mean', got {criterion.reduction!r}"
        else:
            return criterion.smoothing, True
    name = getattr(criterion, "__name__", kind.__name__)
    raise ValueError(f"TokenMixupTask cannot mix labels for {name}: {reason}")
