"""Do HTM's labels say what the mixed picture shows? Judged by a stronger model.

HTM at layer 0 mixes tokens that stand for squares of pixels, so the mixed sample has a picture: the
same squares exchanged. A judge, trained on all images, tells how much of the partner it sees there.

Dimensions: I images, B batch, C classes, T patch tokens, S height and width.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.config.reading import load_config
from experiments.data.loading import Batch
from experiments.errors import ConfigError
from experiments.provenance import provenance
from experiments.study.plan import Study
from experiments.study.records import LabelRecord, label_records, study_records
from experiments.study.sinks import layer_saliencies
from experiments.training.distributed import ONE_PROCESS
from experiments.training.evaluation import Assessment
from tokenmixup import TokenMixupModel
from tokenmixup.functional import MixingDecision, decide_mixing, label_share

IMAGES = 2000
"""How many of the test images are mixed, in batches of the training's size."""
RHO_TIMES_TOKENS = (0.5, 1.0, 2.0)


class Agreement(NamedTuple):
    """Of pairs of different classes, means; shares are the partner's, from 0 to 1."""

    pairs: int
    """None of the others has a value where it is 0."""
    tokens: float | None
    """Tokens taken from the partner."""
    share: float | None
    """The label's, by saliency as in the paper."""
    share_by_tokens: float | None
    """That of the taken tokens among all."""
    share_seen: float | None
    """What the judge sees of the partner's class, of both classes."""
    share_seen_random: float | None
    """Likewise if as many tokens at random places are taken: what their number alone does."""
    gap: float | None
    """|share - share seen|. Labels that ignore the partner would be off by share seen itself."""
    gap_by_tokens: float | None
    """|share by tokens - share seen|."""


def mixed_pixels(images: Tensor, decision: MixingDecision) -> Tensor:
    """The picture (B, 3, S, S) of what HTM mixes at layer 0: squares of the partner's pixels."""
    side, size = round(decision.mask.shape[1] ** 0.5), images.shape[-1]
    assert side * side == decision.mask.shape[1] and size % side == 0
    mask = decision.mask.unflatten(1, (1, side, side))
    mask = mask.repeat_interleave(size // side, 2).repeat_interleave(size // side, 3)
    return torch.where(mask, images[decision.partner], images)


def at_random_places(decision: MixingDecision, generator: torch.Generator) -> MixingDecision:
    """The same partners and as many of their tokens, at places drawn at random."""
    order = torch.rand(decision.mask.shape, generator=generator).argsort(1)
    return MixingDecision(decision.partner, decision.mask.gather(1, order))


@torch.no_grad()
def agreement(
    model: TokenMixupModel, judge: nn.Module, batches: Iterable[Batch], num_classes: int, rho: float
) -> Agreement:
    """Mix all samples by the model's saliency at layer 0, and have the judge look at them.

    Args:
        model: in evaluation mode.
        judge: likewise; images (B, 3, S, S) -> logits (B, C).
        batches: images and labels.
        num_classes: C.
        rho: saliency difference threshold.
    """
    parts, generator = [], torch.Generator().manual_seed(0)
    for images, labels in batches:
        saliency = layer_saliencies(model, images)[0]
        targets = F.one_hot(labels, num_classes).float()
        easy = torch.ones(len(labels), dtype=torch.bool)
        decision = decide_mixing(saliency, targets, easy, rho)
        values = (
            decision.mask.sum(1).float(),
            label_share(saliency, decision),
            decision.mask.float().mean(1),
            _share_seen(judge, images, labels, decision),
            _share_seen(judge, images, labels, at_random_places(decision, generator)),
        )
        pairs = decision.mask.any(1) & (labels != labels[decision.partner])
        parts.append(torch.stack(values)[:, pairs])
    tokens, share, by_tokens, seen, seen_random = torch.cat(parts, 1).double()
    gaps = ((share - seen).abs(), (by_tokens - seen).abs())
    found = (tokens, share, by_tokens, seen, seen_random, *gaps)
    means = (round(v.mean().item(), 5) if len(v) else None for v in found)
    return Agreement(len(tokens), *means)


def _share_seen(
    judge: nn.Module, images: Tensor, labels: Tensor, decision: MixingDecision
) -> Tensor:
    """What the judge sees (B,) of the partner's class, of both classes, in the mixed picture."""
    seen = judge(mixed_pixels(images, decision)).softmax(1)
    own = seen.gather(1, labels.unsqueeze(1))[:, 0]
    other = seen.gather(1, labels[decision.partner].unsqueeze(1))[:, 0]
    return other / (own + other)


def judge_labels(study: Study, runs: Path, results: Path, judge: Path, command: str) -> int:
    """Record the agreement for all finished trainings that lack it; gives how many were added.

    Args:
        study: whose trainings, with a test split; each is mixed by several rho.
        runs: folder of the study's run folders.
        results: folder of the records.
        judge: run folder of the judge.
        command: for the records.

    Raises:
        UserError: the judge, or a model, cannot be loaded.
    """
    if study.test_split is None:
        raise ConfigError(f"{study.file}: test_split: missing; its images are what is mixed")
    split = f"{study.test_split}[:{IMAGES}]"
    looking, store = _assessment(judge, split).model.eval(), label_records(results, study.name)
    done = {(r.variant, r.seed) for r in store.read()}
    records = [r for r in study_records(results, study.name).read() if r.variant in study.variants]
    missing = [r for r in records if (r.variant, r.seed) not in done]
    for record in missing:
        folder = runs / study.variants[record.variant].folder / f"seed{record.seed}"
        own = _assessment(folder, split)
        model = own.model.eval()
        batches, tokens = list(own.batches), model.layout.num_patch_tokens
        assert tokens is not None and model.num_classes is not None
        for times in RHO_TIMES_TOKENS:
            rho = round(times / tokens, 4)
            found = agreement(model, looking, batches, model.num_classes, rho)
            store.keep(
                LabelRecord(
                    study=study.name,
                    variant=record.variant,
                    seed=record.seed,
                    rho=rho,
                    agreement=found._asdict(),
                    command=command,
                    **provenance(ONE_PROCESS.device),
                )
            )
    return len(missing)


def _assessment(folder: Path, split: str) -> Assessment:
    """Final weights of a run folder, on the CPU, and images in batches of the training's size."""
    config = load_config(folder / "config.yaml", {"device": "cpu", "data.val_split": split})
    data = dataclasses.replace(config.data, eval_batch_size=config.data.batch_size)
    config = dataclasses.replace(config, data=data)
    return Assessment(config, str(folder / "final.safetensors"), ONE_PROCESS)
