"""A GPU that is only pretended: a training step on one, counted on a machine without any.

torch's fake tensors have a device, a shape and a type, and no values. `pretended_cuda.c`, loaded in
the place of CUDA's runtime, says that an H200 is there, so that autocast, fused optimisers and the
compiler go the way that they go on one. Nothing is computed and no time is measured: what shows are
the operations that go to the device, what the host reads, and tensors that are elsewhere.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.steps import FAMILIES, Workload, make_config
from experiments.errors import DataError
from experiments.models.build import build_model
from experiments.provenance import ROOT

_LIBRARY = str(ROOT / "tokenmixup")
_VIEWS = """
_reshape_alias _unsafe_view alias as_strided chunk detach device diagonal empty empty_like
empty_strided expand is_same_size lift_fresh narrow new_empty new_empty_strided permute reshape
resize_ select set_ slice split split_with_sizes squeeze t transpose unbind unflatten unfold
unsqueeze view view_as
"""
_NO_LAUNCH = frozenset(_VIEWS.split())
"""Operations that only describe memory anew."""
_READS = frozenset(("_local_scalar_dense", "is_nonzero", "masked_select", "nonzero"))
"""Operations for whose result the host waits."""
_SOLVER = "solve_assignment"


@dataclass(frozen=True)
class Case:
    """A step to count."""

    model: str  # a key of `FAMILIES`
    variant: str  # plain, HTM, VTM or HVTM
    checkpointing: bool = False
    ddp: bool = False


@dataclass
class Counts:
    """What a step does.

    Attributes:
        operations: that go to the device, by name, in forward, backward and AdamW.
        statistics: that more, where `out.stats` is read.
        exchanges: moves between the devices and reads by the host, each with its line.
        elsewhere: operations on tensors of the CPU alone, by name.
    """

    operations: Counter[str] = field(default_factory=Counter)
    statistics: int = 0
    exchanges: list[str] = field(default_factory=list)
    elsewhere: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Operations on the device."""
        return sum(self.operations.values())


class _Seen(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function._schema.name.partition("::")[2]
        result = function(*args, **(kwargs or {}))
        came, went = _devices((args, kwargs)), _devices(result)
        if name == _SOLVER or name in _READS or (came and went and came != went):
            self.counts.exchanges.append(f"{name} at {_line()}")
        if "cuda" in came | went:
            self.counts.operations[name] += name not in _NO_LAUNCH
        elif "cpu" in came | went:
            self.counts.elsewhere[name] += 1
        return result


def _devices(values: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


def _line() -> str:
    """The library's line that is running."""
    frame = sys._getframe()
    while frame.f_back is not None and not frame.f_code.co_filename.startswith(_LIBRARY):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def build(workload: Workload, variant: str) -> nn.Module:
    """The model of the variant's config in training, its parameters on the pretended GPU."""
    config = make_config(workload, variant, torch.device("cuda"))
    model = build_model(config, FAMILIES[workload.model].classes)
    return model.to_empty(device="cuda").train()


def batch(workload: Workload) -> tuple[Tensor, Tensor]:
    """Images and soft targets on the pretended GPU."""
    config = make_config(workload, "plain", torch.device("cuda"))
    size, classes = config.model.image_size, FAMILIES[workload.model].classes
    images = torch.empty(workload.batch, 3, size, size, device="cuda")
    return images, torch.empty(workload.batch, classes, device="cuda")


def count(case: Case) -> Counts:
    """Count the second step of a training (the optimiser makes its state in the first one)."""
    workload = Workload(case.model, FAMILIES[case.model].gpu_batch, "bf16")
    attached: Any = build(workload, case.variant)
    if case.checkpointing:
        attached.set_grad_checkpointing()
    run = attached
    if case.ddp:
        torch.distributed.init_process_group("fake", rank=0, world_size=2, store=_no_store())
        run = DistributedDataParallel(attached, init_sync=False)
        run.register_comm_hook(None, _no_exchange)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, targets = batch(workload)
        optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-3, fused=True)

        def step(run: Any) -> Any:
            with torch.autocast("cuda", torch.bfloat16):
                out = run(images, targets)
            out.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            return out

        step(attached)
        with _Seen() as seen:
            out = step(run)
        with _Seen() as reading:
            dict(out.stats)
    if case.ddp:
        torch.distributed.destroy_process_group()
    counts = seen.counts
    counts.operations = +counts.operations
    counts.statistics = sum(reading.counts.operations.values())
    counts.exchanges += reading.counts.exchanges
    counts.elsewhere += reading.counts.elsewhere
    return counts


def _no_store() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def _no_exchange(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def missing() -> str | None:
    """What this machine lacks for a pretended GPU, None if nothing."""
    if not torch.version.cuda:
        return "torch was built without CUDA"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, which has the headers of CUDA's runtime"
    if shutil.which("cc") is None:
        return "there is no C compiler (cc)"
    return None


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process with a pretended GPU, whose library is built in the folder.

    Raises:
        DataError: something is missing, or the compiler fails.
    """
    lacking = missing()
    if lacking is not None:
        raise DataError(f"no GPU can be pretended here: {lacking}")
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    source, library = Path(__file__).with_name("pretended_cuda.c"), folder / "pretended_cuda.so"
    command = ["cc", "-shared", "-fPIC", "-I", str(headers), "-o", str(library), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise DataError(f"{source.name} could not be compiled: {built.stderr.strip()}")
    (folder / "libcuda.so.1").symlink_to(library)  # the driver
    inherited = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return inherited | {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": str(ROOT),
    }


def counted(cases: Sequence[Case], folder: Path) -> list[Counts]:
    """Count steps, in a process of their own.

    Args:
        cases: the steps.
        folder: for the library that pretends.

    Raises:
        DataError: no GPU can be pretended here, or a step failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.pretended"],
        input=json.dumps([asdict(case) for case in cases]),
        env=environment(folder),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise DataError(f"a step on the pretended GPU failed:\n{done.stderr.strip()}")
    return [
        Counts(
            Counter(one["operations"]),
            one["statistics"],
            one["exchanges"],
            Counter(one["elsewhere"]),
        )
        for one in map(json.loads, done.stdout.splitlines())
    ]


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(vars(count(Case(**case)))))
