"""Rows 2 and 3: a training step with TokenMixup against the plain one, and against the direct form.

Each step is the engine's own (augmentation of whole batches, forward, loss, backward, gradient
norm, optimiser) with the drop rates of the config. float32; every sample is easy.
"""

import sys
from typing import Any

from benchmarks import harness
from benchmarks.direct import DirectModel
from benchmarks.harness import Row, Settings, Target
from benchmarks.learners import Steps, Workload, make_learner, sized, time_steps
from benchmarks.timing import ratio
from experiments.documents.markdown import aligned_table
from experiments.training.distributed import ONE_PROCESS

WORKLOADS = (Workload("CCT-7/3×1", 32), Workload("ViT-B/16", 8))
PLAIN_RATIO = {"CCT-7/3×1": 1.03, "ViT-B/16": 1.02}
DIRECT_RATIO = 0.8
VARIANTS = ("plain", "HTM", "VTM", "HVTM")


def measure(settings: Settings) -> dict[str, Any]:
    """Both models: four variants in turn, then HTM in our form and the direct one in turn."""
    workloads = sized(WORKLOADS, settings.quick)
    return {"models": [_model(settings, workload) for workload in workloads]}


def _model(settings: Settings, workload: Workload) -> dict[str, Any]:
    rounds = settings.rounds(21)
    variants = {
        name: Steps(workload, make_learner(workload, name, ONE_PROCESS)) for name in VARIANTS
    }
    timings, mixing = time_steps(variants, rounds)
    plain, ours = timings["plain"], variants["HTM"]
    variants.clear()  # a ViT-B/16 and its gradients take more than a GiB
    forms = {
        "ours": ours,
        "direct": Steps(workload, make_learner(workload, "HTM", ONE_PROCESS, DirectModel)),
    }
    forms_timings, _ = time_steps(forms, rounds)
    return {
        "model": workload.model,
        "batch": workload.batch,
        "steps": {name: timing.record() for name, timing in timings.items()},
        "over_plain": {
            name: ratio(timing, plain) for name, timing in timings.items() if name != "plain"
        },
        "mixing": mixing,
        "forms": {name: timing.record() for name, timing in forms_timings.items()},
        "over_direct": ratio(forms_timings["ours"], forms_timings["direct"]),
    }


def tables(values: dict[str, Any]) -> str:
    """A line for each variant, then one for each form."""
    rows = []
    for model in values["models"]:
        name = f"{model['model']}, B={model['batch']}"
        for variant, step in model["steps"].items():
            over = model["over_plain"].get(variant)
            mixed = model["mixing"][variant]
            rows.append(
                [
                    name,
                    variant,
                    harness.milliseconds(step),
                    harness.times(over, 3) if over else "1",
                    f"{100 * mixed['mixed_share']:.0f}%" if mixed else "–",
                    f"{mixed['tokens_mixed']:.1f}" if mixed else "–",
                ]
            )
        rows.append(
            [
                name,
                "HTM, direct form",
                harness.milliseconds(model["forms"]["direct"]),
                f"ours / direct {harness.times(model['over_direct'], 3)}",
                "",
                "",
            ]
        )
    head = ("model", "step", "ms", "over plain (95%)", "samples mixed", "tokens mixed each")
    return aligned_table(head, rows, range(2, 6))


def targets(values: dict[str, Any]) -> list[Target]:
    """The three variants of each model, and the two forms."""
    found = []
    for model in values["models"]:
        name, limit = f"{model['model']}, B={model['batch']}", PLAIN_RATIO[model["model"]]
        for variant, over in model["over_plain"].items():
            found.append(harness.at_most(f"2. step, {name}, {variant}", over, limit, "plain"))
        row, over = f"3. HTM step, {name}", model["over_direct"]
        found.append(harness.at_most(row, over, DIRECT_RATIO, "direct form"))
    return found


ROW = Row("steps", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(harness.main(ROW))
