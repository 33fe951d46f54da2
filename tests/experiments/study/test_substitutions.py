"""Each substitution does what it says, on a few numbers and in a model, and nothing stays behind.

Dimensions: B batch, N tokens, T patch tokens, D width, K kappa.
"""

import itertools

import pytest
import timm
import torch

from experiments.study.alternatives import greedy_partners, input_gradient_saliency, random_partners
from experiments.study.released_behaviour import decide_by_first_easy
from experiments.study.substitutions import SUBSTITUTIONS, substituted
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach
from tokenmixup import _hooks as hooks
from tokenmixup.functional import decide_mixing, mix_targets, soft_cross_entropy

HTM, VTM = HorizontalConfig(layers=(1,), tau=9.0, rho=0.001), VerticalConfig(layers=(2,), kappa=3)
BATCH = 6


def vit(horizontal=HTM, vertical=VTM, seed=0):
    """A ViT with a class token, 4 x 4 patches and 4 layers."""
    torch.manual_seed(seed)
    host = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        num_classes=5,
    )
    return attach(host, horizontal=horizontal, vertical=vertical).train()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return 5 * torch.randn(BATCH, 3, 16, 16), torch.arange(BATCH) % 5


def layer_inputs(model, images, targets):
    """The tokens that enter each layer after the hooks, and the output."""
    seen = {}
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, index=index: seen.__setitem__(index, args[0].detach().clone())
        )
        for index, block in enumerate(model.backbone.blocks)
    ]
    output = model(images, targets)
    for handle in handles:
        handle.remove()
    return seen, output


# The mask


