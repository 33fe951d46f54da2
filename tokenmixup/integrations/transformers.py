"""The Trainer of Hugging Face's transformers, for models with TokenMixup.

Dimensions: B batch, C classes.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from tokenmixup.functional import soft_cross_entropy
from tokenmixup.integrations._shared import refuse_vain_tau, settings_of, smoothed
from tokenmixup.model import TokenMixupModel, TokenMixupOutput

STATE_FILE = "tokenmixup.safetensors"
"""What a checkpoint folder holds besides the host's files: the ScoreNets, and as metadata
the settings of HTM and VTM."""


class TokenMixupTrainer(Trainer):
    """A Trainer for ``attach(AutoModelForImageClassification..., ...)``.

    Takes the arguments of ``transformers.Trainer``. Batches hold ``pixel_values`` and ``labels``,
    class indices (B,) or soft targets (B, C). ``label_smoothing_factor`` smooths them before HTM
    mixes them; where nothing is mixed the loss is the Trainer's own. Every image of an optimiser
    step weighs the same, also where the last of accumulated batches is smaller. Evaluation runs
    the plain host; ``compute_metrics`` gets its logits. Logs hold the means of ``out.stats``, of
    the main process, beside the loss. For another loss override :meth:`criterion`.

    ``from_pretrained`` reads each checkpoint folder. The ScoreNets and the settings lie beside
    the host's files, in ``tokenmixup.safetensors``.

    Raises:
        TypeError: the model is not attached to a model of transformers.
        ValueError: an argument that it does not support, a host whose checkpoints
            ``from_pretrained`` could not read, a checkpoint of other settings, or a ``tau`` below
            every difficulty that smoothed labels can have.
    """

    def __init__(self, model: TokenMixupModel | None = None, *args: Any, **kwargs: Any) -> None:
        if model is not None:
            _admit(model)
        try:
            super().__init__(cast(Any, model), *args, **kwargs)
        finally:  # other Trainers are refused as before
            for admitted in {model, vars(self).get("model")} - {None}:
                vars(admitted).pop("accepts_loss_kwargs", None)
        # so that the Trainer counts the labels of all batches of an optimiser step
        self.model_accepts_loss_kwargs = True
        if self.args.label_names is None:
            self.label_names = ["labels"]
        self._stats: dict[str, Tensor] = {}  # their sums since the last log
        self._batches = 0
        self._check_arguments()

    def _check_arguments(self) -> None:
        model, smoothing = self._attached, self.args.label_smoothing_factor
        problem = model.backbone.config.problem_type
        for refused, instead in (
            (
                self.compute_loss_func is not None,
                "compute_loss_func knows nothing of mixed targets: override criterion",
            ),
            (
                self.label_names != ["labels"],
                f"batches must hold their labels as 'labels', but label_names={self.label_names}",
            ),
            (
                problem not in (None, "single_label_classification"),
                f"targets must be distributions over the classes, but the host's config has "
                f"problem_type={problem!r}",
            ),
            (
                self.is_fsdp_enabled or self.is_deepspeed_enabled,
                "FSDP and DeepSpeed are not supported: start several processes with torchrun",
            ),
            (
                self.args.n_gpu > 1,
                f"one process with {self.args.n_gpu} GPUs would train by DataParallel, with which "
                f"TokenMixup does not work: start torchrun --nproc_per_node={self.args.n_gpu}, or "
                "set CUDA_VISIBLE_DEVICES=0 for one GPU",
            ),
        ):
            if refused:
                raise ValueError(f"TokenMixupTrainer: {instead}")
        refuse_vain_tau(model, smoothing, "label_smoothing_factor")

    @property
    def _attached(self) -> Any:
        """The model with TokenMixup, unwrapped."""
        return self.model

    def call_model_init(self, trial: Any = None) -> Any:
        """Check what ``model_init`` returns."""
        model = super().call_model_init(trial)
        _check(model)
        if self.model is None:  # the first one, which __init__ looks at
            _admit(model)
        return model

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Weigh a batch by its share of the optimiser step, whatever ``compute_loss`` does.

        Args:
            model: the attached model, as the Trainer wrapped it.
            inputs: ``pixel_values`` and ``labels``.
            num_items_in_batch: labels in all batches of the optimiser step, in all processes
                unless ``average_tokens_across_devices`` is off.
        """
        if num_items_in_batch is not None:
            averaged = self.args.average_tokens_across_devices  # as gradients are
            processes = self.accelerator.num_processes if averaged else 1
            # The Trainer divides by this, unless told that compute_loss used num_items_in_batch.
            steps: Any = num_items_in_batch / (inputs["labels"].numel() * processes)
            self.current_gradient_accumulation_steps = steps
        return super().training_step(cast(Any, model), inputs)

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, 0-d, in training and in evaluation: the cross-entropy.

        The loss of the ScoreNets is added to it, and every image of an optimiser step weighs the
        same, also where this is overridden.

        Args:
            logits: (B, C).
            targets: soft targets (B, C): smoothed, and in training mixed.
        """
        return soft_cross_entropy(logits, targets).mean()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a batch, on mixed targets in training, on its own in evaluation.

        Args:
            model: the attached model, as the Trainer wrapped it.
            inputs: ``pixel_values`` and ``labels``.
            return_outputs: return ``{"logits": ...}``, too.
            num_items_in_batch: not used, and None: :meth:`training_step` weighs the batch.
        """
        images, labels = _images_and_labels(inputs)
        if labels is None:
            raise ValueError("a loss needs 'labels' in the batch, which has only 'pixel_values'")
        targets = self._smoothed(labels)
        if model.training:
            out = model(images, targets)
            self._batches += bool(out.stats)
            for name, value in out.stats.items():
                self._stats[name] = self._stats.get(name, 0) + value
        else:
            out = _plain_output(model(images), targets)
        loss = out.loss(self.criterion)
        return (loss, {"logits": out.logits}) if return_outputs else loss

    def _smoothed(self, labels: Tensor) -> Tensor:
        return smoothed(labels, self.args.label_smoothing_factor, self._attached.num_classes)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, logits (B, C) and labels of a batch; None for what there is not."""
        inputs = self._prepare_inputs(inputs)
        images, labels = _images_and_labels(inputs)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                logits = model(images)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
                logits = outputs["logits"]
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the means of the statistics of HTM and VTM beside the loss."""
        if "loss" in logs:
            logs |= {name: (total / self._batches).item() for name, total in self._stats.items()}
            self._stats, self._batches = {}, 0
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The model card of the host."""
        with self._host_as_model():
            super().create_model_card(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """The columns of a data set that reach the model, which the Trainer reads off `forward`."""
        columns: Any = ["pixel_values", "label", "label_ids", *self.label_names]
        self._signature_columns = columns

    @contextlib.contextmanager
    def _host_as_model(self) -> Iterator[None]:
        attached = self._attached
        self.model = attached.backbone
        try:
            yield
        finally:
            self.model = attached

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        with self._host_as_model():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            path = Path(cast(str, output_dir or self.args.output_dir)) / STATE_FILE
            scorenets = self._attached.scorenets.state_dict()
            save_file(scorenets, path, {"format": "pt", **_settings(self._attached)})

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        _load(self._attached, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        _load(self._attached, Path(self.state.best_model_checkpoint))


def _check(model: Any) -> None:
    found = type(model).__name__
    if isinstance(model, TokenMixupModel):
        if isinstance(model.backbone, PreTrainedModel):
            return _check_weights(model.backbone)
        found = f"one attached to a {type(model.backbone).__name__}"
    raise TypeError(
        "TokenMixupTrainer needs a model of transformers with TokenMixup on it, "
        f"tokenmixup.attach(AutoModelForImageClassification.from_pretrained(...), ...); got {found}"
    )


def _check_weights(host: PreTrainedModel) -> None:
    """Raise ValueError unless `from_pretrained` makes a host with the same weights."""
    kind = type(host)
    with torch.device("meta"):
        remade = kind(copy.deepcopy(host.config))
    here, there = (
        {name: tuple(value.shape) for name, value in one.state_dict().items()}
        for one in (host, remade)
    )
    for name in sorted(here | there):
        if here.get(name) != there.get(name):
            raise ValueError(
                "TokenMixupTrainer: from_pretrained could not read checkpoints of this host: "
                f"{name} is {here.get(name, 'missing')} in it, but {there.get(name, 'missing')} "
                f"in what {kind.__name__} makes of its config. For other classes call "
                "from_pretrained(..., num_labels=..., ignore_mismatched_sizes=True); make another "
                f"head in a class derived from {kind.__name__}; train adapters of peft with "
                "accelerate"
            )


def _admit(model: Any) -> None:
    """Answer what a Trainer asks a model first; see `HostAdapter.refused`."""
    _check(model)
    model.accepts_loss_kwargs = True


def _images_and_labels(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    others = sorted(inputs.keys() - {"pixel_values", "labels"})
    if others or "pixel_values" not in inputs:
        raise ValueError(
            "TokenMixupTrainer takes batches of 'pixel_values' and 'labels', but this one has "
            f"{', '.join(map(repr, inputs))}: give a data_collator that makes those two (and "
            "remove_unused_columns=False, where the data set makes its images on the fly)"
        )
    return inputs["pixel_values"], inputs.get("labels")


def _plain_output(logits: Tensor, targets: Tensor) -> TokenMixupOutput:
    """As of a pass without TokenMixup, for its loss."""
    return TokenMixupOutput(logits, targets, logits.new_zeros((), dtype=torch.float32), {})


def _settings(model: TokenMixupModel) -> dict[str, str]:
    """As metadata of safetensors, which are text."""
    return {name: json.dumps(settings) for name, settings in settings_of(model).items()}


def _load(model: Any, folder: Path) -> None:
    """Load what `TokenMixupTrainer._save` wrote.

    `from_pretrained` reads the host: the keys in a file of transformers need not be those of the
    module.

    Raises:
        ValueError: a file or a weight is missing, or the settings are others.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} is no checkpoint of TokenMixupTrainer: it has no {STATE_FILE}")
    with safe_open(path, "pt") as file:
        saved = file.metadata()
    for name, settings in _settings(model).items():
        if saved[name] != settings:
            raise ValueError(
                f"{folder} was trained with {name}={saved[name]}, but the model has "
                f"{name}={settings}: attach with the same settings to resume"
            )
    host = model.backbone
    loaded, report = type(host).from_pretrained(folder, output_loading_info=True)
    faults = {name: keys for name, keys in report.items() if keys}
    if faults:
        raise ValueError(f"{folder} does not fit the model: {faults}")
    host.load_state_dict(loaded.state_dict())
    model.scorenets.load_state_dict(load_file(path))
