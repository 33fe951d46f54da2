"""A slow second opinion on a host's attention: weights taken from the host, loops in float64.

It knows nothing of `tokenmixup.hosts`; explicit attention maps come from the hosts themselves, with
fused attention off.

Dimensions: B batch, H heads, N tokens with prefix, P prefix tokens, T = N - P patch tokens,
K keys, D width, d head width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.helpers import oracle
from tests.helpers.cases import array


def layers_of(host: nn.Module) -> list[nn.Module]:
    kind = type(host).__name__
    family, transformers, _ = kind.partition("ForImageClassification")
    if transformers:
        encoder = getattr(host, family.lower())
        if family == "Swin":
            return [layer for stage in encoder.encoder.layers for layer in stage.blocks]
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer)
    if hasattr(host, "features"):
        return [block for stage in host.features[1::2] for block in stage]
    for stages in ("layers", "stages"):
        if hasattr(host, stages):
            return [block for stage in getattr(host, stages) for block in stage.blocks]
    return list(host.blocks) if hasattr(host, "blocks") else list(host.encoder.layers)


def attention_of(layer: nn.Module) -> nn.Module:
    for name in ("attn", "self_attention", "self_attn", "attention"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError(type(layer))


def attending(attention: nn.Module) -> nn.Module:
    """The part that makes the map: of some versions of transformers, a module inside."""
    return getattr(attention, "attention", attention)


def norm_of(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a layer does to its tokens before it attends to them."""
    if type(layer).__name__ in ("ResPostBlock", "EvaBlockPostNorm", "SwinTransformerV2Block"):
        return nn.Identity()
    if isinstance(layer, nn.TransformerEncoderLayer) and not layer.norm_first:
        return nn.Identity()
    for name in ("norm1", "ln_1", "layernorm_before"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise AssertionError(type(layer))


def switch_off_fused_attention(host: nn.Module) -> nn.Module:
    """Make the host compute its maps, so that they can be looked at."""
    for module in host.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    if hasattr(host, "set_attn_implementation"):
        host.set_attn_implementation("eager")
    return host


@dataclass
class Seen:
    """What went through each layer in a forward pass."""

    tokens: dict[int, torch.Tensor] = field(default_factory=dict)  # as they entered the layer
    calls: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # arguments of the layer
    maps: dict[int, torch.Tensor] = field(default_factory=dict)  # where the host makes them
    inner: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # arguments of the attention
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)  # of the attention


