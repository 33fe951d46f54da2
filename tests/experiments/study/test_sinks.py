"""Where saliency lies in a model's layers, beside the map that HTM sees and figures by hand."""

import pytest
import timm
import torch

from experiments.study.sinks import layer_saliencies, sink_statistics
from tokenmixup import HorizontalConfig, attach
from tokenmixup.rules import Rules


def test_sink_statistics_by_hand():
    saliency = torch.full((4, 9), 0.05)
    saliency[0, 4] = saliency[1, 0] = saliency[2, 0] = saliency[3, 5] = 0.6  # 4: the middle
    found = sink_statistics(saliency)
    assert found["largest_share"] == pytest.approx(0.6)
    assert (found["same_place_share"], found["border_share"]) == (0.5, 0.75)
    inner = torch.zeros(2, 16)
    inner[0, 5] = inner[1, 10] = 1.0
    assert sink_statistics(inner)["border_share"] == 0


@pytest.mark.parametrize("registers", [0, 4])
def test_saliency_is_what_htm_sees(registers):
    class Noting(Rules):
        def saliency(self, layer, saliency):
            seen.append(saliency)
            return saliency

    def model(**settings):
        torch.manual_seed(0)
        arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2}
        name = "vit_tiny_patch16_224"
        host = timm.create_model(name, num_classes=5, reg_tokens=registers, **arguments)
        return attach(host, **settings)

    seen = []
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    found = layer_saliencies(model().eval(), images)
    # no difference is above rho, so that nothing is mixed
    htm = HorizontalConfig(layers=(0, 1, 2, 3), rho=1.0, scorenet=None)
    model(horizontal=htm, rules=Noting()).train()(images, torch.tensor([0, 1, 2]))
    assert len(found) == len(seen) == 4
    for ours, theirs in zip(found, seen, strict=True):
        assert ours.shape == (3, 16)
        torch.testing.assert_close(ours, theirs)
