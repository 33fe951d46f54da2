"""The plan of a study: variants of one training, each with the same seeds, from one YAML file."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.config.keys import optional_sections
from experiments.config.reading import Setting, build_config, override, read_settings, settings_of
from experiments.config.schema import RunConfig, as_plain, dotted_keys
from experiments.errors import ConfigError, nearest
from experiments.strict_yaml import read_yaml
from experiments.study.variants import RULES, rules_of

_OPTIONAL = ("set", "test_split", "claims", "arms")
_REQUIRED = ("title", "about", "config", "plain", "seeds", "variants")
_VARIANT_KEYS = ("about", "like", "config", "set", "with", "against")


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes:
        name: of the variant.
        about: what it is, in words.
        file: the config that it starts from.
        settings: of the training.
        substitutions: names of the rules that replace the library's.
        against: the variant that it is compared with beside the plain one, or None.
    """

    name: str
    about: str
    file: str
    settings: Mapping[str, Setting]
    substitutions: tuple[str, ...] = ()
    against: str | None = None

    @property
    def folder(self) -> str:
        """The name as a folder's name."""
        return re.sub(r"[^A-Za-z0-9._]+", "-", self.name).strip("-")


@dataclass(frozen=True)
class Claims:
    """What a study asks, said before its first training: pairs (variant, the one it is beside).

    Attributes:
        margin: points within which two variants are called equal.
        primary: the questions, whose p-values are corrected together by Holm's method.
        beside: further pairs, not corrected, that decide nothing.
        control: a pair that is known to differ; where the first is not better, the study is called
            insensitive.
    """

    margin: float
    primary: tuple[tuple[str, str], ...]
    beside: tuple[tuple[str, str], ...]
    control: tuple[str, str]


@dataclass(frozen=True)
class Study:
    """Variants, each trained with the same seeds.

    Attributes:
        name: the file's name, without its ending.
        file: the YAML file, or the words that stand for it in messages.
        title: for pages and pictures.
        about: the question, in words.
        plain: the variant that all others are compared with; "" if nothing is compared.
        seeds: of the trainings.
        variants: by name, in the order of the file.
        test_split: on which the final weights are measured, once; None for the validation split of
            the config, after the last epoch.
        claims: said beforehand, or None.
        arms: of a search: of each the best variant is taken. "HTM" has the variants "HTM, …".
    """

    name: str
    file: str
    title: str
    about: str
    plain: str
    seeds: tuple[int, ...]
    variants: dict[str, Variant] = field(default_factory=dict)
    test_split: str | None = None
    claims: Claims | None = None
    arms: tuple[str, ...] = ()

    def arm(self, name: str) -> list[str]:
        """The names of an arm's variants."""
        return [variant for variant in self.variants if variant.partition(", ")[0] == name]

    def runs(self) -> Iterator[tuple[Variant, int]]:
        """All trainings, seed by seed, so that an unfinished study has pairs, too."""
        for seed in self.seeds:
            for variant in self.variants.values():
                yield variant, seed

    def config(
        self,
        variant: Variant,
        seed: int,
        overrides: Mapping[str, str] | None = None,
        output: Path | None = None,
    ) -> RunConfig:
        """The config of one training.

        Raises:
            ConfigError: a value that cannot be used.
        """
        settings = override(variant.settings, overrides or {})
        settings["seed"] = Setting(seed, self.file)
        settings["output"] = Setting(str(output or Path("output")), self.file)
        return build_config(settings, self.file)

    def identity(
        self, variant: Variant, seed: int, overrides: Mapping[str, str] | None = None
    ) -> str:
        """A hash of what a result depends on; the place of the data does not count."""
        config = self.config(variant, seed, overrides)
        plain = as_plain(config) | {"output": None, "logging": None, "checkpoint": None}
        plain["data"] |= {"root": None, "download": None, "workers": None}
        plain["substitutions"] = sorted(variant.substitutions)
        # as the first records have it, when there was no more to choose
        plain["compile"] = {"off": False, "on": True}.get(plain["compile"], plain["compile"])
        # younger than the first records, whose hashes do not count them
        for section, key, default in (
            (plain, "tokenmixup_off_epoch", None),
            (plain["data"], "per_class", None),
            (plain["mixup"], "off_epoch", None),
            (plain["horizontal"] or {}, "labels", "saliency"),
        ):
            if section.get(key, default) == default:
                section.pop(key, None)
        if self.test_split is not None:
            plain["test_split"] = self.test_split
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    def differences(self, variant: Variant, other: str | None = None) -> dict[str, Any]:
        """Settings that differ from another variant's, by default the plain one's: key -> value."""
        if not (other or self.plain):
            return {}
        plain = _compared(self.config(self.variants[other or self.plain], 0))
        own = _compared(self.config(variant, 0))
        nowhere = object()  # null is a value, too
        return {
            key: own.get(key)
            for key in dict.fromkeys((*own, *plain))
            if own.get(key, nowhere) != plain.get(key, nowhere)
        }


def read_study(path: str | Path) -> Study:
    """Read a study and check all of it, each config included.

    Raises:
        ConfigError: file, key, what came and what is allowed, in one line.
    """
    content = _mapping(read_yaml(path), str(path), (*_REQUIRED, *_OPTIONAL))
    for key in _REQUIRED:
        if key not in content:
            raise ConfigError(f"{path}: {key}: missing; it has no default")
    for key in ("title", "about", "config", "plain"):
        _check_text(content[key], f"{path}: {key}")
    variants: dict[str, Variant] = {}
    given = _mapping(content["variants"], f"{path}: variants")
    for name, value in given.items():
        variants[name] = _variant(str(name), value, content, variants, str(path))
    if content["plain"] not in variants:
        raise ConfigError(
            f"{path}: plain: got {content['plain']!r}; {nearest(content['plain'], variants)}"
        )
    study = Study(
        name=Path(path).stem,
        file=str(path),
        title=content["title"],
        about=" ".join(content["about"].split()),
        plain=content["plain"],
        seeds=_seeds(content["seeds"], str(path)),
        variants=variants,
        test_split=content.get("test_split"),
        claims=_claims(content["claims"], variants, str(path)) if "claims" in content else None,
        arms=_arms(content.get("arms", []), variants, str(path)),
    )
    if study.test_split is not None:
        _check_text(study.test_split, f"{path}: test_split")
    _check_variants(study)
    return study


