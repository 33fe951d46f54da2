"""Requests to save and stop: SIGTERM, SIGINT, SIGUSR1, or the end of the time that a run may take.

Python runs the handler of a signal between two of its own instructions, so never inside a
collective that hangs. Therefore a thread reads what the C handler writes to a pipe.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ONE_SIGNAL_SECONDS = 1.0
"""A scheduler and torchrun may both send the same signal: so close together, they count as one."""


_SAVING_SECONDS = 10


class StopRequests:
    """Takes the signals while its block lasts. The first asks to stop, a second ends the process.

    Args:
        max_minutes: how long the run may take, counted from here; None is without limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self._limit = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._minutes = max_minutes
        self._signal: signal.Signals | None = None

    @property
    def reason(self) -> str | None:
        """What asked the run to stop, or None."""
        if self._signal is not None:
            return self._signal.name
        if self._limit is not None and time.monotonic() >= self._limit:
            return f"--max-minutes {self._minutes:g}"
        return None

    def __enter__(self) -> "StopRequests":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {
            number: signal.signal(number, _leave_it_to_the_thread) for number in SIGNALS
        }
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, b"\0")  # no signal has this number: the thread ends
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        first = 0.0
        while number := os.read(self._read, 1)[0]:
            if number not in SIGNALS:
                continue  # another handler's, such as the data loader's for its processes
            if self._signal is None:
                self._signal, first = signal.Signals(number), time.monotonic()
            elif time.monotonic() - first > _ONE_SIGNAL_SECONDS:
                os._exit(128 + number)


def outlive_the_main_process() -> None:
    """Have a helper process leave the signals to the main one, which a group's signal reaches too.

    After SIGTERM, by which a main process also ends its helpers, it lives on for as long as saving
    may take.
    """
    signal.set_wakeup_fd(-1)  # a forked process has the main one's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SAVING_SECONDS))


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    pass
