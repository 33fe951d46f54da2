"""Activation checkpointing of any host, and the comparison of what two models learn."""

import copy
import functools

import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.cases import same_bits


def checkpointed(case, model):
    """A copy of the model whose layers are run again in the backward pass, by the host's method."""
    model = copy.deepcopy(model)
    if case.family.startswith("transformers"):
        transformers_checkpointing(model)
    elif case.family.startswith("torch"):  # torchvision's and torch's own layers have no method
        wrap(model.adapter.layers(model.backbone), use_reentrant=False)
    else:
        model.set_grad_checkpointing()
    return model


def wrap(modules, **settings):
    """torch's own checkpointing around each forward pass; the hooks of the modules are outside."""
    for module in modules:

        def again(*args, inner=module.forward, **kwargs):
            return checkpoint(functools.partial(inner, **kwargs), *args, **settings)

        module.forward = again


def transformers_checkpointing(host, **settings):
    """By the name that the installed version does not deprecate."""
    name = "activation_checkpointing_enable"
    enable = getattr(host, name if hasattr(host, name) else "gradient_checkpointing_enable")
    enable(*([settings] if settings else []))


def loss_of(out):
    return out.logits.square().mean() + out.scorenet_loss


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second, exactly=True):
    first, second = gradients(first), gradients(second)
    assert first.keys() == second.keys() and first
    for name, gradient in first.items():
        if exactly:
            assert same_bits(gradient, second[name]), name
        else:
            torch.testing.assert_close(gradient, second[name], rtol=1e-4, atol=1e-5)
