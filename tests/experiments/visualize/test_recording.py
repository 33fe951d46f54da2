"""What is recorded of a pass is what the model did, on every family of hosts.

Dimensions: B batch, N tokens, P prefix tokens, H heads, K kappa.
"""

import copy
import itertools

import numpy as np
import pytest
import timm
import torch

from experiments.models.build import build_model
from experiments.visualize.recording import record
from tests.helpers import oracle
from tests.helpers.cases import array
from tests.helpers.host_cases import BY_NAME, batch, every_host
from tests.helpers.naive_host import (
    attention_of,
    layers_of,
    naive_attention,
    norm_of,
    own_saliency,
    positions_of_own,
    switch_off_fused_attention,
    watched,
)
from tests.helpers.runs_helper import HTM, VTM, small_config
from tokenmixup import HorizontalConfig, VerticalConfig, attach

KAPPA = 3


@every_host
def test_saliency_and_shares_of_attention_are_those_of_the_naive_maps(case):
    """Saliency of layers 0 and 1, and where the attention of VTM layers 1 and 2 goes."""
    prefix, size = case.num_prefix_tokens, 3
    host = case.build().to(torch.float64)
    plain = switch_off_fused_attention(copy.deepcopy(host))
    images, targets = batch(case, size, torch.float64)
    model = case.attach(
        host,
        horizontal=HorizontalConfig(layers=(1,), rho=0.004, scorenet=None),
        vertical=VerticalConfig(layers=(1, 2), kappa=KAPPA),
    )
    with watched(host) as seen:
        recording = record(model, images, targets)
    assert recording.horizontal[0].mask.any()
    place = np.arange(case.patches)  # of each token, row by row
    if case.family == "timm Hiera":
        place = array(host.unroll(torch.arange(case.patches).view(1, -1, 1))).ravel().astype(int)
        assert (place != np.arange(case.patches)).any()

    remembered, places = [], []
    for index, found in enumerate(recording.vertical):
        layer = layers_of(plain)[index]
        saliency = own_saliency(layer, case, seen.tokens[index], *seen.calls[index])
        np.testing.assert_allclose(found.saliency[:, place], saliency, rtol=0, atol=1e-6)
        chosen = np.array([oracle.salient_positions(one, KAPPA) for one in saliency])
        assert np.array_equal(found.positions, place[chosen])
        places.append(prefix + chosen)
        remembered.append(seen.tokens[index][torch.arange(size)[:, None], prefix + chosen])

    assert [attention.layer for attention in recording.attention] == [1, 2] * case.vtm
    for attention in recording.attention:
        index = attention.layer
        layer, own = layers_of(plain)[index], norm_of(layers_of(plain)[index])(seen.tokens[index])
        keys = torch.cat([own, *(norm_of(layer)(tokens) for tokens in remembered[:index])], dim=1)
        positions = np.concatenate([positions_of_own(own), *places[:index]], axis=1)
        kwargs = {k: v for k, v in seen.calls[index][1].items() if k != "attention_mask"}
        _, maps = naive_attention(attention_of(layer), own, keys, positions, prefix, **kwargs)
        ends = np.cumsum([0, own.shape[1], *[KAPPA] * index])
        expected = [maps[..., a:b].sum(-1) for a, b in itertools.pairwise(ends)]
        shares = np.concatenate(
            [attention.shares[:, :, :prefix], attention.shares[:, :, prefix:][:, :, place]], axis=2
        )
        np.testing.assert_allclose(shares, np.stack(expected, axis=-1), rtol=0, atol=1e-6)
        assert expected[-1].std() > 1e-3, "a constant would prove nothing"


def small_batch(size=12):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images, torch.nn.functional.one_hot(labels, 10).float()


