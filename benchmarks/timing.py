"""Times of several actions, measured in turn, their ratios with an interval, and their text."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Action = Callable[[], object]

_RESAMPLES = 2_000
_MOST_CALLS = 1_000


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Median and quartiles in seconds, as records keep them."""
        low, median, high = np.quantile(self.seconds, (0.25, 0.5, 0.75)).tolist()
        quartiles = {"lower_quartile": low, "upper_quartile": high}
        return {"seconds": median, **quartiles, "rounds": len(self.seconds)}


def recorded(timings: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """`Timing.record` of each."""
    return {name: timing.record() for name, timing in timings.items()}


def interleaved(
    actions: Mapping[str, Action],
    rounds: int,
    *,
    warm_up: int = 1,
    least_seconds: float = 0.0,
    synchronise: Action = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time actions in turn, A B C B C A C A B ..., so that a noisy machine disturbs all alike.

    Args:
        actions: what to time, by name.
        rounds: values per action.
        warm_up: rounds before the first one that counts.
        least_seconds: a fast action is called several times per value, for about this long.
        synchronise: waits until the device has finished its work.
        clock: seconds from any start; `time.process_time` for what waits for nothing.
    """
    names = list(actions)
    if not names:
        return {}
    calls = dict.fromkeys(names, 1)
    for _ in range(warm_up):
        for name in names:
            single = _seconds(actions[name], 1, synchronise, clock)
            calls[name] = max(1, min(_MOST_CALLS, round(least_seconds / max(single, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(_seconds(actions[name], calls[name], synchronise, clock))
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def _seconds(action: Action, calls: int, synchronise: Action, clock: Callable[[], float]) -> float:
    synchronise()
    start = clock()
    for _ in range(calls):
        action()
    synchronise()
    return (clock() - start) / calls


def added(first: Timing, second: Timing) -> Timing:
    """Two actions one after the other, round by round."""
    return Timing(tuple(a + b for a, b in zip(first.seconds, second.seconds, strict=True)))


def ratio(first: Timing, second: Timing) -> dict[str, float]:
    """Ratio of the medians with its 95% interval, by resampling whole rounds.

    A disturbance hits both values of a round, so rounds stay together. The interval covers the
    noise within this run only.
    """
    rounds = len(first.seconds)
    sample = np.random.default_rng(0).integers(rounds, size=(_RESAMPLES, rounds))
    above, below = (np.median(np.array(one.seconds)[sample], axis=1) for one in (first, second))
    low, high = np.quantile(above / below, (0.025, 0.975)).tolist()
    return {"ratio": first.median / second.median, "low": low, "high": high}


def milliseconds(timing: Mapping[str, Any]) -> str:
    """The median of a recorded timing."""
    value = 1e3 * timing["seconds"]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(found: Mapping[str, float], digits: int = 2) -> str:
    """A ratio with its interval."""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("ratio", "low", "high"))
    return f"{middle} ({low}–{high})"


def mebibytes(number: int | None) -> str:
    """A number of bytes, or a dash for None."""
    return "–" if number is None else f"{number / 2**20:,.1f}"
