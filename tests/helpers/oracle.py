"""An independent, slow reference of TokenMixup: plain loops in float64, from the equations alone.

It shares nothing with the library: no torch, no broadcasting tricks, one sample and one token at a
time. What it cannot decide (which of several equally good assignments is taken) is an argument, so
that a test hands in the partners that the library chose and checks that they are optimal.

Dimensions: B batch, H heads, N tokens with prefix, P prefix tokens, T = N - P patch tokens,
D width, C classes, E easy samples.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

# All injective maps are tried up to this many easy samples, as long as there are not more maps
# than MOST_MAPS; above that SciPy's solver is the reference.
MOST_BRUTE_FORCE_ROWS = 6
MOST_MAPS = 5_040


def attention_saliency(attention, num_prefix_tokens=0):
    """(B, H, N, N) -> (B, T): the class token's row, or the mean over all queries."""
    attention = np.asarray(attention, dtype=np.float64)
    batch, heads, queries, keys = attention.shape
    saliency = np.zeros((batch, keys - num_prefix_tokens))
    rows = [0] if num_prefix_tokens > 0 else list(range(queries))
    for i in range(batch):
        for t in range(keys - num_prefix_tokens):
            total = 0.0
            for h in range(heads):
                for q in rows:
                    total += attention[i, h, q, num_prefix_tokens + t]
            saliency[i, t] = total / (heads * len(rows))
    return saliency


