"""Hosts with stages: layers of several widths and grids, and what is possible in which of them.

The tests of all hosts take their first two layers; these take every stage of whole models.

Dimensions: B batch, T patch tokens, C classes.
"""

import numpy as np
import pytest
import timm
import torch
import torchvision

from tests.helpers import oracle
from tests.helpers.cases import array
from tests.helpers.host_builders import CLASSES, randomise
from tests.helpers.host_cases import BY_NAME
from tests.helpers.naive_host import (
    layers_of,
    own_saliency,
    switch_off_fused_attention,
    watched,
)
from tokenmixup import HorizontalConfig, VerticalConfig, attach
from tokenmixup.hosts import UnsupportedHostError, layer_names
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(1,), rho=0.005, scorenet=None)


class Noting(Rules):
    """The paper's, keeping the partners of HTM, and which layers remember."""

    def __init__(self):
        self.partner_at, self.chosen = {}, []

    def choose(self, layer, *args):
        self.chosen.append(layer)
        return super().choose(layer, *args)

    def decide(self, layer, *args):
        decision = super().decide(layer, *args)
        self.partner_at[layer] = decision.partner
        return decision


def test_names_of_layers():
    """By them and by an error people find out which number is which layer."""
    assert layer_names(BY_NAME["swin"].build()) == [
        "layers.0.blocks.0, 8 x 8 tokens of width 32",
        "layers.0.blocks.1, 8 x 8 tokens of width 32",
        "layers.1.blocks.0, 4 x 4 tokens of width 64",
    ]
    host = BY_NAME["swin_dynamic"].build()
    assert layer_names(host)[2] == "layers.1.blocks.0, tokens of width 64"
    assert layer_names(BY_NAME["vit"].build())[2] == "blocks.2, 16 tokens of width 32"
    wrong = r"has 3 layers, 0 to 2 \(its stages begin with 0: layers\.0\.blocks\.0, tokens of "
    with pytest.raises(ValueError, match=f"{wrong}width 32; 2: layers.1.*width 64"):
        attach(host, horizontal=HorizontalConfig(layers=(3,), rho=0.1, scorenet=None))


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("swin", 1, "own window alone"),
        ("pvt", 1, "each of its keys is made of several tokens"),
        ("hiera", 2, "own window alone"),
        ("hiera_pooling", 2, "pools its queries"),
    ],
)
def test_where_vtm_is_refused(name, layer, reason):
    case = BY_NAME[name.replace("pooling", "global")]
    host = case.build()
    if name == "hiera_pooling":
        host = timm.create_model("hiera_tiny_224", mask_unit_attn=(False,) * 4, stages=(2, 1, 1, 1))
    with pytest.raises(UnsupportedHostError, match=f"layer {layer} of {case.family}: .*{reason}"):
        attach(host, vertical=VerticalConfig(layers=(layer,), kappa=2))


def test_a_hiera_that_drops_windows():
    with pytest.raises(UnsupportedHostError, match="patch_drop_rate=0"):
        attach(timm.create_model("hiera_tiny_224", patch_drop_rate=0.1), horizontal=HTM)


def test_vtm_within_the_last_stage():
    """Layers 1 to 3 are the last stage: none of its tokens come from the stage before."""
    sizes = {"embed_dims": (16, 32), "depths": (1, 3), "num_heads": (2, 2), "sr_ratios": (2, 1)}
    host = timm.create_model("pvt_v2_b0", num_classes=CLASSES, mlp_ratios=(2, 2), **sizes)
    for layer, reason in ((0, "integers >= 1"), (1, "layer 1, the first of its stage.*1: stages")):
        with pytest.raises(ValueError, match=reason):
            attach(host, vertical=VerticalConfig(layers=(layer,), kappa=2))
    model = attach(host, vertical=VerticalConfig(layers=(2, 3), kappa=2), rules=Noting()).train()
    seen = {}
    for index, block in enumerate(layers_of(host)):

        def keep(_, args, index=index):
            seen[index] = args[0].shape

        block.attn.kv.register_forward_pre_hook(keep)
    model.backbone.set_grad_checkpointing()
    out = model(torch.randn(3, 3, 32, 32))
    assert {index: shape[1] for index, shape in seen.items()} == {0: 16, 1: 16, 2: 18, 3: 20}
    assert [float(value) for value in out.stats.values()] == [2, 4]
    assert model.rules.chosen == [1, 2]
    out.logits.sum().backward()
    assert layers_of(host)[1].norm1.weight.grad.isfinite().all()