def _variant(
    name: str, value: Any, study: Mapping[str, Any], known: Mapping[str, Variant], path: str
) -> Variant:
    where = f"{path}: variants.{name}"
    content = _mapping(value, where, _VARIANT_KEYS)
    like = content.get("like")
    if like is not None and like not in known:
        raise ConfigError(f"{where}.like: got {like!r}; allowed: a variant that stands before it")
    if like is not None and "config" in content:
        raise ConfigError(f"{where}.config: has no meaning beside like")
    if like is not None:
        base = known[like]
    else:
        file = _check_text(content.get("config", study["config"]), where)
        settings = _overlaid(read_settings(file), study.get("set"), f"{path}: set")
        base = Variant(name, name, file, settings)
    rules = content.get("with") or []
    if not isinstance(rules, list) or not all(rule in [*RULES] for rule in rules):
        raise ConfigError(f"{where}.with: got {rules!r}; allowed: a list of {', '.join(RULES)}")
    substitutions = (*base.substitutions, *rules)
    try:
        rules_of(substitutions)
    except ValueError as error:
        raise ConfigError(f"{where}.with: {error}") from None
    return Variant(
        name=name,
        about=" ".join(_check_text(content.get("about", name), f"{where}.about").split()),
        file=base.file,
        settings=_overlaid(base.settings, content.get("set"), f"{where}.set"),
        substitutions=substitutions,
        against=content.get("against", like),
    )


def _overlaid(settings: Mapping[str, Setting], content: Any, where: str) -> dict[str, Setting]:
    """Settings with others on top; null switches an optional section off."""
    found = dict(settings)
    for section in optional_sections():
        if isinstance(content, dict) and section in content and content[section] is None:
            found = {k: v for k, v in found.items() if not k.startswith(f"{section}.")}
    return found | settings_of(content, where)


def _check_variants(study: Study) -> None:
    """Refuse configs that cannot be used, and a variant that is the same training as another."""
    seen: dict[str, str] = {}
    for variant in study.variants.values():
        where = f"{study.file}: variants.{variant.name}"
        if variant.against is not None and variant.against not in study.variants:
            near = nearest(str(variant.against), study.variants)
            raise ConfigError(f"{where}.against: got {variant.against!r}; {near}")
        try:
            identity = study.identity(variant, study.seeds[0])
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        if identity in seen:
            raise ConfigError(f"{where}: is the same training as {seen[identity]}")
        seen[identity] = variant.name


def _arms(value: Any, variants: Mapping[str, Variant], path: str) -> tuple[str, ...]:
    found = list(dict.fromkeys(name.partition(", ")[0] for name in variants))
    if value and value != found:
        allowed = f"what stands before the first comma of the variants' names: {found}"
        raise ConfigError(f"{path}: arms: got {value!r}; allowed: {allowed}")
    return tuple(value)


def _claims(value: Any, variants: Mapping[str, Variant], path: str) -> Claims:
    where = f"{path}: claims"
    content = _mapping(value, where, ("margin", "primary", "beside", "control"))
    margin = content.get("margin")
    if not isinstance(margin, float) or margin <= 0:
        raise ConfigError(f"{where}.margin: got {margin!r}; allowed: a number above 0, as 0.3")

    def pair(given: Any, key: str) -> tuple[str, str]:
        good = isinstance(given, list) and len(given) == 2
        if not good or any(name not in [*variants] for name in given):
            allowed = f"[NAME, NAME] with names of {', '.join(variants)}"
            raise ConfigError(f"{where}.{key}: got {given!r}; allowed: {allowed}")
        return given[0], given[1]

    def pairs(key: str) -> tuple[tuple[str, str], ...]:
        given = content.get(key, [])
        if not isinstance(given, list):
            raise ConfigError(f"{where}.{key}: got {given!r}; allowed: a list of pairs")
        return tuple(pair(each, key) for each in given)

    return Claims(
        margin, pairs("primary"), pairs("beside"), pair(content.get("control"), "control")
    )


def _seeds(value: Any, path: str) -> tuple[int, ...]:
    good = isinstance(value, list) and value and all(type(seed) is int for seed in value)
    if not good or len(set(value)) < len(value) or min(value) < 0:
        raise ConfigError(f"{path}: seeds: got {value!r}; allowed: whole numbers, each once")
    return tuple(value)


def _mapping(value: Any, where: str, known: tuple[str, ...] | None = None) -> dict[str, Any]:
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: got {value!r}; allowed: keys with values")
    for key in value:
        if known is not None and key not in known:
            raise ConfigError(f"{where}: {key!r}: unknown key; allowed: {', '.join(known)}")
    return value


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: got {value!r}; allowed: text that is not empty")
    return value


def _compared(config: RunConfig) -> dict[str, Any]:
    """The keys that tell variants apart; an absent section has none."""
    left_out = ("seed", "output", "logging", "checkpoint")
    return {
        key: value
        for key, value in dotted_keys(as_plain(config)).items()
        if key.partition(".")[0] not in left_out and ("." in key or value is not None)
    }
