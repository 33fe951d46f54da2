"""What tests of batches share: augmentation that draws much, images that cannot be read."""

import torch

AUGMENTED = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "random",
    "hflip": 0.5,
}


class Damaged:
    """Ten images, each its own number, of which some cannot be read."""

    def __init__(self, *bad):
        self.bad = bad

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.bad:
            raise OSError("broken")
        return torch.tensor(index), 0

    def describe(self, index):
        return f"image {index}"


def same(first, second):
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)
