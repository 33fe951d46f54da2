"""The figure of training curves, one line a group of runs, with a band over seeds."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.documents import figures as style
from experiments.documents.figures import DASHES, GRID, SERIES
from experiments.visualize.curves import QUANTITIES, TOP1, Band, Group, band, read_groups

NAME = "training_curves"
_COLUMNS, _ROW_INCHES = 3, 2.35
_POINTS_TO_MAGNIFY = 3


def write_curves(folders: list[Path], output: Path) -> list[Path]:
    """Write the training curves of run folders as PNG and SVG, and give both paths.

    Raises:
        DataError: a folder holds no run that can be drawn.
    """
    groups = read_groups(folders)
    with style.house_style():
        figure = draw_curves(groups)
        return style.write(figure, output / NAME, "training curves")


def draw_curves(groups: list[Group]) -> Figure:
    """Loss, top-1 and what HTM mixed, as far as any of the runs has it."""
    panels = []
    for quantity in QUANTITIES:
        bands = [(number, band(group, quantity)) for number, group in enumerate(groups)]
        found = [(number, one) for number, one in bands if one is not None]
        if found:
            panels.append((quantity, found))
    rows = -(-len(panels) // _COLUMNS)
    figure = style.make_figure(_ROW_INCHES * rows + 1.05)
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis, (quantity, found) in zip(axes, panels, strict=False):
        for number, one in found:
            _line(axis, one, number, groups[number].label)
        axis.set_title(quantity.title, fontsize=9, fontweight="bold", loc="left")
        axis.set_ylabel(quantity.unit)
        axis.set_xlabel("epoch")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=axis.get_xlim()[1] > 2))
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        if quantity.title == TOP1:
            _magnify_the_end(axis, found)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    handles = [lines[group.label] for group in groups]
    names = [f"{group.label}\n{last_top1(group)}" for group in groups]
    spare = axes[len(panels) :]
    if spare:
        spare[0].legend(
            handles, names, loc="center left", fontsize=8.5, handlelength=3.2, labelspacing=0.9
        )
    else:
        axes[0].legend(handles, names, handlelength=3.2)
    several = any(len(group.runs) > 1 for group in groups)
    about = "Bands: mean ± one standard deviation over seeds. " if several else ""
    if len(panels) > 3:
        about += (
            "Tokens mixed: mean over the easy samples and the HTM layers. With HTM the training "
            "loss is that of mixed labels, so compare validation."
        )
    style.title(figure, "Training")
    style.small_print(figure, about.strip())
    return figure


def last_top1(group: Group) -> str:
    """Top-1 of a group after its last common epoch, in words."""
    one = band(group, next(q for q in QUANTITIES if q.title == TOP1))
    if one is None:
        return "no top-1 in common"
    spread = "" if one.deviation is None else f" ± {one.deviation[-1]:.2f}"
    return f"top-1 {one.mean[-1]:.2f}{spread}% after epoch {one.epochs[-1]:g}"


def _magnify_the_end(axis: Axes, found: list[tuple[int, Band]]) -> None:
    """The last third in a small panel: runs differ little beside what all of them learn."""
    last = max(one.epochs[-1] for _, one in found)
    ends = [(number, _after(one, 2 / 3 * last)) for number, one in found]
    if any(len(one.epochs) < _POINTS_TO_MAGNIFY for _, one in ends):
        return
    inset = axis.inset_axes((0.52, 0.14, 0.47, 0.46))
    for number, one in ends:
        _line(inset, one, number, "")
    inset.tick_params(labelsize=6.5, length=2)
    inset.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    inset.yaxis.set_major_locator(MaxNLocator(4))
    inset.grid(color=GRID, linewidth=0.6)


def _after(one: Band, epoch: float) -> Band:
    kept = one.epochs >= epoch
    deviation = None if one.deviation is None else one.deviation[kept]
    return Band(one.epochs[kept], one.mean[kept], deviation)


def _line(axis: Axes, one: Band, number: int, label: str) -> None:
    colour = SERIES[number % len(SERIES)]
    dash = DASHES[number % len(DASHES)]
    marker = "o" if len(one.epochs) == 1 else None  # a line needs two
    axis.plot(
        one.epochs,
        one.mean,
        color=colour,
        linestyle=dash,
        linewidth=1.5,
        marker=marker,
        label=label,
    )
    if one.deviation is not None:
        axis.fill_between(
            one.epochs,
            one.mean - one.deviation,
            one.mean + one.deviation,
            color=colour,
            alpha=0.22,
            linewidth=0,
        )
