"""What pairing costs in a process, as a function of its batch, from the measured curve of row 1.

Pairing is `a·B²·T` seconds for the gains and `c·B^p` for the assignment. Each process pairs within
its own micro-batch and tells nobody, so the number of processes does not occur.

Dimensions: B batch of a process, T patch tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

from experiments.documents.markdown import aligned_table

GPUS = (8, 64, 1_024)
BATCHES = (64, 128, 256, 512, 1_024, 2_048)
SHOWS = 0.01
"""Share of a step from which pairing shows."""


@dataclass(frozen=True)
class Training:
    """A training whose speed is assumed: that which a GPU is to reach, until one has been measured.

    Attributes:
        model: its name.
        patches: T.
        batch: of a process, as in the paper.
        images_per_second: of a GPU.
    """

    model: str
    patches: int
    batch: int
    images_per_second: float


TRAININGS = (Training("CCT-7/3×1", 256, 128, 20_000), Training("ViT-B/16", 196, 126, 2_400))


@dataclass(frozen=True)
class CostModel:
    """Constants of the model, and how far the curve strays from it.

    Attributes:
        gain: a, seconds.
        assignment: c, seconds.
        exponent: p.
        worst_factor: the largest factor between model and measurement on the curve.
        smallest: the least B of the curve that was fitted.
    """

    gain: float
    assignment: float
    exponent: float
    worst_factor: float
    smallest: int

    def seconds(self, batch: float, patches: int) -> float:
        """Of pairing a batch whose samples are all easy."""
        return self.gain * batch**2 * patches + self.assignment * batch**self.exponent

    def share(self, batch: float, training: Training) -> float:
        """Of a step that takes pairing and nothing else besides the plain step's time."""
        return self.seconds(batch, training.patches) * training.images_per_second / batch

    def shows_from(self, training: Training, share: float = SHOWS) -> float:
        """The batch of a process at which pairing takes a share of the plain step."""
        low, high = 1.0, 1e6
        while high / low > 1.001:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.share(middle, training) > share else (middle, high)
        return low


def fit(pairing: dict[str, Any]) -> CostModel:
    """Fit to the curve of row 1, by least squares of the logarithms."""
    points = pairing["curve"]
    points = [p for p in points if p["batch"] >= 128] or points  # below it calls cost more
    batches = [point["batch"] for point in points]
    gain = _mean_log(
        point["timings"]["gain"]["seconds"] / (point["batch"] ** 2 * point["patches"])
        for point in points
    )
    x = [math.log(batch) for batch in batches]
    y = [math.log(point["timings"]["assignment"]["seconds"]) for point in points]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    spread = sum((value - x_mean) ** 2 for value in x)
    exponent = (
        sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread
        if spread
        else 3.0
    )
    exponent = max(exponent, 0.0)
    assignment = math.exp(y_mean - exponent * x_mean)
    found = CostModel(gain, assignment, exponent, 1.0, min(batches))
    factors = [
        found.seconds(p["batch"], p["patches"]) / p["timings"]["ours"]["seconds"] for p in points
    ]
    worst = max(max(factor, 1 / factor) for factor in factors)
    return CostModel(gain, assignment, exponent, worst, min(batches))


def _mean_log(values: Any) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def constants(model: CostModel) -> str:
    """The fitted constants."""
    rows = [
        ["a (gains), s", f"{model.gain:.2e}"],
        ["c (assignment), s", f"{model.assignment:.2e}"],
        ["p (assignment)", f"{model.exponent:.2f}"],
        ["largest factor between model and curve", f"{model.worst_factor:.2f}"],
        ["fitted from B =", f"{model.smallest}"],
    ]
    return aligned_table(("constant", "value"), rows, (1,))


def by_batch(model: CostModel, trainings: tuple[Training, ...] = TRAININGS) -> str:
    """Pairing and its share of a step for several batches of a process."""
    rows = []
    for training in trainings:
        for batch in BATCHES:
            rows.append(
                [
                    training.model,
                    f"{batch:,}",
                    f"{1e3 * model.seconds(batch, training.patches):.2f}",
                    f"{1e3 * batch / training.images_per_second:.1f}",
                    f"{100 * model.share(batch, training):.1f}%",
                ]
            )
    head = ("model", "batch of a process", "pairing (ms)", "plain step (ms)", "share")
    return aligned_table(head, rows, (1, 2, 3, 4))


def by_gpus(model: CostModel, trainings: tuple[Training, ...] = TRAININGS) -> str:
    """Pairing for several numbers of GPUs, beside what pairing over all of them would take."""
    rows = []
    for training in trainings:
        within = model.seconds(training.batch, training.patches)
        for gpus in GPUS:
            everyone = gpus * training.batch
            over_all = model.seconds(everyone, training.patches)
            rows.append(
                [
                    training.model,
                    f"{gpus:,}",
                    f"{everyone:,}",
                    f"{1e3 * within:.2f}",
                    f"{100 * model.share(training.batch, training):.1f}%",
                    f"{over_all:,.2f}" if over_all < 100 else f"{over_all:,.0f}",
                ]
            )
    head = (
        *("model", "GPUs", "global batch", "pairing in each process (ms)", "share of its step"),
        "for comparison: pairing over the global batch (s)",
    )
    return aligned_table(head, rows, (1, 2, 3, 4, 5))


def where_it_shows(model: CostModel, trainings: tuple[Training, ...] = TRAININGS) -> str:
    """From which batch on pairing takes 1%, 5% and 20% of a step."""
    shares = (SHOWS, 0.05, 0.2)
    rows = [
        [training.model, *(f"{model.shows_from(training, share):,.0f}" for share in shares)]
        for training in trainings
    ]
    head = ("model", *(f"{share:.0%} of a step from B =" for share in shares))
    return aligned_table(head, rows, (1, 2, 3))
