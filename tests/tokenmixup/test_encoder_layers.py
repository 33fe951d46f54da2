"""`attach(model, layers=...)`: what the tests of all hosts do not say of torch's own layers."""

import pickle
from unittest import mock

import pytest
import torch
from torch import nn

from tests.helpers.cases import same_bits
from tests.helpers.host_builders import CLASSES, WIDTH
from tests.helpers.host_cases import BY_NAME, batch
from tokenmixup import HorizontalConfig, VerticalConfig, attach
from tokenmixup.hosts import UnsupportedHostError

HTM = HorizontalConfig(layers=(0,), rho=0.01, scorenet=None)
VTM = VerticalConfig(layers=(1,), kappa=3)
CASE = BY_NAME["encoder"]


def layer(width=WIDTH, **settings):
    return nn.TransformerEncoderLayer(width, 2, 48, **{"batch_first": True, **settings})


class Loop(nn.Module):
    """Layers in a loop of one's own, called by keyword, in another order than they are listed."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens, mask=None):
        for one in reversed(self.layers):
            tokens = one(src=tokens, src_mask=mask)
        return tokens.mean(1)


def test_layers_anywhere_in_the_order_of_the_pass():
    model = Loop(layer(dropout=0.0), layer(dropout=0.0))
    attached = attach(
        model,
        layers=reversed(model.layers),
        num_prefix_tokens=0,
        class_token=False,
        horizontal=HTM,
        vertical=VTM,
        num_classes=CLASSES,
    )
    seen = []
    first = model.layers[1]
    first.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    tokens, targets = torch.randn(4, 9, WIDTH), torch.eye(CLASSES)[:4]
    out = attached.train()(tokens, targets)
    assert out.stats["htm/layer0/mixed_share"] > 0
    assert not torch.equal(seen[0]["src"], tokens), "mixed at the layer that runs first"
    assert out.stats["vtm/layer1/remembered_tokens"] == 3
    model.forward = lambda tokens: Loop.forward(model, tokens, torch.zeros(9, 9))
    with pytest.raises(ValueError, match="calls its layers with `src_mask`"):
        attached(tokens, targets)


@pytest.mark.parametrize("what", ["mixes", "remembers", "attends"])
def test_layers_run_once_in_a_pass(what):
    """A second run would mix tokens and labels again, and checkpointing would repeat the last."""
    layers = [layer(dropout=0.0), layer(dropout=0.0)]
    settings = {"horizontal": HTM} if what == "mixes" else {"vertical": VTM}
    host = nn.Sequential(*layers)
    twice = layers[1] if what == "attends" else layers[0]

    def forward(tokens):
        for one in (layers[0], twice, layers[1]):
            tokens = one(tokens)
        return tokens.mean(1)

    host.forward = forward
    model = attach(
        host, layers=layers, num_prefix_tokens=0, class_token=False, num_classes=CLASSES, **settings
    )
    index = 1 if what == "attends" else 0
    with pytest.raises(RuntimeError, match=rf"^layer {index} runs a second time in one training"):
        model.train()(torch.randn(4, 9, WIDTH), torch.eye(CLASSES)[:4])


def test_views_that_the_host_folds_into_the_batch():
    host = Loop(layer(dropout=0.0))
    host.forward = lambda views: Loop.forward(host, views.flatten(0, 1)).unflatten(0, (4, 2))
    model = attach(
        host,
        layers=host.layers,
        num_prefix_tokens=0,
        class_token=False,
        horizontal=HTM,
        num_classes=CLASSES,
    )
    with pytest.raises(ValueError, match="tokens of 8 samples, but there are targets of 4: put"):
        model.train()(torch.randn(4, 2, 9, WIDTH), torch.eye(CLASSES)[:4])


def test_hooks_of_others_keep_their_place():
    """After a validation, too: one before ours would change what HTM mixes by."""
    model = CASE.attach(CASE.build(), horizontal=HTM).train()
    images, targets = batch(CASE)
    first = model._layers[0]
    first.register_forward_pre_hook(lambda _, args: (args[0] * torch.linspace(0, 1, WIDTH),))
    before = model(images, targets).targets
    model.eval()(images)
    assert torch.equal(model.train()(images, targets).targets, before)
    assert not torch.equal(before, targets)


@pytest.mark.parametrize("how", ["attached", "copied", "after training"])
def test_the_fused_path_of_evaluation_stays_on(how):
    host = CASE.build().eval()
    images, targets = batch(CASE)
    fused = mock.patch(
        "torch._transformer_encoder_layer_fwd", wraps=torch._transformer_encoder_layer_fwd
    )
    with torch.no_grad(), fused as spy:
        expected = host(images)
        assert spy.call_count == 3
        model = CASE.attach(host, horizontal=HTM, vertical=VTM)
        if how != "attached":
            model.train()(images, targets)
        if how == "copied":
            model = pickle.loads(pickle.dumps(model))
        spy.reset_mock()
        assert same_bits(model.eval()(images), expected) and spy.call_count == 3
    modes = [(module, not module.training) for module in model.modules()]
    for module, mode in modes:  # as Lightning does after a validation
        module.training = mode
    assert model(images, targets).stats["vtm/layer1/remembered_tokens"] == 3
    assert model.train()(images, targets).stats["vtm/layer1/remembered_tokens"] == 3
    with pytest.raises(ValueError, match="attached to this model already"):
        CASE.attach(model.eval().backbone)
    CASE.attach(model.detach())


def test_warnings_do_not_begin_anew_with_each_epoch():
    model = CASE.attach(CASE.build(), horizontal=HTM)
    watch = model._shared.watch
    assert model.eval().train()._shared.watch is watch


@pytest.mark.parametrize(
    ("layers", "arguments", "message"),
    [
        ([], {}, "layers is empty"),
        (
            [layer(batch_first=False)],
            {},
            r"`0` takes tokens as \(N, B, D\): build .*batch_first=True",
        ),
        ([layer(), layer(64)], {}, r"different widths: \[32, 64\]"),
        ([nn.Linear(3, 3)], {}, "`0` being a torch.nn.modules.transformer.TransformerEncoderLayer"),
        ([layer()], {"num_prefix_tokens": None}, "pass num_prefix_tokens .* and class_token"),
        ([layer()], {"class_token": True}, "num_prefix_tokens is 0 and class_token True"),
        ([layer()], {"num_prefix_tokens": -1}, "num_prefix_tokens is -1"),
    ],
)
def test_what_cannot_be_attached_to(layers, arguments, message):
    arguments = {"num_prefix_tokens": 0, "class_token": False, **arguments}
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(*layers), layers=layers, **arguments)


def test_layers_must_be_of_the_model_and_are_named_where_they_are_needed():
    model, other = nn.Sequential(layer()), layer()
    with pytest.raises(ValueError, match=r"layers\[1\] is no part of the model"):
        attach(model, layers=[model[0], other], num_prefix_tokens=0, class_token=False)
    with pytest.raises(UnsupportedHostError, match=r"attach\(model, layers=model.encoder.layers"):
        attach(CASE.build())
    with pytest.raises(ValueError, match="describe `layers`, which are not given"):
        attach(BY_NAME["vit"].build(), class_token=True)