def cross_entropy(logits, targets):
    """(B, C), (B, C) -> (B,): -sum_c y_c log softmax(logits)_c."""
    logits = np.asarray(logits, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    loss = np.zeros(len(logits))
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        top = max(row)
        log_sum = top + math.log(sum(math.exp(value - top) for value in row))
        for value, weight in zip(row, target, strict=True):
            loss[i] -= weight * (value - log_sum)
    return loss


def sample_difficulty(logits, targets):
    """(B, C), (B, C) -> (B,): d_i = CE(y_i, logits_i) / 10."""
    return cross_entropy(logits, targets) / 10


def saliency_gain(saliency, easy, rho):
    """(B, T), (B,) -> (E, B): sum_t max(s_j[t] - s_i[t] - rho, 0), i over the easy samples."""
    saliency = np.asarray(saliency, dtype=np.float64)
    batch, patches = saliency.shape
    rows = [i for i in range(batch) if easy[i]]
    gain = np.zeros((len(rows), batch))
    for e, i in enumerate(rows):
        for j in range(batch):
            for t in range(patches):
                gain[e, j] += max(saliency[j, t] - saliency[i, t] - rho, 0.0)
    return gain


def best_assignment(gain):
    """(E, B) -> (E,): columns of one assignment of greatest total gain, each used at most once."""
    gain = np.asarray(gain, dtype=np.float64)
    rows, columns = gain.shape
    if rows > MOST_BRUTE_FORCE_ROWS or math.perm(columns, rows) > MOST_MAPS:
        found_rows, found_columns = linear_sum_assignment(gain, maximize=True)
        assert list(found_rows) == list(range(rows))
        return np.asarray(found_columns, dtype=np.int64)
    best, best_total = None, -math.inf
    for candidate in itertools.permutations(range(columns), rows):
        total = total_gain(gain, candidate)
        if total > best_total:
            best, best_total = candidate, total
    return np.asarray(best, dtype=np.int64)


def total_gain(gain, columns):
    """Total gain of an assignment: sum_e gain[e, columns[e]]."""
    return sum(float(gain[e][column]) for e, column in enumerate(columns))


def partners_of(saliency, easy, rho):
    """(B,): an optimal partner of every easy sample, each other sample's own index."""
    columns = best_assignment(saliency_gain(saliency, easy, rho))
    partner = np.arange(len(saliency))
    rows = [i for i in range(len(saliency)) if easy[i]]
    for i, column in zip(rows, columns, strict=True):
        partner[i] = column
    return partner


@dataclass
class Mixed:
    """What mixing gives, in batch order."""

    tokens: np.ndarray  # (B, N, D)
    targets: np.ndarray  # (B, C)
    partner: np.ndarray  # (B,), the own index where no token was replaced
    mask: np.ndarray  # (B, T) bool


def mix(tokens, targets, saliency, partner, rho, num_prefix_tokens=0, labels="saliency"):
    """Mixing and relabelling for given partners (steps 4 and 5 of the method)."""
    tokens = np.asarray(tokens, dtype=np.float64)
    targets = np.asarray(targets, dtype=np.float64)
    saliency = np.asarray(saliency, dtype=np.float64)
    batch, patches = saliency.shape
    out = Mixed(tokens.copy(), targets.copy(), np.arange(batch), np.zeros((batch, patches), bool))
    for i in range(batch):
        j = int(partner[i])
        if j == i:
            continue
        own_part = partner_part = 0.0
        for t in range(patches):
            if saliency[j, t] - saliency[i, t] > rho:
                out.mask[i, t] = True
                out.tokens[i, num_prefix_tokens + t] = tokens[j, num_prefix_tokens + t]
                partner_part += saliency[j, t] if labels == "saliency" else 1
            else:
                own_part += saliency[i, t] if labels == "saliency" else 1
        if not out.mask[i].any():
            continue
        out.partner[i] = j
        if own_part + partner_part != 0:
            for c in range(targets.shape[1]):
                mixed = own_part * targets[i, c] + partner_part * targets[j, c]
                out.targets[i, c] = mixed / (own_part + partner_part)
    return out


def assert_optimal(partner, saliency, easy, rho):
    """Partners (B,), its own of a sample that takes nothing, gain as much as any can."""
    gain = saliency_gain(saliency, easy, rho)
    chosen = [int(partner[i]) for i in range(len(saliency)) if easy[i]]
    taken = [column for row, column in enumerate(chosen) if gain[row, column] > 0]
    assert len(set(taken)) == len(taken), "a column twice"
    best = total_gain(gain, best_assignment(gain))
    assert math.isclose(total_gain(gain, chosen), best, rel_tol=1e-6, abs_tol=1e-9)


def horizontal_mixup(
    tokens, targets, saliency, easy, rho, num_prefix_tokens=0, partner=None, labels="saliency"
):
    """Assignment, mixing and relabelling together.

    Of partners that are given only the optimality is checked: several assignments may be as good.
    """
    if partner is None:
        partner = partners_of(saliency, easy, rho)
    assert_optimal(partner, saliency, easy, rho)
    return mix(tokens, targets, saliency, partner, rho, num_prefix_tokens, labels)


def salient_positions(saliency, kappa):
    """(T,) -> the kappa positions of greatest saliency, most salient first."""
    order = sorted(range(len(saliency)), key=lambda t: -float(saliency[t]))
    return order[:kappa]


def select_salient_tokens(tokens, saliency, kappa, num_prefix_tokens=0):
    """(B, N, D), (B, T) -> (B, kappa, D), most salient first."""
    tokens = np.asarray(tokens, dtype=np.float64)
    chosen = np.zeros((len(tokens), kappa, tokens.shape[2]))
    for i in range(len(tokens)):
        for k, t in enumerate(salient_positions(saliency[i], kappa)):
            chosen[i, k] = tokens[i, num_prefix_tokens + t]
    return chosen


def resize(grid, rows, columns):
    """(R, C) -> (rows, columns), bilinear, cell centres aligned, edges repeated."""

    def neighbours(index, size, new_size):
        position = (index + 0.5) * size / new_size - 0.5
        position = min(max(position, 0.0), size - 1.0)
        low = math.floor(position)
        return low, min(low + 1, size - 1), position - low

    resized = np.zeros((rows, columns))
    for r in range(rows):
        top, bottom, down = neighbours(r, grid.shape[0], rows)
        for c in range(columns):
            left, right, along = neighbours(c, grid.shape[1], columns)
            upper = (1 - along) * grid[top, left] + along * grid[top, right]
            lower = (1 - along) * grid[bottom, left] + along * grid[bottom, right]
            resized[r, c] = (1 - down) * upper + down * lower
    return resized


def softmax(values):
    """Softmax of one vector."""
    values = np.asarray(values, dtype=np.float64)
    exponentials = np.exp(values - values.max())
    return exponentials / exponentials.sum()


@dataclass
class ScoreNet:
    """The head's weights. pool is "attention", "cls" or "average"."""

    pool: str
    weight: np.ndarray  # (C, D)
    bias: np.ndarray  # (C,)
    pool_weight: np.ndarray | None = None  # (D,)
    pool_bias: float = 0.0

    def logits(self, tokens, num_prefix_tokens=0):
        """(B, N, D) -> (B, C)."""
        answers = []
        for sample in np.asarray(tokens, dtype=np.float64):
            if self.pool == "attention":
                weights = softmax([token @ self.pool_weight + self.pool_bias for token in sample])
                pooled = sum(w * token for w, token in zip(weights, sample, strict=True))
            elif self.pool == "cls":
                pooled = sample[0]
            else:
                patches = sample[num_prefix_tokens:]
                pooled = sum(patches) / len(patches)
            answers.append(self.weight @ pooled + self.bias)
        return np.asarray(answers)


@dataclass
class HorizontalStep:
    """One HTM layer's work: the mixed batch, the ScoreNet loss per sample and the decision."""

    mixed: Mixed
    scorenet_loss: np.ndarray | None  # (B,), without lambda
    difficulty: np.ndarray | None  # (B,)
    easy: np.ndarray  # (B,) bool


def horizontal_step(tokens, targets, attention, scorenet, tau, rho, num_prefix_tokens=0):
    """The whole of Horizontal TokenMixup; scorenet=None mixes every sample."""
    saliency = attention_saliency(attention, num_prefix_tokens)
    return horizontal_step_from_saliency(
        tokens, targets, saliency, scorenet, tau, rho, num_prefix_tokens
    )


def horizontal_step_from_saliency(
    tokens, targets, saliency, scorenet, tau, rho, num_prefix_tokens=0
):
    """The same where the saliency (B, T) is known already."""
    loss = difficulty = None
    easy = np.ones(len(saliency), bool)
    if scorenet is not None:
        logits = scorenet.logits(tokens, num_prefix_tokens)
        loss = cross_entropy(logits, targets)
        difficulty = sample_difficulty(logits, targets)
        easy = np.asarray([d <= tau for d in difficulty])
    mixed = horizontal_mixup(tokens, targets, saliency, easy, rho, num_prefix_tokens)
    return HorizontalStep(mixed, loss, difficulty, easy)
