"""What torch.compile makes of a training step for a GPU: its code, generated and never run.

Run it with the environment of `benchmarks.pretended`; it prints a line of JSON per graph.
"""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.utils._triton
import triton
from torch._inductor import compile_fx, config
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks.pretended import MODELS, build
from tokenmixup import HorizontalConfig, VerticalConfig

SMALL = replace(
    MODELS["CCT-7/3×1"],
    **{"name": "cct_2_3x2_32", "settings": {}, "batch": 8, "classes": 10},
    horizontal=HorizontalConfig(layers=(0,), tau=0.2, rho=0.005),
    vertical=VerticalConfig(layers=(1,), kappa=3),
)


class Generated(Exception):
    """The code is there; what would compile its kernels for the device is left out."""


def generate(model, variant):
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
    attached = build(model, variant)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cuda", torch.bfloat16):
        images = torch.empty(model.batch, 3, model.image, model.image, device="cuda")
        targets = torch.empty(model.batch, model.classes, device="cuda")
        out = torch.compile(attached, fullgraph=True, backend=backend)(images, targets)
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
        model = SMALL if settings["small"] else MODELS["CCT-7/3×1"]
        for code in generate(model, settings["variant"]):
            print(json.dumps(described(code)))
