"""Transforms, Mixup and CutMix, label smoothing."""

import numpy as np
import torch
from PIL import Image

from experiments.config import DataConfig, MixupConfig
from experiments.data.augment import BatchMixer, eval_transform


def test_evaluation_transform_normalises_the_image():
    config = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    expected = (np.asarray(image).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    actual = eval_transform(config, 32)(image).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_mixup_is_a_function_of_the_step():
    mixer = BatchMixer(MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1), 10, 7)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    before = np.random.get_state()[1].copy()
    runs = [mixer(images.clone(), labels, 0, step, 0) for step in (0, 0, 1, 2, 3)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not any(torch.equal(runs[0][0], run[0]) for run in runs[2:])
    assert np.array_equal(np.random.get_state()[1], before)
    for mixed, targets in runs:
        assert mixed.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_label_smoothing_without_mixup():
    images, targets = BatchMixer(MixupConfig(label_smoothing=0.2), 4, 0)(
        torch.zeros(2, 3, 4, 4), torch.tensor([1, 3]), 0, 0, 0
    )
    assert torch.equal(images, torch.zeros(2, 3, 4, 4))
    expected = torch.full((2, 4), 0.05)
    expected[0, 1] = expected[1, 3] = 0.85
    torch.testing.assert_close(targets, expected)
