"""The mathematics of TokenMixup as pure tensor functions.

The order is the paper's. Horizontal TokenMixup: saliency, difficulty, gain, partners, mask, tokens,
targets; Vertical TokenMixup: the salient tokens that a layer remembers.

Dimensions: B batch, N tokens (prefix tokens included), P prefix tokens (class token, registers),
T = N - P patch tokens, D width, H heads, C classes, E easy samples, K kappa.

Every function accepts any floating dtype on any device and keeps no state. Of half-precision
tensors, and under autocast, saliency, difficulty and relabelling are computed in float32.
Equations are those of Choi, Choi and Kim, "TokenMixup", NeurIPS 2022 (arXiv 2210.07562); symbols
as in ``docs/paper_map.md``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmixup._assignment import solve_assignment
from tokenmixup._precision import without_autocast
from tokenmixup._targets import check_soft_targets, no_distributions

DIFFICULTY_SCALE = 10.0
"""The paper divides the cross-entropy by 10, so that useful thresholds tau lie between 0 and 1."""
_CPU_CHUNK = 1 << 19
"""Elements of the largest temporary on a CPU: 2 MiB in float32, which stay in the cache."""
_DEVICE_CHUNK = 1 << 26
"""The same on a device, where few large kernels are faster: 256 MiB in float32."""


class HorizontalMixup(NamedTuple):
    """What :func:`horizontal_mixup` returns; sample i of each field is sample i of the input.

    Attributes:
        tokens: (B, N, D).
        targets: soft targets, (B, C).
        partner: (B,) int64; a sample's own index where none of its tokens was replaced.
        mask: (B, T) bool, whether a token is the partner's.
    """

    tokens: Tensor
    targets: Tensor
    partner: Tensor
    mask: Tensor


@dataclass(frozen=True)
class MixingDecision:
    """Which tokens come from where.

    Attributes:
        partner: (B,) int64; a sample's own index where none of its tokens is replaced.
        mask: (B, T) bool, whether a token is taken from the partner.
    """

    partner: Tensor
    mask: Tensor


def attention_saliency(
    attention: Tensor, num_prefix_tokens: int = 0, *, class_token: bool | None = None
) -> Tensor:
    """Saliency of the patch tokens, read off a self-attention map, averaged over the heads.

    With a class token at position 0, ``s_i[t]`` is the class token's attention to patch token t;
    without one, the attention that t receives, averaged over all queries.

    Args:
        attention: attention probabilities, (B, H, N, N), rows are queries.
        num_prefix_tokens: P, the tokens before the patch tokens.
        class_token: whether token 0 is a class token; by default whether there are prefix tokens.

    Returns:
        Saliency, (B, T), without gradient, in float32 or wider.

    Raises:
        ValueError: the map is not four-dimensional or has no patch tokens.
    """
    if attention.dim() != 4:
        raise ValueError(f"attention must be (B, H, N, N), got shape {tuple(attention.shape)}")
    _check_prefix(attention.shape[-1], num_prefix_tokens, "attention")
    dtype = _wide(attention)
    if _reads_class_token(num_prefix_tokens, class_token):
        saliency = attention[:, :, 0].detach().mean(1, dtype=dtype)
    else:
        saliency = attention.detach().mean((1, 2), dtype=dtype)
    return saliency[:, num_prefix_tokens:]


@torch.no_grad()
def query_key_saliency(
    query: Tensor,
    key: Tensor,
    scale: float,
    num_prefix_tokens: int = 0,
    *,
    class_token: bool | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Saliency as :func:`attention_saliency` gives it, from queries and keys alone.

    The map softmax(scale * Q K^T + bias) is never stored whole: with a class token only its row
    is computed, without one the maps of as many samples at a time as are fast to compute. Fused
    attention can thus stay on in the layer itself. Scores are computed in float32, also where
    autocast is on: rounding a score of 100 to bfloat16 may change its probability by a quarter.

    Args:
        query: (B, H, Q, D / H), or (B, H, 1, D / H) where only the class token's row is read.
        key: (B, H, N, D / H), or (B, 1, N, D / H) where all heads share them. Where samples attend
            within W windows, both have them as second dimension, (B, W, H, N, D / H).
        scale: factor of the scores, usually (D / H) ** -0.5.
        num_prefix_tokens: P.
        class_token: as in :func:`attention_saliency`.
        bias: added to the scores, (B or 1, H, Q, N) for the Q queries that are given; with
            windows (B or 1, W or 1, H, Q, N).

    Returns:
        Saliency, (B, T), with windows (B, W, T), without gradient, in float32 or wider.
    """
    _check_prefix(key.shape[-2], num_prefix_tokens, "key")
    if _reads_class_token(num_prefix_tokens, class_token):
        query, bias = query[..., :1, :], None if bias is None else bias[..., :1, :]
    if key.shape[-3] == 1:  # of one head, which has the queries of all
        query = query.flatten(-3, -2).unsqueeze(-3)
        bias = None if bias is None else bias.flatten(-3, -2).unsqueeze(-3)
    with without_autocast(query.device.type):
        # a compiler would only have a larger graph by parts, and one for each number of samples
        compiling = torch.compiler.is_compiling()
        received = (_received if compiling else _received_by_parts)(query, key, scale, bias)
        return received[..., num_prefix_tokens:]


