"""The training step on a GPU that is only pretended: launches, exchanges, places, CUDA graphs."""

import json
import subprocess
import sys

import pytest
import timm
import torch

from benchmarks import launches, pretended
from benchmarks.pretended import Case
from benchmarks.row import Settings
from benchmarks.steps import FAMILIES
from experiments.errors import DataError
from experiments.provenance import ROOT
from tokenmixup import HorizontalConfig, VerticalConfig, attach
from tokenmixup.rules import Rules

CCT, VIT, SWIN = FAMILIES
lacking = pretended.missing()
pretends = pytest.mark.skipif(lacking is not None, reason=f"no GPU can be pretended: {lacking}")
MORE = {
    CCT: {"HTM": 67, "VTM": 38, "HVTM": 105},
    VIT: {"HTM": 53, "VTM": 40, "HVTM": 104},
    SWIN: {"HTM": 66},
}
"""Operations that TokenMixup adds to a step, as of 2026-11-28 with torch 2.13."""
LAYERS_AGAIN = 25
"""Those of its layers that activation checkpointing runs again."""


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Counts steps, each once."""
    known = {}

    def count(*cases):
        new = [case for case in cases if case not in known]
        folder = tmp_path_factory.mktemp("pretended")
        known.update(zip(new, pretended.counted(new, folder), strict=True))
        return [known[case] for case in cases]

    return count


def check(counts, plain, more, layers):
    """At most `more` operations, one exchange per HTM layer, nothing elsewhere."""
    assert 0 < counts.total - plain.total <= more
    assert [line.partition(" ")[0] for line in counts.exchanges] == ["solve_assignment"] * layers
    assert not counts.elsewhere and not plain.elsewhere and not plain.exchanges


def check_model(counted, model, variants=None, **way):
    variants = variants or ("plain", *MORE[model])
    plain, *others = counted(*(Case(model, variant, **way) for variant in variants))
    for variant, counts in zip(variants[1:], others, strict=True):
        more = MORE[model][variant] + LAYERS_AGAIN * bool(way)
        check(counts, plain, more, layers=int(variant != "VTM"))
        assert counts.statistics > 0
    assert plain.statistics == 0


@pretends
def test_a_step_of_cct_launches_few_operations_and_reads_once(counted):
    check_model(counted, CCT, ("plain", "HVTM"))


@pretends
@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"checkpointing": True}, {"ddp": True}], ids=str)
@pytest.mark.parametrize("model", FAMILIES)
def test_every_way_to_run_a_step(counted, model, way):
    check_model(counted, model, **way)


@pretends
@pytest.mark.slow
def test_the_table_is_that_of_the_counts():
    values = launches.measure(Settings(quick=True))
    (model,) = values["models"]
    plain, both = (model["variants"][name]["operations"] for name in ("plain", "HVTM"))
    assert f"| {both / plain:.3f} |" in " ".join(launches.tables(values).split())
    (target,) = launches.targets(values)
    assert target.reached and target.measured == f"{both / plain:.3f}"


def test_what_is_lacking_for_a_pretended_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pretended.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="no GPU can be pretended here: t"):
        pretended.environment(tmp_path)


def generated(folder, **settings):
    """The graphs of a compiled step: their kernels, and what runs in which order."""
    settings = {"quick": True, "batch": 8, "config": {}, **settings}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.generated_code", json.dumps(settings)],
        env=pretended.environment(folder) | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pretends
@pytest.mark.slow
def test_cuda_graphs_are_cut_at_what_runs_on_the_host(tmp_path):
    """With mode="reduce-overhead": a graph that captured the solver's copy would be an error."""
    forward, backward = generated(tmp_path, variant="HVTM", config={"triton.cudagraphs": True})
    assert forward["order"] == ["graph", "solve_assignment", "graph", "observe"]
    assert backward["order"] == ["graph"]


@pretends
@pytest.mark.slow
def test_compiled_a_step_of_cct_has_few_more_kernels(tmp_path):
    """As of 2026-11-28, with torch 2.13: 374 to 303."""
    plain, both = (
        sum(
            graph["kernels"]
            for graph in generated(tmp_path / name, quick=False, batch=128, variant=name)
        )
        for name in ("plain", "HVTM")
        if (tmp_path / name).mkdir() is None
    )
    assert plain > 200 and both <= 1.24 * plain


class Allowed(Rules):
    """The paper's, in which the solver may wait for the device."""

    def partners(self, gain):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return super().partners(gain)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def train_on_cuda(rules):
    """Two steps, the second of which must not wait for the device; its statistics."""
    host = timm.create_model("cct_2_3x2_32", num_classes=10)
    horizontal, vertical = HorizontalConfig((0,), 10.0, 0.001), VerticalConfig((1,), 3)
    model = attach(host, horizontal=horizontal, vertical=vertical, rules=rules).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(8, 3, 32, 32, device="cuda")
    targets = torch.rand(8, 10, device="cuda").softmax(1)
    try:
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            with torch.autocast("cuda", torch.bfloat16):
                out = model(images, targets)
            out.loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            stats = dict(out.stats)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return stats


@pytest.mark.gpu
def test_a_step_waits_for_the_device_in_the_solver_alone():
    assert train_on_cuda(Allowed())["htm/layer0/easy_share"] == 1
    with pytest.raises(RuntimeError, match="synchronizing"):
        train_on_cuda(Rules())
