"""The parameter names of the checkpoints that the paper's authors released.

Each released name is accounted for: it has a place in our models, or is named in an error.

Dimensions: D width, C classes, L layer index.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenmixup import TokenMixupModel

_CCT_RULES = (
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
_VIT_LAYER = r"transformer\.encoder\.layer\.(\d+)\."
_VIT_RULES = (
    (r"transformer\.embeddings\.position_embeddings", "pos_embed"),
    (r"transformer\.embeddings\.cls_token", "cls_token"),
    (r"transformer\.embeddings\.patch_embeddings\.(weight|bias)", r"patch_embed.proj.\1"),
    (_VIT_LAYER + r"attention_norm\.(weight|bias)", r"blocks.\1.norm1.\2"),
    (_VIT_LAYER + r"ffn_norm\.(weight|bias)", r"blocks.\1.norm2.\2"),
    (_VIT_LAYER + r"ffn\.fc([12])\.(weight|bias)", r"blocks.\1.mlp.fc\2.\3"),
    (_VIT_LAYER + r"attn\.(query|key|value)\.(weight|bias)", r"blocks.\1.attn.qkv.\3:\2"),
    (_VIT_LAYER + r"attn\.out\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (_VIT_LAYER + r"scorenet\.(weight|bias)", r"scorenets.\1.head.\2"),
    (r"transformer\.encoder\.encoder_norm\.(weight|bias)", r"norm.\1"),
    (r"head\.(weight|bias)", r"head.\1"),
)
_FAMILIES = {"CCT": ("classifier.", _CCT_RULES), "ViT": ("transformer.", _VIT_RULES)}
_PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class LoadReport:
    """What became of the entries of a state dict.

    Attributes:
        loaded: names of the model's parameters that were filled.
        unused: names in the file that the model has no use for: ScoreNets where it has none.
        left_out: names of the model's parameters that stay as initialised: its new classifiers.
    """

    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def is_released(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a released CCT or ViT checkpoint."""
    return _family(state_dict) is not None


def is_classifier(name: str) -> bool:
    """Whether a parameter of a model belongs to what knows the classes: its head, its ScoreNets."""
    return name.removeprefix("backbone.").startswith(("head.", "scorenets."))


def load_released(
    model: nn.Module, state_dict: Mapping[str, Tensor], new_head: bool = False
) -> LoadReport:
    """Load a state dict with the released names, strictly.

    Args:
        model: a plain host (our CCT, timm's ViT) or a `TokenMixupModel` around one. A ScoreNet of
            the file is left out, and named in the report, only where the model has none at all.
        state_dict: released name -> tensor.
        new_head: leave the classifier and the ScoreNets out, for a data set of other classes.

    Returns:
        What was loaded and what was left out.

    Raises:
        ValueError: a name that cannot be accounted for, a parameter of the model without an
            entry, or a shape that does not fit. The model is then as it was.
    """
    family = _family(state_dict)
    if family is None:
        raise ValueError(
            "the state dict has none of the released names (classifier.* of CCT, transformer.* of "
            f"ViT); its first names are {', '.join(sorted(state_dict)[:3])}"
        )
    renamed, sources = _rename(state_dict, family)
    attached = isinstance(model, TokenMixupModel)
    has_scorenet = isinstance(model, TokenMixupModel) and len(model.scorenets) > 0
    unused = () if has_scorenet else tuple(n for n in renamed if n.startswith("scorenets."))
    wanted = {
        f"backbone.{name}" if attached and not name.startswith("scorenets.") else name: tensor
        for name, tensor in renamed.items()
        if name not in unused and not (new_head and is_classifier(name))
    }
    own = model.state_dict()
    left_out = tuple(name for name in own if new_head and is_classifier(name))
    _check_fit({n: t for n, t in own.items() if n not in left_out}, wanted, sources, attached)
    model.load_state_dict({**wanted, **{name: own[name] for name in left_out}})
    return LoadReport(tuple(wanted), tuple(s for name in unused for s in sources[name]), left_out)


def _family(state_dict: Mapping[str, Tensor]) -> str | None:
    for family, (prefix, _) in _FAMILIES.items():
        if any(name.startswith(prefix) for name in state_dict):
            return family
    return None


def _rename(
    state_dict: Mapping[str, Tensor], family: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Our name -> tensor, and our name -> the released names that it comes from."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    sources: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in state_dict.items():
        target = _target(name, family)
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
        raise ValueError(f"names that no released {family} has: {', '.join(unknown)}")
    for ours, found in parts.items():
        missing = [part for part in _PARTS if part not in found]
        if missing or ours in renamed:
            problem = f"without its {', '.join(missing)}" if missing else "beside a joint qkv"
            raise ValueError(f"{', '.join(sources[ours])} stand {problem} in the state dict")
        renamed[ours] = torch.cat([found[part] for part in _PARTS])
    return renamed, sources


def _target(name: str, family: str) -> str | None:
    for pattern, replacement in _FAMILIES[family][1]:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def _check_fit(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    sources: Mapping[str, list[str]],
    attached: bool,
) -> None:
    def released(name: str) -> str:
        return " + ".join(sources[name.removeprefix("backbone.") if attached else name])

    problems = [
        f"{released(name)} has no place in the model (it would be {name})"
        for name in found
        if name not in expected
    ]
    problems += [
        f"nothing in the state dict fills {name}" for name in expected if name not in found
    ]
    problems += [
        f"{released(name)} has shape {tuple(tensor.shape)}, but {name} has "
        f"{tuple(expected[name].shape)}"
        for name, tensor in found.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if problems:
        raise ValueError("the released state dict does not fit the model: " + "; ".join(problems))
