"""The parts of rows 7 to 10, each a row of its own with a time limit."""

import functools
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import ceilings, epoch, loading, steps
from benchmarks.gpu.models import MODELS
from benchmarks.row import Measurement, Row, Settings, Target, Values
from experiments.provenance import ROOT

MODES = ("off", "on", "graphs")
"""Of the config's `compile`."""
FILES = ROOT / "output" / "benchmarks"
SECONDS = 480.0


class OutOfTime(BaseException):
    """Ends a part; no library's `except Exception` keeps it."""


def limited(seconds: float, action: Callable[[], None]) -> None:
    """Stop an action after some seconds, wherever it is."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        action()
    except OutOfTime:
        print(f"stopped after {seconds:g} s; what was measured is kept", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Part:
    """What one command measures."""

    measure: Callable[[Settings, Values], None]
    tables: Callable[[Values], str]
    targets: Callable[[Values], list[Target]] = lambda values: []


def parts(files: Path = FILES) -> dict[str, Part]:
    """All parts, by name; traces go to the folder `files`."""
    found: dict[str, Part] = {}
    for key, model in MODELS.items():
        for mode in MODES:
            found[f"{key}-{mode}"] = Part(
                functools.partial(steps.measure, model, mode, files),
                functools.partial(steps.tables, model),
                *([] if mode == "off" else [functools.partial(steps.targets, model, mode)]),
            )
        found[f"{key}-loading"] = Part(
            functools.partial(loading.measure, model),
            functools.partial(loading.tables, model),
            functools.partial(loading.targets, model),
        )
    found["epoch"] = Part(functools.partial(epoch.measure, files), epoch.tables)
    found["ceilings"] = Part(ceilings.measure, ceilings.tables)
    return found


def make_row(name: str, part: Part, seconds: float = SECONDS) -> Row:
    """The row of a part."""

    def measure(settings: Settings) -> Values:
        found: Values = {}
        limited(seconds, lambda: part.measure(settings, found))
        return found

    def tables(values: Values) -> str:
        return part.tables(values) if values else "Nothing was measured in time.\n"

    return Row(f"gpu-{name}", measure, tables, part.targets, f"gpu {name}")


ROWS = tuple(make_row(name, part) for name, part in parts().items())


def page(found: Mapping[str, Measurement]) -> str:
    """What was measured of all parts."""
    shown = [
        f"`{one.command}`:\n\n{one.tables(found[one.name].values)}"
        for one in ROWS
        if one.name in found
    ]
    return "\n".join(shown) or "Not measured.\n"
