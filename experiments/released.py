"""Names of weights from elsewhere: the released checkpoints' and Google's, and strict loading.

Each name of a file is accounted for: it has a place in the model, or the result or an error names
it.

Dimensions: P patch size, D width, H heads, d width of a head, C classes, L layer index.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tokenmixup import TokenMixupModel

# Released name -> name in our models. A name with a colon is one of the three parts of qkv.
_CCT = (
    (r"tokenizer\.conv_layers\.(\d+)\.0\.weight", r"tokenizer.convolutions.\1.weight"),
    (r"classifier\.positional_emb", "pos_embed"),
    (r"classifier\.attention_pool\.(weight|bias)", r"pool.\1"),
    (r"classifier\.blocks\.(\d+)\.pre_norm\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (r"classifier\.blocks\.(\d+)\.norm1\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (r"classifier\.blocks\.(\d+)\.linear([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    (r"classifier\.blocks\.(\d+)\.self_attn\.qkv\.weight", r"blocks.\1.attn.qkv.weight"),
    (
        r"classifier\.blocks\.(\d+)\.self_attn\.(query|key|value)\.weight",
        r"blocks.\1.attn.qkv.weight:\2",
    ),
    (r"classifier\.blocks\.(\d+)\.self_attn\.proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (
        r"classifier\.blocks\.(\d+)\.small_h_attention_pool\.(weight|bias)",
        r"scorenets.\1.pool.\2",
    ),
    (r"classifier\.blocks\.(\d+)\.small_h_fc\.(weight|bias)", r"scorenets.\1.head.\2"),
    (r"classifier\.norm\.(weight|bias)", r"norm.\1"),
    (r"classifier\.fc\.(weight|bias)", r"head.\1"),
)
_LAYER = r"transformer\.encoder\.layer\.(\d+)\."
_VIT = (
    (r"transformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"transformer\.embeddings\.cls_token", "cls_token"),
    (r"transformer\.embeddings\.patch_embeddings\.(weight|bias)", r"patch_embed.proj.\1"),
    (_LAYER + r"attention_norm\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"ffn_norm\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"ffn\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    (_LAYER + r"attn\.(query|key|value)\.(weight|bias)", r"blocks.\1.attn.qkv.\3:\2"),
    (_LAYER + r"attn\.out\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"scorenet\.(weight|bias)", r"scorenets.\1.head.\2"),
    (r"transformer\.encoder\.encoder_norm\.(weight|bias)", r"norm.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
)
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_GOOGLE = (
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
    (r"pre_logits/(kernel|bias)", r"pre_logits.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
)
_FAMILIES = {"CCT": ("classifier.", _CCT), "ViT": ("transformer.", _VIT)}
_PARTS = ("query", "key", "value")
_SHOWN = 8  # names per message

HOST, SCORENETS, PRE_LOGITS = "backbone.", "scorenets.", "pre_logits."
RELEASED, NPZ = "released checkpoint", "npz of a ViT"


@dataclass(frozen=True)
class Loaded:
    """What became of the names of a file and of a model."""

    kind: str
    """What the file was."""
    left_out: tuple[str, ...]
    """Names of the model that are left as initialised."""
    unused: tuple[str, ...] = ()
    """Names in the file that the model has no use for: ScoreNets, where it has none, and with a new
    head the hidden layer of the old one."""
    resized: bool = False
    """Whether the position embedding was resized to another image size."""
    averaged: str = ""
    """The name of averaged weights that the file holds besides, and that were not loaded."""

    @property
    def notes(self) -> list[str]:
        """What a person should know about it, one line each."""
        notes = []
        if self.left_out:
            notes.append(f"left as initialised: {', '.join(self.left_out)}")
        if self.unused:
            notes.append(f"in the file, not used by the model: {', '.join(self.unused)}")
        if self.resized:
            notes.append("position embedding resized to the model's image size")
        if self.averaged:
            notes.append(
                f"the averaged weights in the file ({self.averaged}) are not used; "
                "experiments.zoo convert FILE --averaged writes them as a file of their own"
            )
        return notes


def is_released(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a released CCT or ViT checkpoint."""
    return _family(state_dict) is not None


def is_classifier(name: str) -> bool:
    """Whether a parameter of a model depends on the classes: its head and its ScoreNets."""
    return name.removeprefix(HOST).startswith(("head.", SCORENETS))


