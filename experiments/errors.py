"""What a person did that cannot work, told in one line."""


class UserError(ValueError):
    """A mistake in what was asked for. The entry points print it alone and exit with 2."""

    exit_code = 2


class ConfigError(UserError):
    """A key or a value of a config file or of the command line that cannot be used."""


class DataError(UserError):
    """A data set that is missing, unreadable or not what the config says."""


class CheckpointError(UserError):
    """A file of weights that is missing, unreadable or does not fit the model."""


class TrainingFailed(UserError):
    """A training's process ended before its last epoch. Exit code: that of the process."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code if exit_code > 0 else 128 - exit_code


class TrainingStopped(RuntimeError):
    """Training cannot go on, for example after a loss that is not finite. Exit code 3."""

    exit_code = 3


class ProcessLost(RuntimeError):
    """Another process of the run died or does not answer. Exit code 4."""

    exit_code = 4


class SavedAndStopped(Exception):
    """A run was asked to stop and has saved itself: the same command goes on. Exit code 75."""

    exit_code = 75  # "try again later" in sysexits.h, which schedulers can act on


class FieldError(ValueError):
    """An impossible value, raised by the section in which the field is born.

    The reader of the config adds the file and the section, which a section cannot know.
    """

    def __init__(self, field: str, came: object, allowed: str) -> None:
        super().__init__(f"{field}: got {came!r}; allowed: {allowed}")
        self.field = field
        self.came = came
        self.allowed = allowed
