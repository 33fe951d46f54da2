"""Real images without a download: the handwritten digits that scikit-learn contains."""

from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1500, 1, 8, 8) and labels (1500,), then 297 of each for the test."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1)[order] / 8 - 1
    labels = torch.from_numpy(data.target).long()[order]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def batches(
    images: Tensor, labels: Tensor, epochs: int, size: int = 50
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of several epochs."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(size):
            yield images[chosen], labels[chosen]