def _received_by_parts(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """As :func:`_received`, of as many samples or heads at a time as are fast to compute."""
    samples, *windows, heads, tokens = key.shape[:-1]
    maps = _rows_at_once(key, math.prod(windows) * query.shape[-2] * tokens)
    of_heads = heads if maps >= heads else 1
    of_samples = max(1, maps // heads)
    parts = []
    for first in range(0, max(1, samples), of_samples):
        part = slice(first, first + of_samples)
        columns = []
        for head in range(0, heads, of_heads):
            at = (..., slice(head, head + of_heads), slice(None), slice(None))
            added = None if bias is None else (bias[part] if len(bias) > 1 else bias)[at]
            columns.append(_received(query[part][at], key[part][at], scale, added))
        parts.append(columns[0] if len(columns) == 1 else torch.stack(columns).mean(0))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _received(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """What each key receives, mean over heads and queries: (..., H, Q, d) -> (..., N)."""
    return _scores(query, key, scale, bias).softmax(-1).mean((-3, -2))


def resized_saliency(saliency: Tensor, keys: tuple[int, int], tokens: tuple[int, int]) -> Tensor:
    """Saliency of pooled keys (B, K) on the grid of the tokens, (B, T).

    Bilinear between the centres of the keys, times K / T: what a key receives is shared out among
    its tokens, so that the sum stays, exactly where each key has as many tokens as any other.

    Args:
        saliency: of the keys.
        keys: rows and columns of their grid.
        tokens: rows and columns of the tokens' grid.
    """
    grid = saliency.unflatten(1, (1, *keys))
    resized = F.interpolate(grid, tokens, mode="bilinear", align_corners=False).flatten(1)
    return resized * (saliency.shape[1] / resized.shape[1])


def _scores(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """``scale * Q K^T + bias`` in float32 or wider: (..., Q, d), (..., N, d) -> (..., Q, N).

    The scale is the product's own factor, applied last: half-precision numbers are exact in TF32,
    which tensor cores multiply where torch is allowed to use it, but their scaled values need not
    be.
    """
    rows, columns = _widened(query).flatten(0, -3), _widened(key).flatten(0, -3).mT
    if torch.compiler.is_compiling():  # the compiler multiplies where it reads the product
        product = torch.bmm(rows, columns) * scale
    else:
        product = torch.baddbmm(rows.new_empty(()), rows, columns, beta=0, alpha=scale)
    scores = product.unflatten(0, query.shape[:-2])
    return scores if bias is None else scores + bias


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each sample with soft targets, ``-sum_c y[c] log softmax(logits)[c]``.

    Args:
        logits: (B, C).
        targets: (B, C), each row a distribution over the classes.

    Returns:
        (B,), in float32 or wider; differentiable in the logits.

    Raises:
        ValueError: the shapes differ.
    """
    return -expected_log_likelihood(logits, targets)


def expected_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """``sum_c y[c] log softmax(logits)[c]``, the negative of :func:`soft_cross_entropy`."""
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(
            "logits and targets must both be (B, C), got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    dtype = _wide(logits)
    return (logits.to(dtype).log_softmax(1) * targets.detach().to(dtype)).sum(1)


@torch.no_grad()
def sample_difficulty(logits: Tensor, targets: Tensor) -> Tensor:
    """Difficulty of each sample, ``d_i = CE(y_i, ScoreNet(x_i)) / 10``, without gradient.

    Args:
        logits: ScoreNet's, (B, C).
        targets: soft targets, (B, C).

    Returns:
        (B,), in float32 or wider. Sample i is easy where ``d_i <= tau``.

    Raises:
        ValueError: the shapes differ.
    """
    return soft_cross_entropy(logits, targets) / DIFFICULTY_SCALE


@torch.no_grad()
def least_difficulty(targets: Tensor) -> Tensor:
    """Difficulty of the best possible prediction, ``H(y_i) / 10``, without gradient.

    A cross-entropy is at least the entropy of its target, ``H(y) = -sum_c y[c] log y[c]``, and
    equal to it where softmax(logits) = y. With a smaller tau sample i is never easy: label
    smoothing and soft targets bound tau from below, by 0.1015 for smoothing 0.1 of 1000 classes.

    Args:
        targets: soft targets, (B, C), each row a distribution over the classes.

    Returns:
        (B,), in float32 or wider.
    """
    return torch.special.entr(targets.to(_wide(targets))).sum(1) / DIFFICULTY_SCALE


@torch.no_grad()
def saliency_gain(saliency: Tensor, easy: Tensor, rho: float) -> Tensor:
    """Saliency that easy sample i gains from sample j, ``sum_t max(s_j[t] - s_i[t] - rho, 0)``.

    Args:
        saliency: (B, T).
        easy: (B,) bool; the E rows of the result are the easy samples in batch order.
        rho: smallest difference that counts, >= 0, in the unit of the saliency.

    Returns:
        (E, B), in float32 or wider, without gradient. E depends on the data;
        :func:`horizontal_mixup` does not.

    Raises:
        ValueError: shapes do not fit, or rho is negative or not finite.
    """
    _check_saliency(saliency, easy, rho)
    saliency = saliency.to(_wide(saliency))
    return _gain(saliency[easy], saliency, rho)


def _gain(rows: Tensor, columns: Tensor, rho: float) -> Tensor:
    """``sum_t max(columns[c, t] - rows[r, t] - rho, 0)``: (R, T) and (C, T) -> (R, C).

    Terms that are nan count as 0.

    The sum runs over the differences themselves, in chunks of rows. The faster
    ``(|x| + x) / 2`` by `torch.cdist` rounds, so that a gain of 0 would not stay 0.
    """
    if torch.compiler.is_compiling():  # the compiler fuses it, without temporaries
        return (columns - rows.unsqueeze(1) - rho).clamp_min(0).nansum(-1)
    at_once = _rows_at_once(rows, columns.numel())
    # in the same memory for each part: an allocator may ask the system for it each time
    room = columns.new_empty((min(at_once, len(rows)), *columns.shape))
    gains = columns.new_empty((len(rows), len(columns)))
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once].unsqueeze(1)
        differences = torch.sub(columns, part, out=room[: len(part)]).sub_(rho).clamp_min_(0)
        torch.nansum(differences, -1, out=gains[first : first + at_once])
    return gains


def assign_partners(gain: Tensor) -> Tensor:
    """Partner of each easy sample: the one-to-one assignment with the greatest total gain.

    The solver is exact, not a heuristic (an auction and shortest augmenting paths on the host).
    Gains are rounded to multiples of a power of two, less than 2^-48 of B times the greatest. Of
    assignments with equal totals it takes the one whose columns come first in lexicographic order,
    whatever the other gains are and whichever solver, C or lapx, does it. Rows without any gain
    take the columns that are left.

    Args:
        gain: (E, B) with E <= B.

    Returns:
        (E,) int64, the column of each row; no column occurs twice.

    Raises:
        ValueError: the shape is not (E, B) with E <= B, or an entry is not finite.
    """
    if gain.dim() != 2 or gain.shape[0] > gain.shape[1]:
        raise ValueError(f"gain must be (E, B) with E <= B, got shape {tuple(gain.shape)}")
    return solve_assignment(gain)


def mixing_mask(saliency: Tensor, partner: Tensor, easy: Tensor, rho: float) -> Tensor:
    """The tokens that are more salient in the partner, ``M_i[t] = (s_j[t] - s_i[t] > rho)``.

    Args:
        saliency: (B, T).
        partner: j for each sample i, (B,) int64.
        easy: (B,) bool; the rows of other samples are False.
        rho: smallest saliency difference that replaces a token.

    Returns:
        (B, T) bool.
    """
    return (saliency.index_select(0, partner) - saliency > rho) & easy.unsqueeze(1)


@torch.no_grad()
def decide_mixing(
    saliency: Tensor,
    targets: Tensor,
    easy: Tensor,
    rho: float,
    *,
    partners: Callable[[Tensor], Tensor] = assign_partners,
    mask: Callable[[Tensor, Tensor, Tensor, float], Tensor] = mixing_mask,
) -> MixingDecision:
    """Choose partners and tokens: the part of :func:`horizontal_mixup` that has no gradient.

    The square problem with zero rows for the samples that are not easy has the same optimum for
    the easy ones as the rectangular problem, and its shape does not depend on the data.

    Where saliency is nan no token is exchanged. The loss of such a step is nan, as without
    TokenMixup: a gradient scaler skips the step, and whoever watches the loss sees it.

    Args:
        saliency: (B, T).
        targets: soft targets, (B, C).
        easy: (B,) bool.
        rho: smallest saliency difference that replaces a token.
        partners: chooses the partners by the gains, in place of :func:`assign_partners`.
        mask: chooses the tokens, in place of :func:`mixing_mask`.

    Raises:
        ValueError: shapes do not fit, rho is negative, or (by :func:`assign_partners`) saliency is
            infinite, or a row of targets is negative or does not sum to 1.
    """
    _check_saliency(saliency, easy, rho)
    saliency = saliency.to(_wide(saliency))
    gain = _gain(saliency, saliency, rho) * easy.unsqueeze(1)
    # The solver, which has to read the gains anyway, finds bad targets by the nan that they make,
    # without another device synchronisation.
    partner = partners(gain.masked_fill(no_distributions(targets).unsqueeze(1), float("nan")))
    taken = mask(saliency, partner, easy, rho)
    own = torch.arange(len(partner), device=partner.device)
    return MixingDecision(torch.where(taken.any(1), partner, own), taken)


def mix_tokens(tokens: Tensor, decision: MixingDecision, num_prefix_tokens: int = 0) -> Tensor:
    """Carry out a decision on tokens (B, N, D): ``where(M, x[partner], x)``, prefixes kept."""
    mask = F.pad(decision.mask, (num_prefix_tokens, 0)) if num_prefix_tokens else decision.mask
    # the compiler makes its own gradient
    mixed = _mixed if torch.compiler.is_compiling() else _Mixing.apply
    return mixed(tokens, decision.partner, mask.unsqueeze(-1))


def _mixed(tokens: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
    # index_select would not keep the layout, on which the host's own rounding may depend
    return torch.where(mask, tokens[partner], tokens)


class _Mixing(torch.autograd.Function):
    """:func:`_mixed`, whose gradient torch would compute in twice as many operations."""

    forward = staticmethod(_mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        partner, mask = ctx.saved_tensors
        kept = gradient.masked_fill(mask, 0)
        return kept.index_add_(0, partner, gradient * mask), None, None


@torch.no_grad()
def label_share(saliency: Tensor, decision: MixingDecision) -> Tensor:
    """Share of each label that comes from the partner, ``b / (a + b)``; (B,), float32 or wider.

    It is 0 for a sample without replaced tokens, or with a + b = 0.
    """
    saliency = saliency.to(_wide(saliency))
    mixed = torch.where(decision.mask, saliency.index_select(0, decision.partner), saliency)
    total = mixed.sum(1)
    return ((mixed * decision.mask).sum(1) / total).nan_to_num(0, 0, 0)


@torch.no_grad()
def mix_targets(targets: Tensor, saliency: Tensor, decision: MixingDecision) -> Tensor:
    """Relabel, ``y_i <- (a y_i + b y_j) / (a + b)``; (B, C) in the dtype of ``targets``.

    A sample without replaced tokens, or with a + b = 0, keeps its target as it is.
    """
    share = label_share(saliency, decision)
    dtype = torch.promote_types(targets.dtype, share.dtype)
    own, share = targets.to(dtype), share.to(dtype).unsqueeze(1)
    difference = own - own.index_select(0, decision.partner)
    # unlike `lerp`, this leaves a sample that is its own partner every bit, also of a negative zero
    return torch.addcmul(own, share, difference, value=-1).to(targets.dtype)


def horizontal_mixup(
    tokens: Tensor,
    targets: Tensor,
    saliency: Tensor,
    easy: Tensor,
    rho: float,
    num_prefix_tokens: int = 0,
) -> HorizontalMixup:
    """Horizontal TokenMixup: easy samples take the tokens that are more salient in a partner.

    With the partner j of easy sample i from :func:`assign_partners`, the mask is
    ``M_i[t] = (s_j[t] - s_i[t] > rho)``. Patch tokens of i under the mask become j's tokens at the
    same positions; prefix tokens stay i's own. The target becomes ``(a y_i + b y_j) / (a + b)``
    with ``a = sum_t s_i[t] (1 - M_i[t])`` and ``b = sum_t s_j[t] M_i[t]``. Batch order is kept,
    and shapes do not depend on how many samples are easy.

    Args:
        tokens: (B, N, D).
        targets: soft targets, (B, C).
        saliency: (B, T) with T = N - P.
        easy: (B,) bool, the samples that may be mixed.
        rho: smallest saliency difference that replaces a token, >= 0.
        num_prefix_tokens: P.

    Returns:
        :class:`HorizontalMixup`. Gradient flows through ``tokens`` only.

    Raises:
        ValueError: shapes do not fit, rho is negative, saliency is infinite, or a row of targets
            is negative or does not sum to 1.
    """
    _check_tokens(tokens, saliency, num_prefix_tokens)
    check_soft_targets(targets, tokens.shape[0], None)
    decision = decide_mixing(saliency, targets, easy, rho)
    return HorizontalMixup(
        mix_tokens(tokens, decision, num_prefix_tokens),
        mix_targets(targets, saliency, decision),
        decision.partner,
        decision.mask,
    )


def select_salient_tokens(
    tokens: Tensor, saliency: Tensor, kappa: int, num_prefix_tokens: int = 0
) -> Tensor:
    """The kappa most salient patch tokens of each sample, which Vertical TokenMixup remembers.

    Args:
        tokens: (B, N, D).
        saliency: (B, T) with T = N - P.
        kappa: tokens to keep, 1 <= kappa <= T.
        num_prefix_tokens: P.

    Returns:
        (B, K, D), most salient first, ties in order of position. Gradient flows into ``tokens``.

    Raises:
        ValueError: shapes do not fit or kappa is out of range.
    """
    _check_tokens(tokens, saliency, num_prefix_tokens)
    return gather_tokens(tokens, salient_positions(saliency, kappa), num_prefix_tokens)


def gather_tokens(tokens: Tensor, positions: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Patch tokens at positions (B, K) of tokens (B, N, D) -> (B, K, D)."""
    places = positions + num_prefix_tokens if num_prefix_tokens else positions
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


@torch.no_grad()
def salient_positions(saliency: Tensor, kappa: int) -> Tensor:
    """Positions of the kappa greatest saliencies, (B, T) -> (B, K) int64, greatest first."""
    if not 1 <= kappa <= saliency.shape[1]:
        raise ValueError(f"kappa must lie in 1..T = {saliency.shape[1]}, got {kappa}")
    return saliency.argsort(dim=1, descending=True, stable=True)[:, :kappa]


def _rows_at_once(like: Tensor, elements: int) -> int:
    """Rows to compute at once, where each needs a temporary of so many elements.

    Larger temporaries are memory that the system hands out anew each time, which takes longer than
    the computation.
    """
    most = _CPU_CHUNK if like.device.type == "cpu" else _DEVICE_CHUNK
    return max(1, most // max(1, elements))


def _widened(tensor: Tensor) -> Tensor:
    """In the wide type; contiguous, in the same operation, where that is another one."""
    dtype = _wide(tensor)
    if tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype, memory_format=torch.contiguous_format)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _reads_class_token(num_prefix_tokens: int, class_token: bool | None) -> bool:
    return num_prefix_tokens > 0 if class_token is None else class_token


def _check_prefix(tokens: int, num_prefix_tokens: int, name: str) -> None:
    if not 0 <= num_prefix_tokens < tokens:
        raise ValueError(
            f"num_prefix_tokens must leave at least one of the {tokens} tokens of {name} "
            f"as patch token, got {num_prefix_tokens}"
        )


def _check_saliency(saliency: Tensor, easy: Tensor, rho: float) -> None:
    if saliency.dim() != 2:
        raise ValueError(f"saliency must be (B, T), got shape {tuple(saliency.shape)}")
    if easy.dtype != torch.bool or easy.shape != saliency.shape[:1]:
        raise ValueError(
            f"easy must be a bool tensor of shape ({saliency.shape[0]},), the batch of saliency "
            f"{tuple(saliency.shape)}; got {easy.dtype} of shape {tuple(easy.shape)}"
        )
    if not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be a finite number >= 0, got {rho}")


def _check_tokens(tokens: Tensor, saliency: Tensor, num_prefix_tokens: int) -> None:
    if tokens.dim() != 3:
        raise ValueError(f"tokens must be (B, N, D), got shape {tuple(tokens.shape)}")
    _check_prefix(tokens.shape[1], num_prefix_tokens, "tokens")
    expected = (tokens.shape[0], tokens.shape[1] - num_prefix_tokens)
    if tuple(saliency.shape) != expected:
        raise ValueError(
            f"saliency must be (B, T) = {expected} for tokens of shape {tuple(tokens.shape)} with "
            f"{num_prefix_tokens} prefix tokens, got {tuple(saliency.shape)}"
        )
