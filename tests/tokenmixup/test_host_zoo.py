"""Every model that timm registers under a supported class, built without memory for its weights."""

import pytest
import timm
import torch
from timm.models import _registry

from tokenmixup.hosts import UnsupportedHostError, find_adapter

MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin", "eva", "beit")
FAMILIES = {
    "VisionTransformer": "timm VisionTransformer",
    "VisionTransformerDistilled": "timm VisionTransformer",
    "Eva": "timm Eva",
    "Beit": "timm Beit",
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
        layout = adapter.layout(host)
        assert layout.width == host.embed_dim
        assert layout.num_prefix_tokens == host.num_prefix_tokens
    assert not unknown
    assert refused.keys() == REFUSED, refused
    print(f"{len(names) - len(refused)} of {len(names)} models")
    assert all("this variant of the host" in message for message in refused.values())
