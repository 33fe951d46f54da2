"""Every model that timm registers under a supported class, built without memory for its weights."""

import math

import pytest
import timm
import torch
from timm.models import _registry

from tokenmixup.hosts import UnsupportedHostError, find_adapter

MODULES = (
    *("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin", "eva", "beit"),
    *("swin_transformer", "swin_transformer_v2", "pvt_v2", "hiera", "mvitv2"),
)
FAMILIES = {
    "VisionTransformer": "timm VisionTransformer",
    "VisionTransformerDistilled": "timm VisionTransformer",
    "Eva": "timm Eva",
    "Beit": "timm Beit",
    "SwinTransformer": "timm SwinTransformer",
    "SwinTransformerV2": "timm SwinTransformerV2",
    "PyramidVisionTransformerV2": "timm PyramidVisionTransformerV2",
    "Hiera": "timm Hiera",
    "MultiScaleVit": "timm MultiScaleVit",
}
# Parallel branches and differential attention, in timm 1.0.31.
REFUSED = {
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_xp_224",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_huge_patch14_xp_224",
    "vit_large_patch14_xp_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
}


def check_layouts(adapter, host):
    """Of a host with stages against the tokens that enter its layers."""
    if hasattr(host, "embed_dim") and isinstance(host.embed_dim, int):
        assert adapter.layout(host).width == host.embed_dim
    if hasattr(host, "num_prefix_tokens"):
        assert adapter.layout(host).num_prefix_tokens == host.num_prefix_tokens
    if len({layout.stage for layout in adapter.layouts(host)}) == 1:
        return
    layers = adapter.layers(host)
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(adapter.tokens(args, kwargs).shape),
            with_kwargs=True,
        )
    with torch.no_grad(), torch.device("meta"):
        host.eval()(torch.empty(1, *host.pretrained_cfg["input_size"]))
    grids, layouts = [], adapter.layouts(host)
    for shape, layout in zip(seen, layouts, strict=True):
        assert shape[2] == layout.width
        patches = shape[1] - layout.num_prefix_tokens
        assert layout.num_patch_tokens in (None, patches)
        assert layout.grid is None or math.prod(layout.grid) == patches
        grids.append((layout.stage, shape))
    stages = sorted(dict(grids))
    assert len(stages) == len(set(grids)), "as many shapes as stages"


@pytest.mark.slow
def test_every_timm_model_of_a_supported_class():
    names = [n for n in timm.list_models() if _registry._model_to_module[n] in MODULES]
    assert len(names) > 250
    refused, unknown = {}, []
    for name in names:
        with torch.device("meta"):
            host = timm.create_model(name)
        family = FAMILIES.get(type(host).__name__)
        try:
            adapter = find_adapter(host)
        except UnsupportedHostError as error:
            refused[name] = str(error)
            continue
        if adapter.family != family:
            unknown.append(name)
        check_layouts(adapter, host)
    assert not unknown
    assert refused.keys() == REFUSED, refused
    print(f"{len(names) - len(refused)} of {len(names)} models")
    assert all("this variant of the host" in message for message in refused.values())
