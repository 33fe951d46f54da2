"""Whether labels agree with what a judge sees in the mixed picture: a judge that counts pixels."""

import pytest
import torch
from torch import nn

from experiments.errors import ConfigError
from experiments.study import __main__ as study
from experiments.study import labels
from experiments.study.labels import agreement, at_random_places, mixed_pixels
from experiments.study.records import label_records
from tests.helpers.runs_helper import write_config
from tests.helpers.study_helper import TINY, write_study
from tests.helpers.variant_vit import vit
from tokenmixup.functional import MixingDecision


class Counting(nn.Module):
    """Images of class c are c in all pixels: the share of each class is that of its pixels."""

    def forward(self, images):
        return torch.stack([(images[:, 0] == c).float().mean((1, 2)) for c in range(5)], 1).log()


def test_squares_of_pixels_move_with_their_tokens():
    images = torch.arange(2).float().view(2, 1, 1, 1).expand(2, 3, 4, 4)
    mask = torch.tensor([[True, False, False, True], [False] * 4])
    mixed = mixed_pixels(images, MixingDecision(torch.tensor([1, 1]), mask))
    assert mixed[0, 2].tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    assert torch.equal(mixed[1], images[1])


def test_a_judge_that_counts_pixels_agrees_with_the_number_of_tokens():
    torch.manual_seed(0)
    model = vit(horizontal=None, vertical=None).eval()
    images, targets = 5 * torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 4, 1])
    images[:, 0] = targets.view(6, 1, 1).float()  # the judge looks at the first channel
    found = agreement(model, Counting(), [(images, targets)] * 2, 5, rho=0.0)
    assert found.pairs >= 8 and 0 < found.tokens < 16
    assert found.gap_by_tokens == pytest.approx(0, abs=1e-6)
    assert found.share_seen == pytest.approx(found.share_by_tokens, abs=1e-6)
    assert found.share_seen_random == pytest.approx(found.share_by_tokens, abs=1e-6)
    assert found.share_by_tokens == pytest.approx(found.tokens / 16)
    assert found.gap > 0, "labels by saliency say something else"


def test_random_places_keep_the_partner_and_the_number_of_tokens():
    mask = torch.rand(64, 16, generator=torch.Generator().manual_seed(1)) < 0.3
    decision = MixingDecision(torch.arange(64).roll(1), mask)
    moved = at_random_places(decision, torch.Generator().manual_seed(0))
    assert torch.equal(moved.partner, decision.partner)
    assert torch.equal(moved.mask.sum(1), mask.sum(1))
    assert not torch.equal(moved.mask, mask)
    taken = moved.mask.double().mean(0)  # of each place; the mean is 0.3, its deviation 0.06
    assert taken.amin() > 0.1 and taken.amax() < 0.5, "no place is preferred"


def test_each_finished_training_is_judged_once(tmp_path, monkeypatch, capsys):
    config = str(write_config(tmp_path, "base", data=TINY["data"], schedule={"epochs": 1}))
    path = write_study(tmp_path, config=config, test_split="validation")
    monkeypatch.setattr(labels, "IMAGES", 256)
    monkeypatch.setattr(labels, "RHO_TIMES_TOKENS", (0.0, 9.0))
    words = ["--study", str(path), "--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    for name in ("plain/1", "HTM/1"):
        study.main([*words, "--run", name])
    judge = ["--judge", str(tmp_path / "runs" / "tiny" / "plain" / "seed1")]
    for count in (2, 0):
        study.main([*words, *judge])
        assert f"labels of {count} trainings judged" in capsys.readouterr().out
    found = label_records(tmp_path, "tiny").read()
    assert [(r.variant, r.rho) for r in found] == [
        *(("plain", 0.0), ("plain", 0.5625)),
        *(("HTM", 0.0), ("HTM", 0.5625)),
    ]
    assert 0 < found[0].agreement["tokens"] < 16 and found[0].agreement["pairs"] > 100
    assert found[1].agreement == {**dict.fromkeys(found[0].agreement), "pairs": 0}, (
        "none so salient"
    )
    study.main([*words[:2], "--results", str(tmp_path), "--report"])
    page = (tmp_path / "studies" / "tiny" / "README.md").read_text()
    assert f"| HTM     |      0 |    {found[2].agreement['tokens']:.1f} |" in page
    assert "| HTM     | 0.5625 |      – |" in page
    assert "(labels.svg)" in page and (tmp_path / "studies" / "tiny" / "labels.svg").stat().st_size
    with pytest.raises(ConfigError, match="test_split: missing"):
        study.main(["--study", str(write_study(tmp_path, "other")), *words[2:], *judge])
