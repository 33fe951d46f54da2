"""For all tests of the benchmarks: what a step trains on stays as it is."""

import pytest
import torch

from benchmarks.steps import Steps


@pytest.fixture
def unchanged_images(monkeypatch):
    """Look at the images of all steps again, after the test.

    timm's Mixup writes into the images it is given. Given its own again and again, it makes each
    image the mean of itself and of its partner: pairing would be timed on duplicates.
    """
    made, init = [], Steps.__init__

    def remembered(self, *words, **options):
        init(self, *words, **options)
        made.append((self, self.images.clone()))

    monkeypatch.setattr(Steps, "__init__", remembered)
    yield
    for step, images in made:
        assert torch.equal(step.images, images)
