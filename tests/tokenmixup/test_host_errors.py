"""Hosts and settings that are refused, and what the refusal says."""

import importlib.metadata

import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from torch import nn

from tests.helpers.host_cases import BY_NAME, batch
from tokenmixup import HorizontalConfig, VerticalConfig, attach, hosts
from tokenmixup.hosts import (
    HostAdapter,
    UnsupportedHostError,
    base,
    find_adapter,
    register_adapter,
)
from tokenmixup.hosts.timm_vit import TimmViT

HTM = HorizontalConfig(layers=(1,), rho=0.005, scorenet=None)
VTM = VerticalConfig(layers=(2,), kappa=3)
vit = BY_NAME["vit"].build


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("xcit_nano_12_p16_224", num_classes=3),
        lambda: timm.create_model("resnet18", num_classes=3),
        lambda: timm.create_model("naflexvit_base_patch16_gap", num_classes=3),
        torchvision.models.resnet18,
        nn.Identity,
    ],
)
def test_a_host_of_another_class(build):
    """The class, what to do, what a host needs, what is supported: in this order, in one line."""
    with torch.device("meta"):
        host = build()
    with pytest.raises(UnsupportedHostError) as caught:
        attach(host, horizontal=HTM)
    caught.match(
        f"^{base.class_name(type(host))} is no supported host: register an adapter with "
        ".*register_adapter.*HorizontalTokenMixupLayer.*A host needs layers with one attention "
        ".*Supported: timm VisionTransformer, Eva, Beit, Swin.*; torchvision VisionTransformer, Sw"
        ".*; tr"
    )


def test_wrapped_models_are_told_the_right_order():
    with pytest.raises(
        UnsupportedHostError, match=r"host: attach TokenMixup to the timm\S+ inside"
    ):
        attach(torch.compile(vit(), backend="eager"))


# Variants of supported classes


