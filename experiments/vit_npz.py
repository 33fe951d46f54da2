"""Google's ViT weights as they were first released: npz files with the names of flax modules.

Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929; also the later AugReg files.

Dimensions: D width, H heads, d = D / H, L layer index, P patch size.
"""

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_LARGEST_UNPACKED = 1 << 24  # bytes that any file may unpack to
_LARGEST_RATIO = 8  # weights hardly compress at all
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_RULES = (
    (r"cls", "cls_token"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed"),
    (_BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"LayerNorm_2/(scale|bias)", r"blocks.\1.norm2.\2"),
    (
        _BLOCK + r"MultiHeadDotProductAttention_1/(query|key|value)/(kernel|bias)",
        r"blocks.\1.attn.qkv.\3:\2",
    ),
    (_BLOCK + r"MultiHeadDotProductAttention_1/out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"MlpBlock_3/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"MlpBlock_3/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
)


def refuse_inflated_npz(path: Path) -> None:
    """Compare what the arrays of an npz claim with what it holds, before any is read.

    Raises:
        ValueError: an array is not of numbers, is larger than its part of the archive, or the whole
            unpacks to a multiple of the file that no weights reach.
    """
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    shape, _, kind = np.lib.format.read_array_header_1_0(file)
                else:
                    shape, _, kind = np.lib.format.read_array_header_2_0(file)
            if kind.hasobject:
                raise ValueError("Object arrays cannot be loaded: they are pickles")
            if kind.kind not in "fiu":
                raise ValueError(f"{member.filename} is of the type {kind}, not numbers")
            count = math.prod(shape)
            if min(shape, default=0) < 0 or count * kind.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims the shape {shape}, which it lacks")
            total += member.file_size
    if total > _LARGEST_UNPACKED + _LARGEST_RATIO * path.stat().st_size:
        raise ValueError(f"it unpacks to {total:,} bytes, far more than weights would")


def is_vit_npz(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the names are those of a released ViT."""
    return "embedding/kernel" in arrays and "Transformer/encoder_norm/scale" in arrays


def vit_state_dict(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays under Google's names -> state dict under the names of timm's VisionTransformer.

    Raises:
        ValueError: a name that no released ViT has, or an attention without one of its parts.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, array in arrays.items():
        target = _target(name)
        if target is None:
            unknown.append(name)
            continue
        ours, _, part = target.partition(":")
        tensor = _converted(name, torch.from_numpy(np.array(array, dtype=np.float32)))
        if part:
            parts.setdefault(ours, {})[part] = tensor
        else:
            state[ours] = tensor
    if unknown:
        raise ValueError(f"names that no released ViT has: {', '.join(sorted(unknown)[:8])}")
    for ours, found in parts.items():
        missing = [part for part in ("query", "key", "value") if part not in found]
        if missing:
            raise ValueError(f"{ours} lacks its {', '.join(missing)}")
        state[ours] = torch.cat([found[part] for part in ("query", "key", "value")])
    return state


def _target(name: str) -> str | None:
    for pattern, replacement in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            ours = match.expand(replacement)
            return re.sub(r"\.(kernel|scale)\b", ".weight", ours)
    return None


def _converted(name: str, array: Tensor) -> Tensor:
    """flax puts input dimensions first and keeps the heads apart; torch does neither."""
    if name == "embedding/kernel":
        return array.permute(3, 2, 0, 1).contiguous()  # (P, P, 3, D) -> (D, 3, P, P)
    if name.endswith("/out/kernel"):
        return array.flatten(0, 1).t().contiguous()  # (H, d, D) -> (D, H * d)
    if re.search(r"/(query|key|value)/kernel$", name):
        return array.flatten(1).t().contiguous()  # (D, H, d) -> (H * d, D)
    if re.search(r"/(query|key|value)/bias$", name):
        return array.flatten()  # (H, d) -> (H * d,)
    if name.endswith("/kernel"):
        return array.t().contiguous()  # (in, out) -> (out, in)
    return array