@contextmanager
def watched(host: nn.Module) -> Iterator[Seen]:
    """Look at the host's layers from outside, after all hooks that are on them already."""
    seen, handles = Seen(), []
    for index, layer in enumerate(layers_of(host)):

        def enter(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            seen.tokens[index] = args[0].detach().clone().flatten(1, -2)  # a grid, row by row
            seen.calls[index] = (args, kwargs)

        def attend(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            seen.inner[index] = (args, kwargs)

        def leave(_: Any, __: Any, output: Any, index: int = index) -> None:
            if isinstance(output, tuple):
                output, attention_map = output
                if torch.is_tensor(attention_map):
                    seen.maps[index] = attention_map.detach()
            seen.outputs[index] = output.detach()

        def see_map(_: Any, __: Any, output: Any, index: int = index) -> None:
            seen.maps[index] = output.detach()

        attention = attention_of(layer)
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(attention.register_forward_pre_hook(attend, with_kwargs=True))
        handles.append(attention.register_forward_hook(leave))
        if isinstance(getattr(attention, "attn_drop", None), nn.Module):
            handles.append(attention.attn_drop.register_forward_hook(see_map))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Softmaxes(TorchFunctionMode):
    """Keeps what every softmax returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax":
            self.found.append(result)
        return result


def explicit_map(layer: nn.Module, tokens: torch.Tensor, args: Any, kwargs: Any) -> np.ndarray:
    """The layer's own attention map (B, H, N, N) for tokens (B, N, D); fused attention is off.

    Of an attention that never makes one, the map that is computed here; of windows, the map of the
    whole image, put together.
    """
    attention = attention_of(layer)
    with torch.no_grad():
        if isinstance(attention, nn.MultiheadAttention):
            normed = norm_of(layer)(tokens)
            return array(attention(normed, normed, normed, average_attn_weights=False)[1])
        with Softmaxes() as softmaxes:
            layer(tokens.reshape(args[0].shape), *args[1:], **kwargs)
        if not softmaxes.found:
            normed = norm_of(layer)(tokens)
            return naive_attention(attention, normed, normed, positions_of_own(tokens), 0)[1]
    (found,) = (array(each) for each in softmaxes.found)
    if args[0].dim() == 4 or type(layer).__name__ == "SwinLayer":
        grid = args[0].shape[1:3] if args[0].dim() == 4 else args[1]
        return map_of_windows(found, swin_windows(layer, *grid))
    if found.ndim == 5:  # (B, H, W, Q, K): Hiera's token t is in window t modulo W
        batch, heads, windows, queries, keys = found.shape
        whole = np.zeros((batch, heads, windows, queries, keys * windows))
        for w in range(windows):
            whole[:, :, w, :, w::windows] = found[:, :, w]
        return whole.reshape(batch, heads, windows * queries, keys * windows)
    return found


def own_saliency(
    layer: nn.Module, case: Any, tokens: torch.Tensor, args: Any, kwargs: Any
) -> np.ndarray:
    """(B, T), from the layer's own map and the case's word on its prefix tokens."""
    over_heads = explicit_map(layer, tokens, args, kwargs).mean(axis=1)
    row = over_heads[:, 0] if case.class_token else over_heads.mean(axis=1)
    of_keys = row[:, case.num_prefix_tokens :]
    keys, patches = of_keys.shape[1], tokens.shape[1] - case.num_prefix_tokens
    if keys == patches:
        return of_keys
    rows, columns = args[1]
    grid = (round(rows * math.sqrt(keys / patches)), round(columns * math.sqrt(keys / patches)))
    resized = [oracle.resize(one.reshape(grid), rows, columns).ravel() for one in of_keys]
    return np.stack(resized) * keys / patches


def swin_windows(layer: nn.Module, rows: int, columns: int) -> list[list[int | None]]:
    """Of each window, the tokens at its positions, None where the grid is padded."""
    its = layer.attn if type(layer).__module__.startswith("torchvision") else layer
    height, width = np.broadcast_to(its.window_size, 2).tolist()
    down, right = np.broadcast_to(its.shift_size, 2).tolist()
    pads_first = not type(layer).__module__.startswith("timm")
    all_rows, all_columns = math.ceil(rows / height) * height, math.ceil(columns / width) * width

    def token(r: int, c: int) -> int | None:
        if not pads_first:  # rolled, then padded
            if r >= rows or c >= columns:
                return None
            return (r + down) % rows * columns + (c + right) % columns
        # padded, then rolled, where there are several windows
        r = (r + (down if height < all_rows else 0)) % all_rows
        c = (c + (right if width < all_columns else 0)) % all_columns
        return r * columns + c if r < rows and c < columns else None

    return [
        [token(r, c) for r in range(top, top + height) for c in range(left, left + width)]
        for top in range(0, rows, height)
        for left in range(0, columns, width)
    ]


def map_of_windows(maps: np.ndarray, windows: list[list[int | None]]) -> np.ndarray:
    """(B W, H, n, n) -> (B, H, T, T), 0 between windows, without the attention of padding."""
    tokens = sum(position is not None for window in windows for position in window)
    whole = np.zeros((len(maps) // len(windows), maps.shape[1], tokens, tokens))
    for i in range(len(maps)):
        window = windows[i % len(windows)]
        for a, query in enumerate(window):
            for b, key in enumerate(window):
                if query is not None and key is not None:
                    whole[i // len(windows), :, query, key] = maps[i, :, a, b]
    return whole


def positions_of_own(tokens: torch.Tensor) -> np.ndarray:
    """(B, N): the n-th token stands at n."""
    return np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))


@dataclass
class Weights:
    """Of one attention: (out, in) matrices and (out,) biases."""

    query: tuple[np.ndarray, np.ndarray]
    key: tuple[np.ndarray, np.ndarray]
    value: tuple[np.ndarray, np.ndarray]
    out: tuple[np.ndarray, np.ndarray]
    heads: int
    key_heads: int


def weights_of(attention: nn.Module) -> Weights:
    def of(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
        bias = np.zeros(len(linear.weight)) if linear.bias is None else array(linear.bias)
        return array(linear.weight), bias

    def thirds(weight: Any, bias: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        bias = np.zeros(len(weight)) if bias is None else array(bias)
        return list(zip(np.split(array(weight), 3), np.split(bias, 3), strict=True))

    if isinstance(attention, nn.MultiheadAttention):
        parts = thirds(attention.in_proj_weight, attention.in_proj_bias)
        return Weights(*parts, of(attention.out_proj), attention.num_heads, attention.num_heads)
    if type(attention).__module__.startswith("transformers."):
        inner = attending(attention)
        if inner is attention:
            linears = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        else:
            linears = [inner.query, inner.key, inner.value, attention.output.dense]
        return Weights(*map(of, linears), inner.num_attention_heads, inner.num_attention_heads)
    heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
    out = of(attention.proj)
    if hasattr(attention, "kv"):
        halves = np.split(array(attention.kv.weight), 2), np.split(array(attention.kv.bias), 2)
        return Weights(of(attention.q), *zip(*halves, strict=True), out, heads, heads)
    if attention.qkv is None:
        parts = [of(getattr(attention, f"{name}_proj")) for name in "qkv"]
        return Weights(*parts, out, heads, getattr(attention, "num_kv_heads", heads))
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:
        zero = torch.zeros_like(attention.q_bias)
        bias = torch.cat((attention.q_bias, zero, attention.v_bias))
    return Weights(*thirds(attention.qkv.weight, bias), out, heads, heads)


def rotate(vector: np.ndarray, row: np.ndarray, half: bool) -> np.ndarray:
    """One query or key (d,), turned by the angles of one row (2 d,) of sines, then cosines."""
    width = len(vector)
    turned = np.zeros(width)
    for pair in range(width // 2):
        a, b = (pair, pair + width // 2) if half else (2 * pair, 2 * pair + 1)
        sine, cosine = row[a], row[width + a]
        turned[a] = vector[a] * cosine - vector[b] * sine
        turned[b] = vector[b] * cosine + vector[a] * sine
    return turned


def relative_bias(attention: nn.Module, shared: Any) -> np.ndarray | None:
    """BEiT's (H, N, N)."""
    if type(attention).__module__ != "timm.models.beit":
        return None
    bias = None if shared is None else array(shared)
    if attention.relative_position_bias_table is not None:
        own = array(attention._get_rel_pos_bias())[0]
        bias = own if bias is None else bias + own
    return bias


def naive_attention(
    attention: nn.Module,
    queries: torch.Tensor,
    keys: torch.Tensor,
    key_positions: np.ndarray,
    num_prefix_tokens: int,
    rope: Any = None,
    shared_rel_pos_bias: Any = None,
    **_: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the layer's own normalised tokens to normalised keys.

    Args:
        attention: the host's.
        queries: (B, N, D), the n-th at position n.
        keys: (B, K, D).
        key_positions: (B, K), prefix tokens counted.
        num_prefix_tokens: P; these are not rotated.
        rope: (T, 2 d) or (H, T, 2 d).
        shared_rel_pos_bias: (H, N, N).

    Returns:
        Output (B, N, D) and map (B, H, N, K).
    """
    weights = weights_of(attention)
    group = weights.heads // weights.key_heads
    size = len(weights.query[0]) // weights.heads
    bias = relative_bias(attention, shared_rel_pos_bias)
    rope = None if rope is None else array(rope)
    batch, own, _ = queries.shape

    def normed(name: str, x: np.ndarray) -> np.ndarray:
        norm = getattr(attention, name, None)
        return x if norm is None else array(norm(torch.from_numpy(x)))

    def turned(x: np.ndarray, position: int, head: int) -> np.ndarray:
        if rope is None or position < num_prefix_tokens:
            return x
        table = rope if rope.ndim == 2 else rope[head]
        return rotate(x, table[position - num_prefix_tokens], attention.rotate_half)

    def heads(tokens: torch.Tensor, part: tuple[np.ndarray, np.ndarray], name: str) -> np.ndarray:
        projected = array(tokens) @ part[0].T + part[1]
        return normed(name, projected.reshape(*projected.shape[:2], -1, size))

    q = heads(queries, weights.query, "q_norm")
    k = heads(keys, weights.key, "k_norm")
    v = heads(keys, weights.value, "v_norm")
    joined = np.zeros((batch, own, weights.heads * size))
    maps = np.zeros((batch, weights.heads, own, keys.shape[1]))
    for i in range(batch):
        for h in range(weights.heads):
            key = [
                turned(x, p, h) for x, p in zip(k[i, :, h // group], key_positions[i], strict=True)
            ]
            for n in range(own):
                query = turned(q[i, n, h], n, h)
                scores = np.array([query @ one for one in key]) / math.sqrt(size)
                if bias is not None:
                    scores = scores + bias[h, n, key_positions[i]]
                maps[i, h, n] = oracle.softmax(scores)
                joined[i, n, h * size : (h + 1) * size] = maps[i, h, n] @ v[i, :, h // group]
    joined = normed("norm", joined)
    if getattr(attention, "gate", None) is not None:
        gate = torch.sigmoid(attention.gate(queries))
        joined = joined * array(gate)
    return joined @ weights.out[0].T + weights.out[1], maps