def test_ten_numbers_by_hand():
    """Samples 1 and 2 are easy and are each other's best partner; 1 is the first easy one."""
    saliency = torch.tensor(
        [[0.2, 0.2, 0.2, 0.2, 0.2], [0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]]
    )
    easy = torch.tensor([False, True, True])
    targets = torch.eye(3)
    ours = decide_mixing(saliency, targets, easy, 0.05)
    theirs = decide_by_first_easy(saliency, targets, easy, 0.05)
    assert ours.partner.tolist() == [0, 2, 1]
    assert ours.mask.int().tolist() == [[0] * 5, [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    # s_1 - s_first is 0 everywhere: sample 2 takes nothing from its partner
    assert theirs.mask.int().tolist() == [[0] * 5, [0, 0, 0, 0, 1], [0] * 5]
    assert theirs.partner.tolist() == [0, 2, 2]


def test_the_mask_is_that_of_a_gather_with_a_one_row_index():
    """s_j - s_i as (E, B, T), gathered at the partners by (1, E, T): row 0 is read for everyone."""
    for seed in range(20):
        torch.manual_seed(seed)
        saliency = torch.rand(8, 10).softmax(1)
        easy = torch.rand(8) < 0.6
        easy[seed % 8] = True
        rows = easy.nonzero().flatten()
        decision = decide_by_first_easy(saliency, torch.eye(8), easy, 0.01)
        difference = saliency[None, :, :] - saliency[rows][:, None, :]
        partner = decision.partner[rows]
        gathered = difference.gather(1, partner[None, :, None].expand(1, -1, 10))[0]  # (E, T)
        taking = decision.mask[rows].any(1)  # the others are given back to themselves
        assert taking.any()
        assert torch.equal(decision.mask[rows][taking], (gathered > 0.01)[taking])
        assert not decision.mask[~easy].any()


def test_the_first_easy_sample_alone_is_right():
    for seed in range(20):
        torch.manual_seed(seed)
        saliency, easy = torch.rand(8, 10).softmax(1), torch.rand(8) < 0.5
        if not easy.any():
            continue
        first = int(easy.nonzero()[0])
        arguments = (saliency, torch.eye(8), easy, 0.01)
        ours, theirs = decide_mixing(*arguments), decide_by_first_easy(*arguments)
        assert torch.equal(ours.mask[first], theirs.mask[first])
        assert ours.partner[first] == theirs.partner[first]
    nobody = decide_by_first_easy(saliency, torch.eye(8), torch.zeros(8, dtype=torch.bool), 0.01)
    assert not nobody.mask.any() and nobody.partner.tolist() == list(range(8))


def test_labels_follow_the_released_mask(batch):
    images, targets = batch
    with substituted(["released mask"]):
        output = vit(vertical=None)(images, targets)
    plain = vit(vertical=None)(images, targets)
    assert torch.allclose(output.targets.sum(1), torch.ones(BATCH))
    assert not torch.equal(output.targets, plain.targets)


# The order of the batch


def test_easy_samples_come_first_and_memory_does_not(batch):
    images, targets = batch
    hard = torch.tensor([True, False, True, False, False, True])
    model, ordered = vit(), vit()
    tau = _tau_between(model, images, targets, hard)
    model, ordered = (vit(HorizontalConfig(layers=(1,), tau=tau, rho=0.001)) for _ in range(2))
    easy = _difficulty(model, images, targets) <= tau
    order = [*easy.nonzero().flatten().tolist(), *(~easy).nonzero().flatten().tolist()]
    assert order != list(range(BATCH)), "this batch shows nothing"
    right, output = layer_inputs(model, images, targets)
    with substituted(["released order"]):
        wrong, mixed = layer_inputs(ordered, images, targets)
    assert torch.equal(wrong[0], right[0])
    assert torch.equal(wrong[1], right[1][order])
    assert torch.equal(mixed.targets, output.targets[order])
    # layer 2 attends to what layer 0 remembered of other samples
    assert torch.allclose(wrong[2], right[2][order], atol=1e-6)
    assert not torch.allclose(wrong[3], right[3][order], atol=1e-4)


def test_without_memory_the_order_changes_nothing_but_itself(batch):
    images, targets = batch
    output = vit(vertical=None)(images, targets)
    with substituted(["released order"]):
        same = vit(vertical=None)(images, targets)  # all are easy: their order stays
    assert torch.equal(same.logits, output.logits)


def _difficulty(model, images, targets):
    from tokenmixup.functional import sample_difficulty

    seen, _ = layer_inputs(attach_free(model), images, targets)
    one_hot = torch.nn.functional.one_hot(targets, 5).float()
    return sample_difficulty(model.scorenets["1"](seen[1]), one_hot)


def attach_free(model):
    """The same weights without HTM, so that the layer's unmixed input can be read."""
    other = vit(horizontal=None)
    other.backbone.load_state_dict(model.backbone.state_dict())
    return other


def _tau_between(model, images, targets, hard):
    """A threshold at which some samples are easy and, before one of them, some are not."""
    difficulty = _difficulty(model, images, targets)
    for tau in difficulty.sort().values[:-1].tolist():
        easy = difficulty <= tau
        if easy.any() and not easy[: int(easy.sum())].all():
            return tau + 1e-6
    raise AssertionError("no threshold changes the order")


# The choice and the positions of remembered tokens


def remembered_by(model, images, targets, monkeypatch):
    """What each layer remembers: positions (B, K), tokens (B, K, D) and the layer's tokens."""
    found = []
    inner = hooks.remember

    def spy(tokens, positions, config, num_prefix_tokens):
        result = inner(tokens, positions, config, num_prefix_tokens)
        found.append((positions.clone(), result.detach().clone(), tokens.detach().clone()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(hooks, "remember", spy)
        model(images, targets)
    return found


def test_positions_are_one_too_low(batch, monkeypatch):
    images, targets = batch
    with substituted(["released positions"]):
        found = remembered_by(vit(), images, targets, monkeypatch)
    assert len(found) == 2
    for positions, tokens, layer_tokens in found:
        for sample, slot in itertools.product(range(BATCH), range(3)):
            chosen = int(positions[sample, slot])  # counts patch tokens
            assert torch.equal(tokens[sample, slot], layer_tokens[sample, chosen])  # class token: 0


def test_the_choice_is_that_of_the_unmixed_tokens(batch, monkeypatch):
    images, targets = batch
    right = remembered_by(vit(), images, targets, monkeypatch)
    unmixed = remembered_by(vit(horizontal=None), images, targets, monkeypatch)
    with substituted(["released choice"]):
        stale = remembered_by(vit(), images, targets, monkeypatch)
    assert torch.equal(stale[0][0], right[0][0]), "layer 0 does not mix"
    assert torch.equal(stale[1][0], unmixed[1][0]), "the map of the unmixed tokens"
    assert not torch.equal(stale[1][0], right[1][0])
    assert torch.equal(stale[1][2], right[1][2]), "but the tokens are the mixed ones"


# Partners


def test_random_partners_are_a_permutation_and_follow_the_seed():
    torch.manual_seed(3)
    first = random_partners(torch.ones(7, 7))
    torch.manual_seed(3)
    assert torch.equal(first, random_partners(torch.zeros(7, 7)))
    assert sorted(first.tolist()) == list(range(7))
    assert any(not torch.equal(first, random_partners(torch.zeros(7, 7))) for _ in range(5))
    counts = torch.stack([random_partners(torch.zeros(3, 3)) for _ in range(600)])[:, 0].bincount()
    assert (counts - 200).abs().max() < 60, "each column is as likely (a bound of 5 deviations)"


def test_greedy_partners_take_the_largest_gain_first():
    gain = torch.tensor([[9.0, 8.0, 0.0], [8.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert greedy_partners(gain).tolist() == [0, 1, 2]  # 9 + 1, where 8 + 8 is the optimum
    for seed in range(20):
        torch.manual_seed(seed)
        gain = torch.rand(6, 6).sub(0.3).clamp_min(0)
        left = gain.clone()
        expected = {}
        while left.max() > 0:
            row, column = divmod(int(left.argmax()), 6)
            expected[row] = column
            left[row], left[:, column] = 0, 0
        found = greedy_partners(gain).tolist()
        assert {row: found[row] for row in expected} == expected
        assert sorted(found) == list(range(6))


@pytest.mark.parametrize("name", ["random partners", "greedy partners"])
def test_partners_in_a_model(name, batch, monkeypatch):
    images, targets = batch
    torch.manual_seed(5)
    with substituted([name]):
        output = vit(vertical=None)(images, targets)
    assert torch.allclose(output.targets.sum(1), torch.ones(BATCH))
    assert output.stats["htm/layer1/mixed_share"] > 0


# Saliency from gradients


def test_gradient_saliency_by_finite_differences():
    model = vit(None, None).double()
    torch.manual_seed(2)
    images, targets = torch.randn(2, 3, 16, 16).double(), torch.tensor([1, 4])
    saliency = input_gradient_saliency(model, images, targets, 16)
    assert model.training and saliency.shape == (2, 16)
    assert torch.allclose(saliency.sum(1), torch.ones(2).double())
    one_hot = torch.nn.functional.one_hot(targets, 5).double()
    model.eval()

    def loss(pixels):
        with torch.no_grad():
            return soft_cross_entropy(model(pixels[None]), one_hot[:1])[0]

    gradient = torch.zeros(3, 4, 4).double()  # of the first token's square
    for place in itertools.product(range(3), range(4), range(4)):
        step = torch.zeros(3, 16, 16).double()
        step[place] = 1e-5
        gradient[place] = (loss(images[0] + step) - loss(images[0] - step)) / 2e-5
    strength = gradient.square().mean(0).sqrt().mean()
    full = images[:1].clone().requires_grad_()
    soft_cross_entropy(model(full), one_hot[:1]).sum().backward()
    total = full.grad.square().mean(1).sqrt().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).sum()
    assert saliency[0, 0].item() == pytest.approx((strength / total).item(), rel=1e-5)


def test_gradient_saliency_decides_in_a_model(batch):
    images, targets = batch
    model = vit(vertical=None)
    expected = input_gradient_saliency(model, images, targets, 16)
    one_hot = torch.nn.functional.one_hot(targets, 5).float()
    decision = decide_mixing(expected, one_hot, torch.ones(BATCH, dtype=torch.bool), 0.001)
    with substituted(["gradient saliency"]):
        output = model(images, targets)
    assert torch.allclose(output.targets, mix_targets(one_hot, expected, decision))
    output.logits.sum().backward()
    assert model.backbone.patch_embed.proj.weight.grad is not None
    model.eval()
    assert torch.equal(model(images), model.backbone(images))


# What is common to all


def test_nothing_stays_behind(batch):
    images, targets = batch
    before = vit()(images, targets)
    forward, step = TokenMixupModel.forward, hooks.horizontal_step
    for name in SUBSTITUTIONS:
        with substituted([name]):
            vit()(images, targets)
        after = vit()(images, targets)
        assert torch.equal(after.logits, before.logits), name
        assert torch.equal(after.targets, before.targets), name
    with pytest.raises(KeyError, match="stop"), substituted(["released mask"]):
        raise KeyError("stop")
    assert TokenMixupModel.forward is forward and hooks.horizontal_step is step


@pytest.mark.parametrize("name", SUBSTITUTIONS)
def test_each_changes_something(name, batch):
    images, targets = batch
    model = vit()
    tau = _tau_between(model, images, targets, None)
    settings = HorizontalConfig(layers=(1,), tau=tau, rho=0.001)
    settings = settings if name == "released order" else HTM
    before = vit(settings)(images, targets)
    torch.manual_seed(8)
    with substituted([name]):
        after = vit(settings)(images, targets)
    assert not torch.equal(after.logits, before.logits)


def test_all_defects_together(batch):
    images, targets = batch
    names = [name for name in SUBSTITUTIONS if name.startswith("released")]
    assert len(names) == 4
    with substituted(names):
        output = vit()(images, targets)
    output.logits.sum().backward()
    assert torch.allclose(output.targets.sum(1), torch.ones(BATCH))


def test_two_that_would_undo_each_other():
    with (
        pytest.raises(AssertionError, match="undo"),
        substituted(["random partners", "greedy partners"]),
    ):
        pass