def load_released(
    model: nn.Module, state_dict: Mapping[str, Tensor], new_head: bool = False
) -> Loaded:
    """Load a state dict with the released names as `load_named` does; no ScoreNet may be missing.

    Raises:
        ValueError: a name that no released checkpoint has, or whatever `load_named` raises.
    """
    family = _family(state_dict)
    if family is None:
        raise ValueError(
            "the state dict has none of the released names (classifier.* of CCT, transformer.* of "
            f"ViT); its first names are {', '.join(sorted(state_dict)[:3])}"
        )
    renamed, sources = _renamed(state_dict, _FAMILIES[family][1], family)
    return load_named(model, renamed, RELEASED, new_head, sources)


def load_named(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    kind: str,
    new_head: bool = False,
    sources: Mapping[str, Collection[str]] | None = None,
) -> Loaded:
    """Load weights under our names, strictly.

    A file without ScoreNets leaves the model's as they are, the ScoreNets of a file are not used by
    a model that has none, and a ViT's position embedding is resized to another image size.

    Args:
        model: a plain host or a `TokenMixupModel` around one.
        weights: name in a plain host or in a `TokenMixupModel` -> tensor.
        kind: what the file was.
        new_head: leave the classifier and the ScoreNets out, for a data set of other classes.
        sources: name -> names in the file, where they differ, for the messages.

    Raises:
        ValueError: a name that cannot be accounted for, a parameter of the model without an
            entry, or a shape that does not fit. The model is then as it was.
    """
    own = model.state_dict()
    weights = under_names_of(model, weights)
    told = {name: (sources or {}).get(name.removeprefix(HOST), (name,)) for name in weights}
    here, there = (any(name.startswith(SCORENETS) for name in names) for names in (own, weights))
    hidden = [
        name
        for name in weights
        if name.removeprefix(HOST).startswith(PRE_LOGITS) and name not in own
    ]
    if hidden and not new_head:
        raise ValueError(
            f"its classifier has a hidden layer that the model's lacks ({', '.join(hidden)}), "
            "without which it would compute something else; to train a new classifier on the other "
            "weights, set model.new_head: true"
        )
    unused = hidden + [name for name in weights if name.startswith(SCORENETS) and not here]
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if name not in unused and not (new_head and is_classifier(name))
    }
    optional = () if there or kind == RELEASED else SCORENETS
    left_out = tuple(
        name for name in own if (new_head and is_classifier(name)) or name.startswith(optional)
    )
    resized = _resize_position_embedding(model, weights, kind == NPZ)
    load_strictly(model, weights, left_out, told)
    return Loaded(kind, left_out, tuple(found for name in unused for found in told[name]), resized)