@pytest.mark.parametrize("model", ["vit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_hosts_that_drop_patches(model):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    host = timm.create_model(model, patch_drop_rate=0.2, **settings)
    with pytest.raises(UnsupportedHostError, match=r"patch_drop_rate=0.*tokens of one place"):
        attach(host)


@pytest.mark.parametrize(
    "model, part",
    [
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_base_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
    ],
)
def test_blocks_without_a_single_attention_map(model, part):
    with pytest.raises(UnsupportedHostError, match=rf"`blocks\[0\].*{part}: this variant"):
        attach(timm.create_model(model, depth=1))


@pytest.mark.parametrize("settings", [{}, {"vertical": VerticalConfig(layers=(1,), kappa=3)}])
def test_a_host_without_layers(settings):
    with pytest.raises(UnsupportedHostError, match="has no encoder layers"):
        attach(timm.create_model("vit_tiny_patch16_224", depth=0), **settings)


def test_distilled_training():
    case = BY_NAME["deit_distilled"]
    host = case.build()
    model = attach(host, horizontal=HTM).train()
    host.set_distilled_training(True)
    with pytest.raises(ValueError, match=r"set_distilled_training\(False\)"):
        model(*batch(case))
    host.set_distilled_training(False)
    model(*batch(case))


@pytest.mark.parametrize("settings", [{"horizontal": HTM}, {"vertical": VTM}], ids=["HTM", "VTM"])
@pytest.mark.parametrize(
    "name, call",
    [
        ("vit", {"attn_mask": torch.zeros(17, 17)}),
        ("vit", {"is_causal": True}),
        ("eva02", {"attn_mask": torch.zeros(17, 17)}),
        ("eva02", {"is_causal": True}),
        ("hf_vit", {"attention_mask": torch.tensor([[True] * 16 + [False]]).expand(6, -1)}),
    ],
)
def test_masks_are_refused_in_training(name, call, settings):
    case = BY_NAME[name]
    host = case.build()
    if name == "hf_vit" and Version(importlib.metadata.version("transformers")) < Version("5.9"):
        pytest.skip("the host takes any argument, and its layers get no mask")
    inner = host.forward
    model = attach(host, **settings)
    host.forward = lambda images: inner(images, **call)
    images, targets = batch(case)
    with pytest.raises(ValueError, match=f"with `{next(iter(call))}`"):
        model.train()(images, targets)
    model.eval()(images)


def test_attention_implementations_of_transformers():
    host = BY_NAME["hf_vit"].build()
    host.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedHostError, match=r"eager, sdpa.*flex_attention"):
        attach(host)


# Versions of a host's library that TokenMixup does not know


def test_an_attribute_that_a_new_version_has_not():
    host = vit()
    for block in host.blocks:
        del block.attn.q_norm
    with pytest.raises(UnsupportedHostError, match=r"`blocks\[0\].attn`.* lacks q_norm"):
        attach(host)
    host = vit()
    del host.patch_drop
    with pytest.raises(UnsupportedHostError, match=r"not the installed version.*patch_drop"):
        attach(host)


def test_an_argument_that_a_new_version_has(monkeypatch):
    kind = type(vit().blocks[0])

    def forward(self, x, attn_mask=None, is_causal=False, attn_bias=None):
        return x

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(UnsupportedHostError, match=r"`blocks\[0\]`.* is called with attn_bias"):
        attach(vit())


def test_another_class_in_a_place_of_the_host():
    host = BY_NAME["torchvision"].build()
    host.encoder.layers[1] = nn.TransformerEncoderLayer(32, 2, batch_first=True)
    with pytest.raises(UnsupportedHostError, match=r"`encoder.layers\[1\]` being a torchvision"):
        attach(host)


def test_an_attention_that_is_set_up_otherwise():
    host = BY_NAME["torchvision"].build()
    for layer in host.encoder.layers:
        layer.self_attention.batch_first = False
    with pytest.raises(UnsupportedHostError, match=r"self_attention.batch_first` being True"):
        attach(host)
    host = BY_NAME["vit"].build()
    host.blocks[1].attn.qkv = nn.Linear(32, 3 * 32 + 1)
    with pytest.raises(UnsupportedHostError, match=r"`blocks\[1\].attn.qkv` giving queries"):
        attach(host)


@pytest.mark.parametrize(
    "settings, missing",
    [({"horizontal": HTM}, r"HTM was .* layer\(s\) 1:"), ({"vertical": VTM}, r"VTM was .* 2:")],
    ids=["HTM", "VTM"],
)
def test_a_host_that_leaves_a_layer_out(settings, missing):
    case = BY_NAME["vit"]
    host = case.build()
    model = attach(host, **settings).train()
    host.forward_features = lambda images, **_: host.blocks[0](
        host._pos_embed(host.patch_embed(images))
    )
    with pytest.raises(RuntimeError, match=missing):
        model(*batch(case))


def test_a_host_that_drops_tokens_on_the_way():
    """As those that prune: the n-th tokens of two images would come from different places."""
    for name in ("vit", "dynamic_size"):  # T known, and T of the image
        case = BY_NAME[name]
        host = case.build()
        host.blocks[0].register_forward_hook(lambda _, args, output: output[:, :9])
        model = attach(host, vertical=VerticalConfig(layers=(2,), kappa=3)).train()
        with pytest.raises(ValueError, match=r"layer 1 was called with 9 tokens instead of 17"):
            model(*batch(case))


def test_layers_that_run_more_than_once():
    host = vit()
    host.blocks[2] = host.blocks[1]
    with pytest.raises(UnsupportedHostError, match="3 layers are 2 modules"):
        attach(host, horizontal=HTM)
    assert attach(host).backbone is host  # the plain host may


def test_data_parallel_is_refused_before_and_after():
    with pytest.raises(UnsupportedHostError, match="use DistributedDataParallel"):
        attach(nn.DataParallel(vit()))
    case = BY_NAME["vit"]
    model = attach(case.build(), horizontal=HTM).train()
    replica = model._replicate_for_data_parallel()  # as DataParallel makes one for each device
    with pytest.raises(RuntimeError, match="DataParallel, whose replicas share hooks"):
        replica(*batch(case))


def test_layers_that_run_without_gradients():
    case = BY_NAME["vit"]
    host = case.build()
    layer = host.blocks[0]
    layer.forward = torch.no_grad()(layer.forward)
    host.blocks[1].forward = torch.no_grad()(host.blocks[1].forward)
    model = attach(host, horizontal=HTM).train()
    model(*batch(case))  # the hook of layer 1 itself has gradients
    host.forward_features = torch.no_grad()(host.forward_features)
    with pytest.raises(RuntimeError, match=r"freeze them by requires_grad_\(False\) instead"):
        model(*batch(case))


# Settings that do not fit


def test_kappa_is_checked_at_attach_or_at_the_first_step():
    too_many = VerticalConfig(layers=(2,), kappa=17)
    with pytest.raises(ValueError, match=r"kappa is 17.* 16 patch tokens"):
        attach(vit(), vertical=too_many)
    for name in ("dynamic_size", "dinov3", "hf_dinov2"):
        case = BY_NAME[name]
        model = attach(case.build(), vertical=too_many).train()
        images, _ = batch(case)
        with pytest.raises(ValueError, match=r"1\.\.T = 16, got 17"):
            model(images)
        model(torch.randn(2, 3, 40, 40))  # 25 patches


def test_cls_pooling_without_a_class_token():
    horizontal = HorizontalConfig(layers=(1,), tau=0.1, rho=0.1, scorenet="cls")
    for name in ("registers", "siglip", "perception_encoder", "cct"):
        with pytest.raises(ValueError, match="reads the class token, and this model has none"):
            attach(BY_NAME[name].build(), horizontal=horizontal)


def test_num_classes_comes_from_the_classifier_that_is_there():
    horizontal = HorizontalConfig(layers=(1,), tau=0.1, rho=0.1)
    for name, replace in (
        ("vit", lambda host: setattr(host, "head", nn.Linear(32, 9))),
        ("torchvision", lambda host: host.heads.__setitem__(0, nn.Linear(32, 9))),
        ("torchvision", lambda host: setattr(host, "heads", nn.Linear(32, 9))),
        ("hf_vit", lambda host: setattr(host, "classifier", nn.Linear(32, 9))),
        ("vit", lambda host: setattr(host, "head", nn.Sequential(nn.Dropout(), nn.Linear(32, 9)))),
    ):
        host = BY_NAME[name].build()
        replace(host)
        assert attach(host, horizontal=horizontal).num_classes == 9
    parts = (("vit", "head"), ("hf_vit", "classifier"), ("beit", "head"), ("torchvision", "heads"))
    for name, part in parts:
        host = BY_NAME[name].build()
        setattr(host, part, nn.Identity())
        with pytest.raises(ValueError, match="pass num_classes to attach"):
            attach(host, horizontal=horizontal)
        assert attach(host, horizontal=horizontal, num_classes=4).num_classes == 4


def test_what_an_adapter_lacks_is_told():
    """Each default of the interface says which method a host of another form needs."""

    class Mine(TimmViT):
        tokens, with_memory = HostAdapter.tokens, HostAdapter.with_memory
        own_tokens, logits = HostAdapter.own_tokens, HostAdapter.logits

    adapter, tokens = Mine(), torch.zeros(1, 5, 3)
    remembered = base.Remembered(tokens, (torch.zeros(1, 5),))
    layer, keywords = nn.Linear(3, 3), {"hidden_states": tokens}
    for call, message in (
        (lambda: adapter.tokens((), keywords), "a layer is called with key.*`tokens` and `with_t"),
        (
            lambda: adapter.with_memory(layer, remembered, (), keywords),
            "an attention is called with keywords alone: the adapter Mine needs a `with_memory`",
        ),
        (
            lambda: adapter.own_tokens(layer, remembered, (tokens, None), (), {}),
            "an attention returns a tuple: .* needs a `own_tokens`",
        ),
        (lambda: adapter.logits({"logits": tokens}), "the host returns a dict: .* `logits`"),
    ):
        with pytest.raises(UnsupportedHostError, match=message):
            call()


class MyViT(timm.models.vision_transformer.VisionTransformer):
    pass


def test_the_adapter_of_the_nearest_class_is_used(monkeypatch):
    """Of a subclass that has none, that of its base; and a class can be registered anew."""
    monkeypatch.setattr("tokenmixup.hosts._adapters", list(hosts._adapters))
    host = MyViT(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    assert find_adapter(host).family == "timm VisionTransformer"
    for family in ("mine", "mine, of the cell run again"):

        class Mine(TimmViT):
            host_classes = (base.class_name(MyViT),)

        Mine.family = family
        register_adapter(Mine())
        assert find_adapter(host).family == family
    assert find_adapter(vit()).family == "timm VisionTransformer"


def test_an_adapter_that_promises_other_tokens_than_the_host_has():
    case = BY_NAME["vit"]
    host = case.build()
    host.embed_dim = 33
    for settings in ({"horizontal": HTM}, {"vertical": VTM}):
        model = attach(host, **settings).train()
        with pytest.raises(ValueError, match=r"\(6, 17, 32\).*promises \(B, N, 33\)"):
            model(*batch(case))
        model.detach()
