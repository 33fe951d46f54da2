"""Tables and targets of rows 7 to 10."""

from typing import Any

from benchmarks import harness
from benchmarks.harness import Target
from experiments.documents.markdown import aligned_table

IMAGES_PER_SECOND = {"CCT-7/3×1": 20_000, "ViT-B/16": 2_400}
OVER_PLAIN = {"CCT-7/3×1": 1.08, "ViT-B/16": 1.03}
GFLOP_AN_IMAGE = {"CCT-7/3×1": 7.1, "ViT-B/16": 105.0}
"""Of a training step: forward, and twice that backward."""
COPIES = {"plain": 0, "HTM": 1, "VTM": 0, "HVTM": 1}
WAITED_SHARE = 0.02
MEMORY_RATIO = 1.03
GRADIENT_RATIO = 1e-3
"""By which the norm of the same gradient may differ, for sums in another order."""
SAME_WITH_LESS = "the same gradient, less memory"


def tables(values: dict[str, Any]) -> str:
    """A line for each variant; then loading and checkpointing."""
    rows, notes = [], []
    for model in values["models"]:
        name = f"{model['model']}, B={model['batch']}"
        plain = model["variants"].get("plain", {})
        for variant, found in model["variants"].items():
            over = model["over_plain"].get(variant)
            speed, mixed = found["images_per_second"], found["mixing"]
            profile = found["profile"]
            memory = found["peak_bytes"]
            shown = harness.mebibytes(memory)
            if memory and plain.get("peak_bytes"):
                shown += f" ({memory / plain['peak_bytes']:.3f} ×)"
            rows.append(
                [
                    name,
                    variant,
                    f"{speed:,.0f}",
                    f"{speed * GFLOP_AN_IMAGE[model['model']] / 1e3:.0f}",
                    harness.times(over, 3) if over else "1",
                    f"{100 * mixed['mixed_share']:.0f}%" if mixed else "–",
                    f"{profile['copies_to_host']:g}",
                    f"{profile['host_waits']:g}",
                    f"{profile['kernels']:.0f}",
                    f"{100 * profile['busy_share']:.0f}%",
                    shown,
                ]
            )
        notes += _notes(name, model)
    head = (
        *("model", "step", "images/s", "TFLOP/s", "time over plain (95%)", "samples mixed"),
        *("copies to host", "host waits", "kernels", "device busy", "peak memory (MiB)"),
    )
    if values["left_out"]:
        notes.append(f"- Left out for want of time: {'; '.join(values['left_out'])}.")
    return aligned_table(head, rows, range(2, 11)) + "\n" + "\n".join(notes) + "\n"


def _notes(name: str, model: dict[str, Any]) -> list[str]:
    notes = []
    if "data" in model:
        data = model["data"]
        notes.append(
            f"- {name}, HVTM from the loader ({data['loader_processes']} processes, "
            f"{data['steps']} steps): {data['images_per_second']:,.0f} images/s, data waited for "
            f"in {data['waited_share']:.1%} of the steps and {data['time_share']:.1%} of the time."
        )
    if "checkpointing" in model:
        without, with_it = (model["checkpointing"][key] for key in ("without", "with"))
        memory = (
            f"{harness.mebibytes(with_it['peak_bytes'])} instead of "
            f"{harness.mebibytes(without['peak_bytes'])} MiB"
        )
        notes.append(
            f"- {name}, HVTM with activation checkpointing (eager): norm of the gradient "
            f"{with_it['gradient_norm']:.4g}, without {without['gradient_norm']:.4g}; peak memory "
            f"{memory}."
        )
    return notes


def targets(values: dict[str, Any]) -> list[Target]:
    """Of each model what was measured."""
    found = []
    for model in values["models"]:
        name, variants = f"{model['model']}, B={model['batch']}", model["variants"]
        if "plain" in variants:
            speed, least = variants["plain"]["images_per_second"], IMAGES_PER_SECOND[model["model"]]
            found.append(
                Target(
                    f"7. {name}, bf16, compiled",
                    f"≥ {least:,} images/s",
                    f"{speed:,.0f} images/s",
                    speed >= least,
                )
            )
        if "HVTM" in model["over_plain"]:
            over, limit = model["over_plain"]["HVTM"], OVER_PLAIN[model["model"]]
            found.append(harness.at_most(f"7. {name}, HTM + VTM", over, limit, "plain"))
        for variant, one in variants.items():
            copies = one["profile"]["copies_to_host"]
            found.append(
                Target(
                    f"8. {name}, {variant}",
                    f"≤ {COPIES[variant]} copies to the host a step",
                    f"{copies:g}",
                    copies <= COPIES[variant],
                )
            )
        found += _data_and_memory(name, model)
    return found


def _data_and_memory(name: str, model: dict[str, Any]) -> list[Target]:
    found = []
    if "data" in model:
        share = model["data"]["waited_share"]
        found.append(
            Target(
                f"9. {name}, from the loader",
                f"data waited for in ≤ {WAITED_SHARE:.0%} of the steps",
                f"{share:.1%}",
                share <= WAITED_SHARE,
            )
        )
    peaks = {key: one["peak_bytes"] for key, one in model["variants"].items()}
    if peaks.get("plain") and peaks.get("HVTM"):
        memory = peaks["HVTM"] / peaks["plain"]
        found.append(
            Target(
                f"10. peak memory, {name}, HTM + VTM",
                f"≤ {MEMORY_RATIO} × plain",
                f"{memory:.3f} ×",
                memory <= MEMORY_RATIO,
            )
        )
    if "checkpointing" in model:
        without, with_it = (model["checkpointing"][key] for key in ("without", "with"))
        norm, expected = with_it["gradient_norm"], without["gradient_norm"]
        same = abs(norm - expected) <= GRADIENT_RATIO * expected
        smaller = without["peak_bytes"] is None or with_it["peak_bytes"] < without["peak_bytes"]
        found.append(
            Target(
                f"10. activation checkpointing, {name}, HTM + VTM",
                SAME_WITH_LESS,
                f"norm of the gradient {norm:.4g} and {expected:.4g}, "
                f"{harness.mebibytes(with_it['peak_bytes'])} and "
                f"{harness.mebibytes(without['peak_bytes'])} MiB",
                same and smaller,
            )
        )
    return found