def under_names_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain host or of a `TokenMixupModel`, under the names that the model uses."""
    if isinstance(model, TokenMixupModel):
        attached = (HOST, SCORENETS)
        return {n if n.startswith(attached) else HOST + n: t for n, t in weights.items()}
    if any(name.startswith(HOST) for name in model.state_dict()):  # a host's own name
        return dict(weights)
    return {name.removeprefix(HOST): tensor for name, tensor in weights.items()}


def _resize_position_embedding(model: nn.Module, weights: dict[str, Tensor], npz: bool) -> bool:
    """Resize a ViT's position embedding to the grid of the model's images, where it differs.

    As timm does: bilinear for Google's npz, bicubic with antialiasing for anything else.
    """
    from timm.layers import resample_abs_pos_embed
    from timm.models import VisionTransformer

    host = model.backbone if isinstance(model, TokenMixupModel) else model
    name = next((name for name in weights if name.removeprefix("backbone.") == "pos_embed"), "")
    if not isinstance(host, VisionTransformer) or host.pos_embed is None or not name:
        return False
    value, wanted = weights[name], host.pos_embed.shape
    if value.dim() != 3 or value.shape[1] == wanted[1] or value.shape[2] != wanted[2]:
        return False
    prefix = 0 if host.no_embed_class else host.num_prefix_tokens
    if math.isqrt(value.shape[1] - prefix) ** 2 != value.shape[1] - prefix:
        return False
    weights[name] = resample_abs_pos_embed(
        value,
        list(host.patch_embed.grid_size),
        num_prefix_tokens=prefix,
        interpolation="bilinear" if npz else "bicubic",
        antialias=not npz,
    )
    return True


def load_strictly(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    left_out: Collection[str],
    sources: Mapping[str, Collection[str]],
) -> None:
    """Load weights under the model's names; the model is unchanged if they do not fit.

    Args:
        model: changed in place.
        weights: name -> tensor.
        left_out: names of the model that keep their values.
        sources: name -> names in the file, for the messages.

    Raises:
        ValueError: names the weights without a place, those that are missing and wrong shapes.
    """

    def told(name: str) -> str:
        found = " + ".join(sources.get(name, (name,)))
        return found if found == name else f"{found} (here {name})"

    own = model.state_dict()
    expected = {name: tensor for name, tensor in own.items() if name not in left_out}
    problems = []
    for title, names in (
        ("without a place in the model", [told(name) for name in weights if name not in expected]),
        ("missing in the file", [name for name in expected if name not in weights]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{title}: {', '.join(sorted(names)[:_SHOWN])}{more}")
    problems += [
        f"{told(name)} is {tuple(tensor.shape)} in the file and {tuple(expected[name].shape)} in "
        "the model"
        for name, tensor in weights.items()
        if name in expected and tensor.shape != expected[name].shape
    ][:3]
    if problems:
        raise ValueError(f"does not fit the model; {'; '.join(problems)}")
    model.load_state_dict({**weights, **{name: own[name] for name in left_out}})


def google_vit(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays of Google's npz of a ViT -> state dict under the names of timm's VisionTransformer.

    timm's own reader fills a model and passes over names that it does not know, layers beyond the
    model's depth and a head of other classes; here each of them is an error.

    Raises:
        ValueError: the arrays are no ViT's, or a name or a part of an attention is wrong.
    """
    if not {"embedding/kernel", "Transformer/encoder_norm/scale"} <= arrays.keys():
        raise ValueError(f"is an npz of other arrays than a ViT's: {', '.join(sorted(arrays)[:4])}")
    tensors = {name: _from_flax(name, array) for name, array in arrays.items()}
    return _renamed(tensors, _GOOGLE, "ViT")[0]


def _from_flax(name: str, array: np.ndarray) -> Tensor:
    """flax puts input dimensions first and keeps the heads apart; torch does neither."""
    tensor = torch.from_numpy(np.array(array, dtype=np.float32))
    if re.search(r"/(query|key|value)/bias$", name):
        return tensor.flatten()  # (H, d) -> (H * d,)
    if not name.endswith("/kernel") or tensor.dim() < 2:
        return tensor
    if name == "embedding/kernel":
        return tensor.permute(3, 2, 0, 1).contiguous()  # (P, P, 3, D) -> (D, 3, P, P)
    if name.endswith("/out/kernel"):
        tensor = tensor.flatten(0, 1)  # (H, d, D) -> (H * d, D)
    return tensor.flatten(1).t().contiguous()  # (in, out) or (in, H, d) -> (out, in)


def _family(state_dict: Mapping[str, Tensor]) -> str | None:
    for family, (prefix, _) in _FAMILIES.items():
        if any(name.startswith(prefix) for name in state_dict):
            return family
    return None


def _renamed(
    state_dict: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...], family: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Our name -> tensor, and our name -> the names in the file that it comes from."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    sources: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in state_dict.items():
        target = _target(name, rules)
        if target is None:
            unknown.append(name)
            continue
        ours, _, part = target.partition(":")
        sources.setdefault(ours, []).append(name)
        if part:
            parts.setdefault(ours, {})[part] = tensor
        else:
            renamed[ours] = tensor
    if unknown:
        raise ValueError(f"names that no released {family} has: {', '.join(unknown[:_SHOWN])}")
    for ours, found in parts.items():
        missing = [part for part in _PARTS if part not in found]
        if missing or ours in renamed:
            problem = f"without {', '.join(missing)}" if missing else "beside a joint qkv"
            raise ValueError(f"{ours}: the file has {', '.join(sources[ours])} {problem}")
        renamed[ours] = torch.cat([found[part] for part in _PARTS])
    return renamed, sources


def _target(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return re.sub(r"\.(kernel|scale)\b", ".weight", match.expand(replacement))
    return None
