"""Each rule does what it says, on a few numbers and in a model.

Dimensions: B batch, N tokens, T patch tokens, D width, K kappa.
"""

import dataclasses
import itertools

import pytest
import torch

from experiments.study.variants import RULES, GreedyPartners, ReleasedMask, gradient_saliency
from tests.helpers.variant_vit import HTM, vit
from tokenmixup import HorizontalConfig
from tokenmixup.functional import (
    decide_mixing,
    mix_targets,
    sample_difficulty,
    soft_cross_entropy,
)
from tokenmixup.rules import Rules

BATCH = 6


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


def one_hot(targets):
    return torch.nn.functional.one_hot(targets, 5).float()


# The mask


def test_ten_numbers_by_hand():
    """Samples 1 and 2 are easy and are each other's best partner; 1 is the first easy one."""
    saliency = torch.tensor(
        [[0.2, 0.2, 0.2, 0.2, 0.2], [0.6, 0.1, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.6]]
    )
    arguments = (0, saliency, torch.eye(3), torch.tensor([False, True, True]), 0.05)
    ours, theirs = Rules().decide(*arguments), ReleasedMask().decide(*arguments)
    assert ours.partner.tolist() == [0, 2, 1]
    assert ours.mask.int().tolist() == [[0] * 5, [0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]
    # s_1 - s_first is 0 everywhere: sample 2 takes nothing from its partner
    assert theirs.mask.int().tolist() == [[0] * 5, [0, 0, 0, 0, 1], [0] * 5]
    assert theirs.partner.tolist() == [0, 2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_is_that_of_a_gather_with_a_one_row_index(seed):
    """s_j - s_i as (E, B, T), gathered at the partners by (1, E, T): row 0 is read for everyone."""
    torch.manual_seed(seed)
    saliency, easy = torch.rand(8, 10).softmax(1), torch.rand(8) < 0.6
    easy[seed % 8] = True
    rows = easy.nonzero().flatten()
    arguments = (0, saliency, torch.eye(8), easy, 0.01)
    ours, theirs = Rules().decide(*arguments), ReleasedMask().decide(*arguments)
    difference = saliency[None, :, :] - saliency[rows][:, None, :]
    partner = theirs.partner[rows]
    gathered = difference.gather(1, partner[None, :, None].expand(1, -1, 10))[0]  # (E, T)
    taking = theirs.mask[rows].any(1)  # the others are given back to themselves
    assert taking.any()
    assert torch.equal(theirs.mask[rows][taking], (gathered > 0.01)[taking])
    assert not theirs.mask[~easy].any()
    first = rows[0]
    assert torch.equal(ours.mask[first], theirs.mask[first]), "the first easy sample is right"
    assert ours.partner[first] == theirs.partner[first]


def test_the_released_mask_without_an_easy_sample():
    nobody = torch.zeros(8, dtype=torch.bool)
    decision = ReleasedMask().decide(0, torch.rand(8, 10), torch.eye(8), nobody, 0.01)
    assert not decision.mask.any() and decision.partner.tolist() == list(range(8))


# The order of the batch


def difficulty_of(images, targets):
    """By the ScoreNet of layer 1; a model without HTM shows the layer's unmixed input."""
    seen, _ = layer_inputs(vit(horizontal=None), images, targets)
    return sample_difficulty(vit().scorenets["1"](seen[1]), one_hot(targets))


def some_easy(images, targets):
    """Settings by which some samples are easy and, before one of them, some are not."""
    difficulty = difficulty_of(images, targets)
    for tau in difficulty.sort().values[:-1].tolist():
        easy = difficulty <= tau
        if easy.any() and not easy[: int(easy.sum())].all():
            return HorizontalConfig(layers=(1,), tau=tau + 1e-6, rho=0.001)
    raise AssertionError("no threshold changes the order")


def test_easy_samples_come_first_and_memory_does_not(batch):
    images, targets = batch
    settings = some_easy(images, targets)
    easy = difficulty_of(images, targets) <= settings.tau
    order = [*easy.nonzero().flatten().tolist(), *(~easy).nonzero().flatten().tolist()]
    right, output = layer_inputs(vit(horizontal=settings), images, targets)
    wrong, mixed = layer_inputs(vit("released order", horizontal=settings), images, targets)
    assert torch.equal(wrong[0], right[0])
    assert torch.equal(wrong[1], right[1][order])
    assert torch.equal(mixed.targets, output.targets[order])
    # layer 2 attends to what layer 0 remembered of other samples
    assert torch.allclose(wrong[2], right[2][order], atol=1e-6)
    assert not torch.allclose(wrong[3], right[3][order], atol=1e-4)


# The choice and the positions of remembered tokens


def remembered_by(images, targets, *names, horizontal=HTM):
    """What each layer remembers: positions (B, K), tokens (B, K, D) and the layer's tokens."""
    found = []

    class Noting(*(RULES[name] for name in names), Rules):
        def remember(self, tokens, positions, config, num_prefix_tokens):
            result = super().remember(tokens, positions, config, num_prefix_tokens)
            found.append((positions.clone(), result.detach().clone(), tokens.detach().clone()))
            return result

    vit(horizontal=horizontal, rules=Noting())(images, targets)
    return found


def test_positions_are_one_too_low(batch):
    found = remembered_by(*batch, "released positions")
    assert len(found) == 2
    for positions, tokens, layer_tokens in found:
        for sample, slot in itertools.product(range(BATCH), range(3)):
            chosen = int(positions[sample, slot])  # counts patch tokens
            assert torch.equal(tokens[sample, slot], layer_tokens[sample, chosen])  # class token: 0


def test_the_choice_is_that_of_the_unmixed_tokens(batch):
    right, stale = remembered_by(*batch), remembered_by(*batch, "released choice")
    unmixed = remembered_by(*batch, horizontal=None)
    assert torch.equal(stale[0][0], right[0][0]), "layer 0 does not mix"
    assert torch.equal(stale[1][0], unmixed[1][0]), "the map of the unmixed tokens"
    assert not torch.equal(stale[1][0], right[1][0])
    assert torch.equal(stale[1][2], right[1][2]), "but the tokens are the mixed ones"


# Partners


def test_random_partners_are_a_permutation_and_follow_the_seed():
    random_partners = RULES["random partners"]().partners
    torch.manual_seed(3)
    first = random_partners(torch.ones(7, 7))
    torch.manual_seed(3)
    assert torch.equal(first, random_partners(torch.zeros(7, 7)))
    assert sorted(first.tolist()) == list(range(7))
    counts = torch.stack([random_partners(torch.zeros(3, 3)) for _ in range(600)])[:, 0].bincount()
    assert (counts - 200).abs().max() < 60, "each column is as likely (a bound of 5 deviations)"


def test_greedy_partners_take_the_largest_gain_first():
    gain = torch.tensor([[9.0, 8.0, 0.0], [8.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert GreedyPartners().partners(gain).tolist() == [0, 1, 2]  # 9 + 1; the optimum is 8 + 8
    for seed in range(20):
        torch.manual_seed(seed)
        gain = torch.rand(6, 6).sub(0.3).clamp_min(0)
        left, expected = gain.clone(), {}
        while left.max() > 0:
            row, column = divmod(int(left.argmax()), 6)
            expected[row] = column
            left[row], left[:, column] = 0, 0
        found = GreedyPartners().partners(gain).tolist()
        assert {row: found[row] for row in expected} == expected
        assert sorted(found) == list(range(6))


# Saliency from gradients


def test_gradient_saliency_by_finite_differences():
    model = vit(horizontal=None, vertical=None).double()
    torch.manual_seed(2)
    images, targets = torch.randn(2, 3, 16, 16).double(), one_hot(torch.tensor([1, 4])).double()
    saliency = gradient_saliency(model, images, targets)
    assert model.training and saliency.shape == (2, 16)
    assert torch.allclose(saliency.sum(1), torch.ones(2).double())
    model.eval()

    def loss(pixels):
        with torch.no_grad():
            return soft_cross_entropy(model(pixels[None]), targets[:1])[0]

    gradient = torch.zeros(3, 4, 4).double()  # of the first token's square
    for place in itertools.product(range(3), range(4), range(4)):
        step = torch.zeros(3, 16, 16).double()
        step[place] = 1e-5
        gradient[place] = (loss(images[0] + step) - loss(images[0] - step)) / 2e-5
    strength = gradient.square().mean(0).sqrt().mean()
    full = images[:1].clone().requires_grad_()
    soft_cross_entropy(model(full), targets[:1]).sum().backward()
    total = full.grad.square().mean(1).sqrt().unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4)).sum()
    assert saliency[0, 0].item() == pytest.approx((strength / total).item(), rel=1e-5)


def test_gradient_saliency_decides_in_a_model(batch):
    images, targets = batch
    model = vit("gradient saliency", vertical=None)
    saliency, soft = gradient_saliency(model, images, one_hot(targets)), one_hot(targets)
    decision = decide_mixing(saliency, soft, torch.ones(BATCH, dtype=torch.bool), 0.001)
    output = model(images, targets)
    assert torch.allclose(output.targets, mix_targets(soft, saliency, decision))
    output.logits.sum().backward()
    assert model.backbone.patch_embed.proj.weight.grad is not None
    model.eval()
    assert torch.equal(model(images), model.backbone(images))


# Other saliency, other labels


def test_centred_saliency_by_hand():
    centred = RULES["centred saliency"]().saliency
    # a sink at the first place, of all samples; what is left tells the samples apart
    saliency = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.1, 0.3], [0.6, 0.2, 0.2]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(centred(0, saliency), expected, atol=1e-6)


def test_random_saliency_is_uniform_and_follows_the_seed():
    random_saliency = RULES["random saliency"]().saliency
    torch.manual_seed(3)
    found = random_saliency(0, torch.zeros(4000, 5))
    torch.manual_seed(3)
    assert torch.equal(found, random_saliency(0, torch.ones(4000, 5)))
    assert torch.allclose(found.sum(1), torch.ones(4000))
    # uniform on the simplex of T = 5: mean 1/T, variance (T - 1) / (T^2 (T + 1))
    assert torch.allclose(found.mean(0), torch.full((5,), 0.2), atol=0.01)
    assert torch.allclose(found.var(0), torch.full((5,), 4 / 150), atol=0.002)


def test_labels_by_tokens_by_hand():
    decision = Rules().decide(0, torch.eye(3, 4), torch.eye(3), torch.ones(3).bool(), 0.5)
    assert decision.mask.sum(1).tolist() == [1, 1, 1]
    targets = RULES["labels by tokens"]().relabel(torch.eye(3), torch.eye(3, 4), decision)
    taken = targets[torch.arange(3), decision.partner]
    assert taken.tolist() == [0.25] * 3, "one token of four, whatever its saliency"


def test_labels_by_tokens_are_the_setting(batch):
    settings = dataclasses.replace(HTM, labels="tokens")
    by_rule, by_setting = vit("labels by tokens")(*batch), vit(horizontal=settings)(*batch)
    assert torch.equal(by_rule.targets, by_setting.targets)
    assert torch.equal(by_rule.logits, by_setting.logits)


# All of them in a model


@pytest.mark.parametrize("names", [[name] for name in RULES] + [[n for n in RULES if "rel" in n]])
def test_each_changes_its_model_alone(names, batch):
    images, targets = batch
    settings = some_easy(images, targets) if "released order" in names else HTM
    before = vit(horizontal=settings)(images, targets)
    torch.manual_seed(8)
    output = vit(*names, horizontal=settings)(images, targets)
    changed = not torch.equal(output.logits, before.logits)
    assert changed == (names != ["labels by tokens"])
    assert changed or not torch.equal(output.targets, before.targets)
    assert torch.allclose(output.targets.sum(1), torch.ones(BATCH))
    output.logits.sum().backward()
    after = vit(horizontal=settings)(images, targets)
    assert torch.equal(after.logits, before.logits)
