"""The table of trainers says what tests run."""

import pytest
import torch

from tests.helpers.others_warnings import advice_of_lightning
from tests.helpers.trainers_table import TRAINERS, VARIANTS, functions


@advice_of_lightning
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_each_variant_trains(trainer, variant):
    torch.manual_seed(0)
    model = trainer.model(variant)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.step(model)
    learned = {
        name.partition(".")[0]
        for name, value in model.state_dict().items()
        # peft's names: its copy of a ScoreNet, and the half of an adapter that begins with zeros
        for was in [before.get(name.replace("modules_to_save.default.", ""))]
        if (value.any() if "lora_B" in name else was is not None and not torch.equal(value, was))
    }
    assert learned == {"backbone", *(["scorenets"] if "horizontal" in VARIANTS[variant] else [])}


@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.name)
def test_each_feature_has_its_test(trainer):
    for feature, test in trainer.features.items():
        file, _, name = test.partition("::")
        assert name in functions(file), feature
