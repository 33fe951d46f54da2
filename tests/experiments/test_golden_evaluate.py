"""The golden arrays through `experiments.evaluate`'s own path: config, checkpoint file, model."""

import argparse

import numpy as np
import pytest
import torch

from experiments.training.distributed import ONE_PROCESS
from experiments.training.evaluation import Assessment
from tests.helpers.runs_helper import small_config

CCT = {
    "model": {"name": "cct_2_3x2_32", "image_size": 32, "kwargs": {}},
    "horizontal": {"layers": [0], "tau": 0.1, "rho": 0.003},
    "vertical": {"layers": [1], "kappa": 3},
}
VIT = {
    "model": {
        "name": "vit_base_patch16_224",
        "image_size": 64,
        "kwargs": {"embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2},
    },
    "horizontal": {"layers": [1], "tau": 0.1, "rho": 0.003, "scorenet": "cls"},
    "vertical": {"layers": [2], "kappa": 3},
}


@pytest.mark.parametrize(
    "sections, arrays, file",
    [(CCT, "cct_2_3x2_32_eval", "cct.pth.tar"), (VIT, "vit_tiny_eval", "VIT.bin")],
)
@pytest.mark.parametrize("tokenmixup", [True, False], ids=["as trained", "plain"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_released_checkpoints_evaluate_to_the_golden_logits(
    tmp_path, data_folder, sections, arrays, file, tokenmixup, legacy
):
    golden = np.load(data_folder / f"{arrays}.npz", allow_pickle=False)
    state = {n.removeprefix("sd/"): torch.from_numpy(golden[n]) for n in golden if "sd/" in n}
    # timm's old saver: the state dict beside a pickled namespace; the ViT's: a bare state dict
    timms = {"epoch": 1, "state_dict": state, "args": argparse.Namespace(lr=0.1), "metric": 97.0}
    content = timms if file.endswith(".tar") else state
    torch.save(content, tmp_path / file, _use_new_zipfile_serialization=not legacy)
    if not tokenmixup:
        sections = {"model": sections["model"]}
    config = small_config(tmp_path, **sections)
    assessment = Assessment(config, str(tmp_path / file), ONE_PROCESS)
    logits = assessment.model.eval()(torch.from_numpy(golden["x"]))
    np.testing.assert_allclose(logits.detach().numpy(), golden["eval_logits"], rtol=1e-4, atol=1e-5)
    scorenets = sorted(name for name in state if "small_h" in name or "scorenet" in name)
    assert scorenets and sorted(assessment.loaded.unused) == ([] if tokenmixup else scorenets)
    assert assessment.loaded.left_out == ()
    assert assessment.evaluate().images == 355
