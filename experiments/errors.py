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


class TrainingStopped(RuntimeError):
    """Training cannot go on, for example after a loss that is not finite. Exit code 3."""

    exit_code = 3


class FieldError(ValueError):
    """An impossible value, raised by the section in which the field is born.

    The reader of the config adds the file and the section, which a section cannot know.
    """

    def __init__(self, field: str, came: object, allowed: str) -> None:
        super().__init__(f"{field}: got {came!r}; allowed: {allowed}")
        self.field = field
        self.came = came
        self.allowed = allowed