@pytest.mark.parametrize("labels", ["saliency", "tokens"])
def test_several_layers_carry_images_and_labels_on(labels):
    """HTM at layers 1 and 3, VTM at 2 and 4: whose token stands where, and whose label it is."""
    torch.manual_seed(1)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 5}
    host = timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)
    model = attach(
        host,
        horizontal=HorizontalConfig(layers=(1, 3), rho=0.0, scorenet=None, labels=labels),
        vertical=VerticalConfig(layers=(2, 4), kappa=KAPPA),
    )
    images, targets = small_batch()
    with torch.no_grad(), watched(host) as clean:
        model.eval()(images)
    with watched(host) as seen:
        recording = record(model, images, targets)
    assert [one.layer for one in recording.horizontal] == recording.mixed_at(4) == [1, 3]
    assert [recording.mixed_at(layer) for layer in (0, 1, 2)] == [[], [1], [1]]
    assert [one.layer for one in recording.attention] == [2, 4]

    model.training = True  # dropout off
    with torch.no_grad():
        output = model(images, targets)
    first, second = recording.horizontal
    assert np.array_equal(array(output.targets), second.targets)
    for one in recording.horizontal:
        np.testing.assert_allclose(one.parts @ array(targets), one.targets, rtol=0, atol=1e-6)
    assert (np.count_nonzero(second.parts, axis=1) > 2).any(), "a partner's own earlier partner"

    origin = torch.from_numpy(recording.origin(1))
    assert np.array_equal(recording.foreign(1), first.mask) and first.mask.any()
    given = clean.tokens[1][:, 1:][origin, torch.arange(16)]  # after the class token
    torch.testing.assert_close(seen.tokens[1][:, 1:], given)
    for sample, token in itertools.product(range(12), range(16)):
        at = second.partner[sample] if second.mask[sample, token] else sample
        assert recording.origin(3)[sample, token] == origin[at, token]


def test_stages_carry_images_on():
    """HTM at layers 1 and 2: a token of the second stage stands for four of the first."""
    case = BY_NAME["hiera"]
    host = case.build()
    htm = HorizontalConfig(layers=(1, 2), rho=1e-3, scorenet=None)
    images, targets = batch(case)
    recording = record(case.attach(host, horizontal=htm), images, targets)
    first, second = recording.horizontal
    assert first.mask.shape == (6, 64) and second.mask.shape == (6, 16)
    assert first.mask.any() and second.mask.any()
    origin = np.where(first.mask, first.partner[:, None], np.arange(6)[:, None])
    assert np.array_equal(recording.origin(1), origin)
    coarse = origin.reshape(6, 4, 2, 4, 2)[:, :, 1, :, 1].reshape(6, 16)
    expected = np.where(second.mask, coarse[second.partner], coarse)
    assert np.array_equal(recording.origin(2), expected)


@pytest.fixture
def model(tmp_path):
    rates = {"attn_drop_rate": 0.3, "drop_path_rate": 0.3}
    return build_model(small_config(tmp_path, horizontal=HTM, vertical=VTM, model=rates), 10)


def test_the_recording_is_what_the_model_did(model):
    images, targets = small_batch()
    recording = record(model, images, targets)
    horizontal, vertical = recording.horizontal[0], recording.vertical[0]
    assert (horizontal.layer, vertical.layer) == (1, 0)
    # the model's own pass, dropout off: the same targets and the same statistics
    model.eval()
    model.training = True
    with torch.no_grad():
        output = model(images, targets)
    assert np.array_equal(array(output.targets), horizontal.targets)
    stats = {name.rpartition("/")[2]: float(value) for name, value in output.stats.items()}
    assert horizontal.easy.mean() == pytest.approx(stats["easy_share"])
    assert horizontal.mask.any(1).mean() == pytest.approx(stats["mixed_share"])
    assert stats["mixed_share"] > 0
    assert horizontal.difficulty.mean() == pytest.approx(stats["difficulty_mean"])
    assert vertical.positions.shape == (12, 3)
    assert np.array_equal(vertical.positions, np.argsort(-vertical.saliency, axis=1)[:, :3])


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_model_as_it_came(model, training):
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    record(model, *small_batch())
    assert all(module.training is training for module in model.modules())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
