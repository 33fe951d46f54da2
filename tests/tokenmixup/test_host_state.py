"""No state leaks: from one model, step, thread or failure to the next."""

import copy
import gc
import pickle
import threading
import weakref
from types import FunctionType, ModuleType

import pytest
import torch
from accelerate.utils import convert_to_fp32

from tests.helpers.cases import same_bits
from tests.helpers.host_cases import BY_NAME, batch, every_host, logits_of, one_of_each
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig
from tokenmixup._session import StepRecord

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)


def build(case, **dropout):
    torch.manual_seed(5)  # ScoreNet's weights
    return case.attach(case.build(**dropout), horizontal=HTM, vertical=VTM).train()


def result(model, images, targets):
    """Everything that a training step gives: logits, targets, loss, and all gradients."""
    model.zero_grad()
    torch.manual_seed(7)  # some rotary embeddings jitter
    out = model(images, targets)
    (out.logits.square().mean() + out.scorenet_loss).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.logits.detach(), out.targets, out.scorenet_loss.detach(), *gradients]


def assert_same(first, second):
    assert len(first) == len(second)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@every_host
def test_copies_and_pickles_are_models_of_their_own(case):
    model = build(case)
    images, targets = batch(case)
    expected = result(model, images, targets)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, TokenMixupModel)
        assert list(other.state_dict()) == list(model.state_dict())
        assert_same(result(other, images, targets), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()  # a copy that shares nothing does not disturb the model
        assert_same(result(model, images, targets), expected)
        other.detach()
        assert_same(result(model, images, targets), expected)


@one_of_each
def test_state_dict_round_trip(case):
    model = build(case)
    images, targets = batch(case)
    expected = result(model, images, targets)
    fresh = case.attach(case.build_fresh(0.0), horizontal=HTM, vertical=VTM).train()
    report = fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not report.missing_keys and not report.unexpected_keys
    assert_same(result(fresh, images, targets), expected)


@one_of_each
def test_evaluation_between_and_within_training_steps(case):
    model = build(case)
    images, targets = batch(case)
    expected = result(model, images, targets)
    with torch.no_grad():
        evaluated = model.eval()(images)
    assert_same(result(model.train(), images, targets), expected)

    model.zero_grad()
    out = model(images, targets)
    with torch.no_grad():  # between the forward and the backward pass of a step
        assert same_bits(model.eval()(images), evaluated)
    model.train()
    (out.logits.square().mean() + out.scorenet_loss).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert_same(gradients, expected[3:])


@one_of_each
def test_interleaved_models_do_not_meet(case):
    """A teacher beside a student, and a second model on other images."""
    student, images, targets = build(case), *batch(case)
    teacher = copy.deepcopy(student)
    other, other_images, other_targets = build(BY_NAME["dinov2"]), *batch(BY_NAME["dinov2"])
    expected = result(student, images, targets)
    other_expected = result(other, other_images, other_targets)
    student.zero_grad()
    other.zero_grad()
    first = student(images, targets)
    second = other(other_images, other_targets)
    with torch.no_grad():
        teacher(images, targets)
        teacher.eval()(images)
    for model, out, wanted in ((other, second, other_expected), (student, first, expected)):
        (out.logits.square().mean() + out.scorenet_loss).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert_same([out.logits.detach(), out.targets, *gradients], wanted[:2] + wanted[3:])


@pytest.mark.parametrize("shared", [False, True], ids=["two models", "one model"])
@one_of_each
def test_threads_do_not_meet(case, shared):
    """Forward passes of one model, or forward and backward passes of two, at the same time."""
    models = [build(case)]
    models.append(models[0] if shared else build(case))
    batches = [batch(case), batch(case)]

    def work(index):
        if not shared:
            return result(models[index], *batches[index])
        out = models[index](*batches[index])
        return [out.logits.detach(), out.targets, out.scorenet_loss.detach()]

    expected = [work(0), work(1)]
    failures = []

    def repeat(index, barrier):
        try:
            for _ in range(10):
                barrier.wait(timeout=30)
                assert_same(work(index), expected[index])
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=repeat, args=(i, barrier)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures, failures


@one_of_each
def test_nothing_of_a_step_outlives_it(case, monkeypatch):
    """Neither remembered tokens nor decisions: they would hold a graph in memory."""
    made, initialise = [], StepRecord.__init__

    def noting(self, *args, **kwargs):
        made.append(weakref.ref(self))
        initialise(self, *args, **kwargs)

    def records():
        return [one for one in made if one() is not None]

    monkeypatch.setattr(StepRecord, "__init__", noting)
    model = build(case)
    images, targets = batch(case)
    gc.disable()
    try:
        out = model(images, targets)
        assert len(records()) == 1  # kept by the graph, for checkpointing
        out.logits.sum().backward()
        del out
        assert not records()
        with torch.no_grad():
            kept = model(images, targets)
        assert len(made) == 2 and not records() and kept.stats
    finally:
        gc.enable()


def tensors_behind(kept):
    """All tensors that an object keeps alive, as Python's collector sees them."""
    found, waiting = {}, [kept]
    while waiting:
        one = waiting.pop()
        if id(one) not in found and not isinstance(one, (type, ModuleType, FunctionType)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    return [one for one in found.values() if isinstance(one, torch.Tensor)]


@one_of_each
def test_statistics_are_those_of_their_step_whenever_they_are_read(case):
    """After the optimiser's step and detach(); until then they keep neither graph nor tokens."""
    images, targets = batch(case)
    expected = dict(build(case)(images, targets).stats)
    model = build(case)
    out = model(images, targets)
    out.loss().backward()
    torch.optim.SGD(model.parameters(), 10.0).step()
    model.detach()
    stats = out.stats
    del out
    tokens = len(images) * max(layout.num_patch_tokens or 64 for layout in model.layouts)
    kept = tensors_behind(stats)
    assert kept and not any(one.requires_grad for one in kept)
    assert max(one.untyped_storage().nbytes() for one in kept) <= 4 * 2 * tokens
    assert stats.keys() == expected.keys()
    cast = convert_to_fp32(stats)
    for read in (stats, cast, copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert all(same_bits(read[name], value) for name, value in expected.items())
    assert all(one.dim() == 0 for one in tensors_behind(stats))


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["layer", "attention"])
@one_of_each
def test_a_failure_inside_the_forward_pass_leaves_nothing(case, where):
    model = build(case)
    images, targets = batch(case)
    expected = result(model, images, targets)
    plain = logits_of(model.backbone(images)).detach()
    layer = model.adapter.layers(model.backbone)[2]

    def fail(*_):
        raise Broken

    part = layer if where == "layer" else model.adapter.attention(layer)
    handle = part.register_forward_hook(fail, prepend=True)
    with pytest.raises(Broken):
        model(images, targets)
    handle.remove()
    assert same_bits(logits_of(model.backbone(images)).detach(), plain)
    assert_same(result(model, images, targets), expected)


@one_of_each
def test_the_host_alone_is_untouched_while_attached(case):
    """In training, and inside someone else's backward pass."""
    plain = case.build()
    model = case.attach(copy.deepcopy(plain), horizontal=HTM, vertical=VTM).train()
    images, targets = batch(case)
    expected = logits_of(plain(images)).detach()
    out = model(images, targets)
    seen = []

    def look(gradient):
        with torch.no_grad():
            seen.append(logits_of(model.eval().backbone(images)))
        model.train()

    assert same_bits(logits_of(model.backbone(images)).detach(), expected)
    handle = out.logits.register_hook(look)
    out.logits.sum().backward()
    handle.remove()
    assert len(seen) == 1
    assert same_bits(logits_of(model.backbone(images)).detach(), expected)
