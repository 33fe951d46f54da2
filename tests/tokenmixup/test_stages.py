"""Hosts with stages: layers of several widths and grids, and what is possible in which of them.

The tests of all hosts take their first two layers; these take every stage of whole models.

Dimensions: B batch, T patch tokens, C classes.
"""

import numpy as np
import pytest
import timm
import torch

from tests.helpers import oracle
from tests.helpers.cases import array
from tests.helpers.host_cases import BY_NAME, CLASSES, randomise
from tests.helpers.naive_host import (
    explicit_map,
    layers_of,
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


def test_windows_have_no_vtm():
    case = BY_NAME["swin"]
    with pytest.raises(UnsupportedHostError, match=r"layer 1 of timm SwinT.* own window alone"):
        attach(case.build(), vertical=VerticalConfig(layers=(1,), kappa=2))


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


def test_pooled_keys_have_no_vtm():
    case = BY_NAME["pvt"]
    with pytest.raises(UnsupportedHostError, match=r"layer 1 of timm Pyr.*of several tokens"):
        attach(case.build(), vertical=VerticalConfig(layers=(1,), kappa=2))


SIZES = {
    "swin_tiny_patch4_window7_224": [
        # windows that are no squares, and more of them than fit; then one window for the stage
        {"img_size": (24, 40), "window_size": (4, 3)},
        {"img_size": (40, 24), "window_size": 5, "always_partition": True},
        {"img_size": 32, "window_size": 16},
    ],
    "swinv2_tiny_window8_256": [{"img_size": (24, 40), "window_size": (4, 3)}],
}


@pytest.mark.parametrize(
    ("model", "sizes"), [(model, sizes) for model, each in SIZES.items() for sizes in each]
)
def test_every_layer_mixes_by_the_map_of_the_whole_image(model, sizes):
    """HTM everywhere: tokens, targets and saliency of each layer against the slow computation."""
    narrow = {"embed_dim": 8, "depths": (2, 2, 1), "num_heads": (2, 2, 4)}
    host = timm.create_model(model, num_classes=CLASSES, **sizes, **narrow)
    randomise(host)
    host.double()
    rho = 1e-3
    layers = tuple(range(5))
    htm = HorizontalConfig(layers=layers, rho=rho, scorenet="average", tau=9)
    model = attach(host, horizontal=htm, rules=Noting())
    assert [model.scorenets[str(i)].head.in_features for i in layers] == [8, 8, 16, 16, 32]
    rows, columns = host.patch_embed.img_size
    images = torch.randn(4, 3, rows, columns, dtype=torch.float64)
    targets = torch.randn(4, CLASSES, dtype=torch.float64).softmax(-1)
    entering = {}
    for index, layer in enumerate(layers_of(host)):  # before TokenMixup's own hooks

        def keep(_, args, index=index):
            entering[index] = args[0].detach().clone()

        layer.register_forward_pre_hook(keep, prepend=True)
    with watched(host) as seen:
        out = model.train()(images, targets)

    switch_off_fused_attention(host)
    expected = array(targets)
    for index, layer in enumerate(layers_of(host)):
        grid = entering[index]
        tokens = grid.flatten(1, 2)
        saliency = explicit_map(layer, tokens, (grid,), {}).mean((1, 2))
        partner = model.rules.partner_at[index]  # several may be as good
        mixed = oracle.horizontal_mixup(
            array(tokens), expected, saliency, [True] * 4, rho, partner=partner
        )
        assert 0 < mixed.mask.sum() < mixed.mask.size
        np.testing.assert_allclose(array(seen.tokens[index]), mixed.tokens, atol=1e-9)
        expected = mixed.targets
    np.testing.assert_allclose(array(out.targets), expected, atol=1e-7)


@pytest.mark.parametrize("name", ["swin_dynamic", "swin_v2_dynamic", "pvt", "pvt_linear"])
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
