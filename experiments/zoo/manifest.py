"""What is in the zoo: the checkpoints, where they come from, and the tables they belong to."""

import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml

from experiments.config import nearest
from experiments.errors import ConfigError

MANIFEST = Path(__file__).parent.parent.parent / "weights" / "zoo.yaml"
KINDS = ("torch", "npz", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights that can be fetched."""

    name: str
    file: str
    """File name in the folder of weights."""
    config: str
    """Name of the config whose model it fits."""
    dataset: str
    method: str
    drive: str | None = None
    """Id of a file on Google Drive."""
    url: str | None = None
    """Address of the file anywhere else."""
    mirrors: tuple[str, ...] = ()
    """Further addresses of the same file, asked when the first source fails."""
    kind: str = "torch"
    """What the content must be: torch (written by torch.save), npz or safetensors."""
    published_top1: float | None = None
    """Per cent."""
    size: int | None = None
    """Bytes, where known."""
    sha256: str | None = None
    """Lower-case hexadecimal, where known."""

    def __post_init__(self) -> None:
        if Path(self.file).name != self.file or self.file.startswith("."):
            raise ValueError(f"file: got {self.file!r}; allowed: a file name without a folder")
        if (self.drive is None) == (self.url is None):
            raise ValueError("drive, url: exactly one of them is needed")
        for url in (*self.mirrors, *([self.url] if self.url else [])):
            if not re.match(r"https?://", url):
                raise ValueError(f"url: got {url!r}; allowed: an address with http or https")
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}; allowed: one of {', '.join(KINDS)}")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: got {self.sha256!r}; allowed: 64 of 0-9 and a-f")

    @property
    def link(self) -> str:
        """The page or address that a person opens to fetch the file by hand."""
        if self.drive is not None:
            return f"https://drive.google.com/file/d/{self.drive}/view"
        assert self.url is not None
        return self.url


@dataclass(frozen=True)
class Baseline:
    """A row of a table for which no checkpoint was released; its name is that of its config."""

    name: str
    dataset: str
    method: str
    published_top1: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Dataset:
    """A data set of the tables."""

    name: str
    table: str
    images: int | None = None
    """Images of the whole validation split; a result on fewer is not the published one."""


@dataclass(frozen=True)
class Table:
    """One of the paper's tables."""

    name: str
    title: str


@dataclass(frozen=True)
class Row:
    """One line of a table: a config, and the checkpoint to be evaluated with it, if any."""

    name: str
    table: str
    dataset: Dataset
    method: str
    config: str
    published_top1: float | None
    checkpoint: Checkpoint | None
    note: str = ""


@dataclass(frozen=True)
class Manifest:
    """The whole zoo."""

    path: Path
    tables: dict[str, Table]
    datasets: dict[str, Dataset]
    baselines: dict[str, Baseline]
    checkpoints: dict[str, Checkpoint]
    configs: Path
    """Folder of the configs that the entries name."""

    def config_path(self, config: str) -> Path:
        """The file of a config, as short as it can be told from the current folder."""
        path = self.configs / f"{config}.yaml"
        here = Path.cwd()
        return path.relative_to(here) if path.is_relative_to(here) else path

    def checkpoint(self, name: str) -> Checkpoint:
        """Find a checkpoint by its name, its file's or its config's.

        Raises:
            ConfigError: there is none.
        """
        keys = ("name", "file", "config")
        return cast(Checkpoint, _find(self.checkpoints.values(), name, keys, "checkpoint"))

    def rows(self, table: str | None = None) -> list[Row]:
        """The rows of a table, or of all: by data set, baselines first."""
        found = [_baseline_row(b, self.datasets[b.dataset]) for b in self.baselines.values()]
        found += [_checkpoint_row(c, self.datasets[c.dataset]) for c in self.checkpoints.values()]
        order = [name for name, set_ in self.datasets.items() if table in (None, set_.table)]
        return [row for name in order for row in found if row.dataset.name == name]

    def row(self, name: str) -> Row:
        """Find a row by its name, the file of its checkpoint or its config.

        Raises:
            ConfigError: there is none.
        """
        rows = self.rows()
        by_file = {row.checkpoint.file: row for row in rows if row.checkpoint}
        return by_file.get(name) or cast(Row, _find(rows, name, ("name", "config"), "row"))


def _baseline_row(entry: Baseline, dataset: Dataset) -> Row:
    return Row(
        name=entry.name,
        table=dataset.table,
        dataset=dataset,
        method=entry.method,
        config=entry.name,
        published_top1=entry.published_top1,
        checkpoint=None,
        note=entry.note,
    )


def _checkpoint_row(entry: Checkpoint, dataset: Dataset) -> Row:
    return Row(
        name=entry.name,
        table=dataset.table,
        dataset=dataset,
        method=entry.method,
        config=entry.config,
        published_top1=entry.published_top1,
        checkpoint=entry,
    )


def _find(entries: Iterable[Any], name: str, by: tuple[str, ...], what: str) -> Any:
    entries = list(entries)
    for attribute in by:  # a name goes before a file, a file before a config
        for entry in entries:
            if getattr(entry, attribute) == name:
                return entry
    names = [entry.name for entry in entries]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"the nearest is {close[0]}" if close else f"known: {', '.join(names)}"
    raise ConfigError(f"command line: {name!r}: no such {what}; {hint}")


def read_manifest(path: Path = MANIFEST) -> Manifest:
    """Read the zoo's YAML file.

    Raises:
        ConfigError: file, key, what came and what is allowed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot read the zoo: {reason}") from None
    parts: dict[str, Any] = {
        "tables": Table,
        "datasets": Dataset,
        "baselines": Baseline,
        "checkpoints": Checkpoint,
    }
    _check_keys(str(path), content, {**parts, "configs": str})
    entries: dict[str, dict[str, Any]] = {}
    for part, section in parts.items():
        listed = content.get(part) or {}
        if not isinstance(listed, dict):
            raise ConfigError(f"{path}: {part}: got {listed!r}; allowed: names with values")
        entries[part] = {
            str(name): _entry(section, str(name), values, f"{path}: {part}.{name}")
            for name, values in listed.items()
        }
    configs = _typed(content.get("configs", "../configs"), str, f"{path}: configs")
    manifest = Manifest(path, **entries, configs=(path.parent / configs).resolve())
    _check_references(manifest)
    return manifest


def _entry(section: Any, name: str, values: Any, where: str) -> Any:
    hints = typing.get_type_hints(section)
    known = {field.name: field for field in fields(section) if field.name != "name"}
    _check_keys(where, values, known)
    for key, field in known.items():
        if key not in values and field.default is MISSING:
            raise ConfigError(f"{where}: {key}: missing; it has no default")
    typed = {key: _typed(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return section(name=name, **typed)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _typed(value: Any, hint: Any, where: str) -> Any:
    if hint == tuple[str, ...]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{where}: got {value!r}; allowed: a list of texts")
    allowed = [t for t in (str, int, float) if t in (hint, *typing.get_args(hint))]
    if float in allowed and isinstance(value, int):
        value = float(value)
    if value is None and type(None) in typing.get_args(hint):
        return None
    if type(value) not in allowed or (isinstance(value, float | int) and not value >= 0):
        words = {str: "text", int: "a whole number", float: "a number from 0"}
        names = " or ".join(words[t] for t in allowed)
        raise ConfigError(f"{where}: got {value!r}; allowed: {names}")
    return value


def _check_keys(where: str, values: Any, known: Mapping[str, object]) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: got {values!r}; allowed: keys with values")
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {key!r}: unknown key; {nearest(str(key), known)}")


def _check_references(manifest: Manifest) -> None:
    path = manifest.path
    for dataset in manifest.datasets.values():
        if dataset.table not in manifest.tables:
            raise ConfigError(
                f"{path}: datasets.{dataset.name}.table: got {dataset.table!r}; allowed: "
                f"{', '.join(manifest.tables)}"
            )
    files: dict[str, str] = {}
    entries: list[Baseline | Checkpoint] = list(manifest.baselines.values())
    for entry in [*entries, *manifest.checkpoints.values()]:
        if entry.dataset not in manifest.datasets:
            raise ConfigError(
                f"{path}: {entry.name}.dataset: got {entry.dataset!r}; allowed: "
                f"{', '.join(manifest.datasets)}"
            )
        if isinstance(entry, Checkpoint) and entry.file in files:
            raise ConfigError(f"{path}: {entry.name}.file: {entry.file} is {files[entry.file]}'s")
        if isinstance(entry, Checkpoint):
            files[entry.file] = entry.name
    both = manifest.baselines.keys() & manifest.checkpoints.keys()
    if both:
        raise ConfigError(f"{path}: {min(both)} is both a baseline and a checkpoint")
