"""What torch.compile makes of a training step for a GPU: its code, generated and never run.

Run it with the environment of `benchmarks.pretended`; it prints a line of JSON per graph.
"""

import json
import re
import sys
from types import SimpleNamespace

import torch
import torch.utils._triton
import triton
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks.pretended import batch, build
from benchmarks.steps import Workload


class Generated(Exception):
    """The code is there; what would compile its kernels for the device is left out."""


def generate(workload, variant):
    """The code of the forward and of the backward pass."""
    found = []

    def keep(code):
        found.append(code)
        raise Generated

    def without_running(graph, inputs, **settings):
        """Runs the graph itself, on fake tensors."""
        known = len(found)
        try:
            compile_fx.compile_fx_inner(graph, inputs, **settings)
        except Exception:  # whatever the compiler makes of `Generated`
            if len(found) == known:
                raise

        def run(inputs):
            return graph(*inputs)

        run._boxed_call = True
        return run

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=without_running)

    GraphLowering.save_output_code = staticmethod(keep)
    attached = build(workload, variant)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", torch.bfloat16):
        out = torch.compile(attached, fullgraph=True, backend=backend)(*batch(workload))
        out.loss().backward()
    return found


def pretend_triton():
    """Let triton, which has no device, name one."""
    target, device = GPUTarget("cuda", 90, 32), torch.device("cuda", 0)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_active_torch_device=lambda: device,
            get_current_device=lambda: 0,
        )
    )
    torch.utils._triton.has_triton = lambda *_: True


def described(code):
    """The number of kernels, and the order in which graphs and operators of ours run."""
    call = code[code.rindex("def call(") :]
    order = re.findall(r"self\.(partitions)\[|ops\.tokenmixup\.(\w+)\.default\(", call)
    kernels = re.findall(r"\btriton_\w+\.run\(|\bextern_kernels\.\w+\(", code)
    return {"kernels": len(kernels), "order": ["graph" if one else name for one, name in order]}


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    pretend_triton()
    quiet = {"fx_graph_cache": False, "shape_padding": False, "joint_graph_constant_folding": False}
    with config.patch({**quiet, **settings["config"]}):  # padding is tried, constants are read
        workload = Workload("CCT-7/3×1", settings["batch"], "bf16", quick=settings["quick"])
        for code in generate(workload, settings["variant"]):
            print(json.dumps(described(code)))
