"""The models that are measured on a GPU, with their targets."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.pipeline import JpegPhotographs, PhotographPieces
from benchmarks.steps import FAMILIES, Workload


@dataclass(frozen=True)
class Model:
    """What is measured of a model, and its targets."""

    name: str  # a key of `FAMILIES`
    quick_batch: int
    gflop: float
    """Per image of a training step: forward, and twice that backward."""
    images_per_second: int
    over_plain: float
    images: Callable[[int], Any]
    """Of the loader, by their number."""

    def workload(self, mode: str, quick: bool) -> Workload:
        """Its training steps."""
        batch = self.quick_batch if quick else FAMILIES[self.name].gpu_batch
        return Workload(self.name, batch, "bf16", mode, quick)


MODELS = {
    "cct": Model("CCT-7/3×1", 4, 7.1, 20_000, 1.08, PhotographPieces),
    # enough images that activations, not gradients, set the peak memory of a smoke run's step
    "vit": Model("ViT-B/16", 32, 105.0, 2_400, 1.03, JpegPhotographs),
}
