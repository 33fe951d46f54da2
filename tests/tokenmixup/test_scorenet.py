"""ScoreNet against the oracle, its initialisation and its settings."""

import numpy as np
import pytest
import torch

from tests.helpers import oracle
from tests.helpers.cases import array
from tokenmixup.config import SCORENET_TYPES
from tokenmixup.scorenet import ScoreNet


@pytest.mark.parametrize("pooling", SCORENET_TYPES)
def test_logits_are_the_oracles(pooling):
    net, tokens = ScoreNet(6, 5, pooling, 2, True).double(), torch.randn(3, 9, 6).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    attention = pooling == "attention"
    assert len(list(net.parameters())) == (4 if attention else 2)
    pool = (array(net.pool.weight)[0], net.pool.bias.item()) if attention else ()
    reference = oracle.ScoreNet(pooling, array(net.head.weight), array(net.head.bias), *pool)
    np.testing.assert_allclose(array(net(tokens)), reference.logits(array(tokens), 2), rtol=1e-9)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_initialisation_and_name(device):
    """As the paper's: a truncated normal distribution of 0.02, biases 0."""
    with torch.device(device):
        net = ScoreNet(2000, 7, "attention", 0, False)
    if device == "meta":  # as large models are made
        net.to_empty(device="cpu")
        net.reset_parameters()
    for linear in (net.pool, net.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not linear.bias.any()
    assert "pooling='attention'" in repr(net)


def test_a_class_token_that_is_none_is_told():
    with pytest.raises(ValueError, match="reads the class token"):
        ScoreNet(6, 5, "cls", 1, False)
