"""Where the processes of a run find each other: a store with nothing of an earlier start in it.

torchrun starts all processes again after one has died, and gives them the store that the dead ones
used (pytorch issue 135712). What stands there under the same names, such as the ports of processes
that are gone, makes the new ones wait for each other until the time-out. torchrun has no name for a
start that is the same on all machines, so the main process makes one up.
"""

import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed

dist: Any = torch.distributed  # which does not say that it exports its stores
_SECONDS_BETWEEN_LOOKS = 0.02


def meet(rank: int, size: int, timeout: timedelta) -> Any:
    """Wait for the other processes of this start; gives a torch store, empty but for theirs.

    Every process leaves a word that is its own alone, and the main process answers each with the
    name of its start. Words of dead processes are answered too, which nobody reads.

    Raises:
        RuntimeError: one of torch's (`DistError`): some did not come in time.
    """
    shared, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    hall = dist.PrefixStore("tokenmixup", shared)
    if rank:
        word = uuid.uuid4().hex
        hall.set(f"process {rank}", word)
        start = hall.get(word).decode()
        hall.add(start, 1)
    else:
        start = uuid.uuid4().hex
        _gather(hall, start, size - 1, timeout)
    return dist.PrefixStore(start, shared)


def _gather(hall: Any, start: str, others: int, timeout: timedelta) -> None:
    answered: set[str] = set()
    deadline = time.monotonic() + timeout.total_seconds()
    while hall.add(start, 0) < others:
        for rank in range(1, others + 1):
            word = hall.get(f"process {rank}").decode()
            if word not in answered:
                hall.set(word, start)
                answered.add(word)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"only some of the {others} others joined in time")
        time.sleep(_SECONDS_BETWEEN_LOOKS)
