"""Errors that the commands report in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A person's mistake. The commands print its message alone and exit with 2."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a value of a config file or of the command line that cannot be used."""


class DataError(UserError):
    """A data set that is missing, unreadable or different from what the config says."""


class MissingData(DataError):
    """A data set that is not where the config says."""


class CheckpointError(UserError):
    """A file of weights that is missing, unreadable or does not fit the model."""


class TrainingFailed(UserError):
    """A training process ended before its last epoch. Exit code: that of the process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code


class TrainingStopped(RuntimeError):
    """Training cannot continue, for example after a loss that is not finite. Exit code 3."""

    exit_code = 3


class ProcessLost(RuntimeError):
    """Another process of the run died or does not answer. Exit code 4."""

    exit_code = 4


class SavedAndStopped(Exception):
    """A run was asked to stop and has saved; the same command resumes it. Exit code 75."""

    exit_code = 75  # "try again later" in sysexits.h, which schedulers can act on


class FieldError(ValueError):
    """A value of a section's field that cannot be used together with the other fields.

    The reader of the config adds file and section, which the section does not know.
    """

    def __init__(self, field: str, came: object, allowed: str) -> None:
        super().__init__(f"{field}: got {came!r}; allowed: {allowed}")
        self.field = field
        self.came = came
        self.allowed = allowed


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names."""
    known = list(known)
    field = name.rpartition(".")[2]
    found = [key for key in known if key.rpartition(".")[2] == field]  # in another section
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"the nearest is {found[0]}" if found else "--help lists the known ones"