SWIN = {"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (2, 2, 4)}
SWIN_WIDTHS = [8, 8, 16, 16, 32]
WHOLE = (
    # windows that are no squares and pad the grid; more of them than fit; one for the stage
    ("swin_tiny_patch4_window7_224", (24, 40), SWIN | {"window_size": (4, 3)}, SWIN_WIDTHS),
    (
        "swin_tiny_patch4_window7_224",
        (40, 24),
        SWIN | {"window_size": 5, "always_partition": True},
        SWIN_WIDTHS,
    ),
    ("swin_tiny_patch4_window7_224", (32, 32), SWIN | {"window_size": 16}, SWIN_WIDTHS),
    ("swinv2_tiny_window8_256", (24, 40), SWIN | {"window_size": (4, 3)}, SWIN_WIDTHS),
    (
        "pvt_v2_b0",
        (32, 64),
        {"embed_dims": (8, 16, 32), "depths": (2, 1, 1), "sr_ratios": (4, 2, 1)}
        | {"num_heads": (1, 2, 2), "mlp_ratios": (2, 2, 2)},
        [8, 8, 16, 32],
    ),
    # one window from top to bottom, which is not shifted that way
    (
        "swin_t",
        (32, 64),
        {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2]}
        | {"window_size": [8, 4]},
        [8, 8, 16, 16],
    ),
    # the last stage attends globally, and the block before it pools in windows
    (
        "hiera_tiny_224",
        (32, 64),
        {"embed_dim": 8, "stages": (1, 2, 2), "q_pool": 2, "mask_unit_size": (4, 4)}
        | {"mask_unit_attn": (True, True, False)},
        [8, 8, 16, 16, 32],
    ),
)


@pytest.mark.parametrize(("name", "size", "settings", "widths"), WHOLE)
def test_every_layer_mixes_by_the_map_of_the_whole_image(name, size, settings, widths):
    """HTM everywhere: tokens, targets and saliency of each layer against the slow computation."""
    if name == "swin_t":
        host = torchvision.models.SwinTransformer(num_classes=CLASSES, **settings)
    else:
        image = {} if name.startswith("pvt") else {"img_size": size}  # takes any
        host = timm.create_model(name, num_classes=CLASSES, **image, **settings)
    randomise(host)
    host.double()
    rho, layers = 1e-3, tuple(range(len(widths)))
    htm = HorizontalConfig(layers=layers, rho=rho, scorenet="average", tau=9)
    model = attach(host, horizontal=htm, rules=Noting())
    assert [model.scorenets[str(i)].head.in_features for i in layers] == widths
    images = torch.randn(4, 3, *size, dtype=torch.float64)
    targets = torch.randn(4, CLASSES, dtype=torch.float64).softmax(-1)
    entering = {}
    for index, layer in enumerate(layers_of(host)):  # before TokenMixup's own hooks

        def keep(_, args, index=index):
            entering[index] = (args[0].detach().clone(), *args[1:])

        layer.register_forward_pre_hook(keep, prepend=True)
    with watched(host) as seen:
        out = model.train()(images, targets)

    switch_off_fused_attention(host)
    expected = array(targets)
    for index, layer in enumerate(layers_of(host)):
        tokens = entering[index][0].flatten(1, -2)
        saliency = own_saliency(layer, BY_NAME["swin"], tokens, entering[index], {})
        partner = model.rules.partner_at[index]  # several may be as good
        mixed = oracle.horizontal_mixup(
            array(tokens), expected, saliency, [True] * 4, rho, partner=partner
        )
        assert 0 < mixed.mask.sum() < mixed.mask.size
        np.testing.assert_allclose(array(seen.tokens[index]), mixed.tokens, atol=1e-9)
        expected = mixed.targets
    np.testing.assert_allclose(array(out.targets), expected, atol=1e-7)


@pytest.mark.parametrize(
    "name", ["swin_dynamic", "swin_v2_dynamic", "pvt", "pvt_linear", "torchvision_swin"]
)
def test_images_of_other_sizes(name):
    """A step of each; no sample loses or gains probability."""
    case = BY_NAME[name]
    htm = HorizontalConfig(layers=(0, 1, 2), rho=1e-3, tau=9)
    model = case.attach(case.build(), horizontal=htm)
    for side in (32, 48, 20):
        out = model.train()(torch.randn(3, 3, side, side + 4), torch.arange(3))
        out.loss().backward()
        assert out.stats["htm/layer2/mixed_share"] > 0
        torch.testing.assert_close(out.targets.sum(1), torch.ones(3))
