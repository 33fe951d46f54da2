"""What is in the zoo: the checkpoints, where they come from, and the tables they belong to."""

from collections.abc import Iterable
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from experiments.errors import ConfigError, nearest
from experiments.strict_yaml import read_yaml

MANIFEST = Path(__file__).parent.parent.parent / "weights" / "zoo.yaml"
_CHECKED = ConfigDict(extra="forbid")

Percent = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=0)]


@dataclass(frozen=True, config=_CHECKED)
class Checkpoint:
    """A file of weights that can be fetched."""

    name: str
    file: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]
    """File name in the folder of weights."""
    config: str
    """Name of the config whose model it fits."""
    dataset: str
    method: str
    drive: str | None = None
    """Id of a file on Google Drive."""
    url: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = None
    """Address of the file anywhere else."""
    published_top1: Percent | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Where known."""

    def __post_init__(self) -> None:
        if (self.drive is None) == (self.url is None):
            raise ValueError("exactly one of drive and url")

    @property
    def link(self) -> str:
        """The page or address that a person opens to fetch the file by hand."""
        if self.drive is not None:
            return f"https://drive.google.com/file/d/{self.drive}/view"
        assert self.url is not None
        return self.url


@dataclass(frozen=True, config=_CHECKED)
class Baseline:
    """A row of a table for which no checkpoint was released; its name is that of its config."""

    name: str
    dataset: str
    method: str
    published_top1: Percent | None = None
    note: str = ""


@dataclass(frozen=True, config=_CHECKED)
class Dataset:
    """A data set of the tables."""

    name: str
    table: str
    images: Count | None = None
    """Images of the whole validation split; a result on fewer is not the published one."""


@dataclass(frozen=True, config=_CHECKED)
class Table:
    """One of the paper's tables."""

    name: str
    title: str


@plain_dataclass(frozen=True)
class Row:
    """One line of a table: a config, and the checkpoint to be evaluated with it, if any."""

    name: str
    table: str
    dataset: Dataset
    method: str
    config: str
    published_top1: float | None
    checkpoint: Checkpoint | None
    note: str

    @property
    def file(self) -> str | None:
        """The file of its checkpoint."""
        return self.checkpoint.file if self.checkpoint else None


@dataclass(frozen=True, config=_CHECKED)
class Manifest:
    """The whole zoo."""

    path: Path
    tables: dict[str, Table] = field(default_factory=dict)
    datasets: dict[str, Dataset] = field(default_factory=dict)
    baselines: dict[str, Baseline] = field(default_factory=dict)
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    configs: Path = Path("../configs")
    """Folder of the configs that the entries name; in the file, relative to the file."""

    @property
    def entries(self) -> list[Baseline | Checkpoint]:
        """The baselines, then the checkpoints."""
        return [*self.baselines.values(), *self.checkpoints.values()]

    def config_path(self, config: str) -> Path:
        """The file of a config, relative to the current folder where it lies inside it."""
        path = (self.path.parent / self.configs / f"{config}.yaml").resolve()
        here = Path.cwd()
        return path.relative_to(here) if path.is_relative_to(here) else path

    def checkpoint(self, name: str) -> Checkpoint:
        """Find a checkpoint by its name, its file or its config.

        Raises:
            ConfigError: there is none.
        """
        return _find(list(self.checkpoints.values()), name, "checkpoint")

    def rows(self, table: str | None = None) -> list[Row]:
        """The rows of one table or of all tables: by data set, baselines first."""
        found = []
        for dataset in self.datasets.values():
            for entry in self.entries:
                if entry.dataset != dataset.name or table not in (None, dataset.table):
                    continue
                checkpoint = self.checkpoints.get(entry.name)
                baseline = self.baselines.get(entry.name)
                found.append(
                    Row(
                        entry.name,
                        dataset.table,
                        dataset,
                        entry.method,
                        checkpoint.config if checkpoint else entry.name,
                        entry.published_top1,
                        checkpoint,
                        baseline.note if baseline else "",
                    )
                )
        return found

    def row(self, name: str) -> Row:
        """Find a row by its name, the file of its checkpoint or its config.

        Raises:
            ConfigError: there is none.
        """
        return _find(self.rows(), name, "row")


_Entry = TypeVar("_Entry", Checkpoint, Row)


def _find(entries: list[_Entry], name: str, what: str) -> _Entry:
    for attribute in ("name", "file", "config"):
        for entry in entries:
            if getattr(entry, attribute) == name:
                return entry
    names = [entry.name for entry in entries]
    hint = nearest(name, names)
    if not hint.startswith("the nearest"):
        hint = f"known: {', '.join(names)}"
    raise ConfigError(f"command line: {name!r}: no such {what}; {hint}")


_ENTRIES = {"tables": Table, "datasets": Dataset, "baselines": Baseline, "checkpoints": Checkpoint}


def read_manifest(path: Path = MANIFEST) -> Manifest:
    """Read the zoo's YAML file.

    Raises:
        ConfigError: file, key, what came and what is allowed.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got {content!r:.200}; allowed: keys with values")
    named = {**content, "path": path}
    for part in _ENTRIES.keys() & content.keys():
        named[part] = _with_names(content[part], f"{path}: {part}")
    try:
        manifest = TypeAdapter(Manifest).validate_python(named)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_told(error)}") from None
    for problem in _wrong_references(manifest):
        raise ConfigError(f"{path}: {problem}")
    return manifest


def _with_names(entries: Any, where: str) -> Any:
    """Each entry with its name as a field, which the file gives as the entry's key."""
    if not isinstance(entries, dict):
        return {} if entries is None else entries
    for name, values in entries.items():
        if isinstance(values, dict) and "name" in values:
            raise ConfigError(f"{where}.{name}: 'name': unknown key; {name!r} is the name")
    return {n: {**v, "name": n} if isinstance(v, dict) else v for n, v in entries.items()}


def _told(error: ValidationError) -> str:
    """The first mistake: key, what came, what is allowed."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        section, _, name = key.rpartition(".")
        part = _ENTRIES.get(str(problem["loc"][0])) if section else None
        known = [f.name for f in fields(part or Manifest) if f.name not in ("name", "path")]
        return f"{section}{': ' if section else ''}{name!r}: unknown key; {nearest(name, known)}"
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it has no default"
    allowed = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{key}: got {problem['input']!r:.200}; allowed: {allowed}"


def _wrong_references(manifest: Manifest) -> Iterable[str]:
    for dataset in manifest.datasets.values():
        if dataset.table not in manifest.tables:
            allowed = ", ".join(manifest.tables)
            yield f"datasets.{dataset.name}.table: got {dataset.table!r}; allowed: {allowed}"
    for entry in manifest.entries:
        if entry.dataset not in manifest.datasets:
            allowed = ", ".join(manifest.datasets)
            yield f"{entry.name}.dataset: got {entry.dataset!r}; allowed: {allowed}"
    owners: dict[str, str] = {}
    for checkpoint in manifest.checkpoints.values():
        if checkpoint.file in owners:
            yield f"{checkpoint.name}.file: {checkpoint.file} is {owners[checkpoint.file]}'s"
        owners[checkpoint.file] = checkpoint.name
    for name in sorted(manifest.baselines.keys() & manifest.checkpoints.keys()):
        yield f"{name} is both a baseline and a checkpoint"
