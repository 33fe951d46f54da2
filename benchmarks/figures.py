"""Curves and timelines of what benchmarks measured, as SVG and PNG for the documents."""

import io
from pathlib import Path
from typing import Any, cast

import matplotlib

from benchmarks.profiles import CATEGORIES, read_timeline
from experiments.files import write_atomically

matplotlib.use("Agg")  # files only: no window, no display

from matplotlib import pyplot as plt
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito's colours, which stay apart for colour-blind readers
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#E69F00", "#009E73", "#999999"
_STYLE: Any = {"svg.hashsalt": "tokenmixup", "svg.fonttype": "none", "font.size": 9}


def pairing_curve(values: dict[str, Any]) -> Figure:
    """Time of pairing over the batch, in our form and the direct one, all easy and filtered."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    share = f"{100 * values['filtered_share']:.0f}% easy"
    for name, label, colour, dash, marker in (
        ("direct", "direct, all easy", _ORANGE, "-", "s"),
        ("direct_filtered", f"direct, {share}", _ORANGE, "--", "s"),
        ("ours", "ours, all easy", _BLUE, "-", "o"),
        ("ours_filtered", f"ours, {share}", _BLUE, "--", "o"),
        ("gain", "ours: the gains alone", _GREEN, ":", "^"),
        ("assignment", "ours: the assignment alone", _GREY, ":", "v"),
    ):
        points = [p for p in values["curve"] if name in p["timings"]]
        x = [point["batch"] for point in points]
        found = [point["timings"][name] for point in points]
        y = [1e3 * timing["seconds"] for timing in found]
        below = [1e3 * (t["seconds"] - t["lower_quartile"]) for t in found]
        above = [1e3 * (t["upper_quartile"] - t["seconds"]) for t in found]
        axes.errorbar(
            x,
            y,
            [below, above],
            label=label,
            color=colour,
            linestyle=dash,
            marker=marker,
            markersize=4,
            capsize=2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = [point["batch"] for point in values["curve"]]
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel(f"batch B (T = {values['curve'][0]['patches']} patch tokens)")
    axes.set_ylabel("milliseconds (median, quartiles)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # the line and its mark alone: error bars in the handles hide the dashes
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] for handle in cast(list[ErrorbarContainer], handles)]
    axes.legend(lines, labels, frameon=False, fontsize=9, handlelength=4)
    return figure


def step_timelines(values: dict[str, Any]) -> Figure:
    """What the device does in one step of each model, plain and with HTM and VTM."""
    lanes = [
        (f"{model['model']}\n{variant}", read_timeline(found["profile"]["timeline"]))
        for model in values["models"]
        for variant, found in model["variants"].items()
        if "timeline" in found["profile"]
    ]
    rows = max(1, len(lanes))  # a model for which there was no time has none
    figure, all_axes = plt.subplots(
        rows, figsize=(7.2, 0.9 * rows + 0.8), layout="constrained", squeeze=False
    )
    colours = (_BLUE, _ORANGE, "#D55E00", _GREY)
    for axes, (label, bars) in zip(all_axes[:, 0], lanes, strict=False):
        for kind, colour in enumerate(colours):
            axes.broken_barh(
                [(begin / 1e3, length / 1e3) for begin, length, k in bars if k == kind],
                (0, 1),
                color=colour,
                linewidth=0,
            )
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.set_yticks([])
        axes.set_xlim(0, max((begin + length for begin, length, _ in bars), default=1) / 1e3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    all_axes[-1, 0].set_xlabel("milliseconds since the host began the step")
    patches = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(patches, CATEGORIES, loc="outside upper center", ncols=4, frameon=False)
    return figure


def save(figure: Figure, path: Path) -> bool:
    """Write a figure, the same figure the same bytes; whether the file changed."""
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata)
    plt.close(figure)
    if path.exists() and path.read_bytes() == content.getvalue():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
    return True
