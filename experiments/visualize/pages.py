"""All figures of a scene, and the overview of run folders, written to files."""

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from experiments.config.reading import load_config
from experiments.documents import figures as style
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import CONFIG_FILE, FINAL_WEIGHTS
from experiments.visualize import horizontal, vertical
from experiments.visualize.scenes import Scene, scene_of_split

OVERVIEW = "tokenmixup"
_OVERVIEW_BATCH, _OVERVIEW_ROWS = 64, 4


def write_scene(scene: Scene, folder: Path) -> list[Path]:
    """Write every figure of a scene, as PNG and SVG, and give their paths in order.

    They are the overview, where the model has HTM and VTM, then those of each HTM and VTM layer.
    """
    written = []
    with style.house_style():
        if scene.recording.horizontal and scene.recording.attention:
            caption = f"{scene.run}: {OVERVIEW}"
            written += style.write(overview(scene, scene), folder / OVERVIEW, caption)
        for name, figure in itertools.chain(horizontal.figures(scene), vertical.figures(scene)):
            written += style.write(figure, folder / name, f"{scene.run}: {name}")
    return written


def overview(htm: Scene | None, vtm: Scene | None) -> Figure:
    """HTM's first layer on the most mixed images of one scene, VTM's last on those of another."""
    heights = []
    if htm is not None:
        layer = htm.recording.horizontal[0]
        rows = horizontal.most_mixed(layer, htm.labels, _OVERVIEW_ROWS)
        heights.append(horizontal.rows_height(htm, layer, len(rows)))
    if vtm is not None:
        attention = vtm.recording.attention[-1]
        columns = vertical.spread_over_classes(vtm.labels, vertical.MOST_COLUMNS)
        heights.append(vertical.tokens_height(vtm, attention))
    figure = style.make_figure(sum(heights))
    panels = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
    if htm is not None:
        horizontal.draw_rows(panels[0], htm, layer, rows)
    if vtm is not None:
        vertical.draw_tokens(panels[-1], vtm, attention, columns)
    return figure


def write_overview_of_runs(folders: list[Path], output: Path) -> list[Path]:
    """Write the overview of the first finished run with HTM and of the first with VTM, if any.

    Raises:
        DataError: the data set of such a run is missing.
    """
    configs = {
        folder: load_config(folder / CONFIG_FILE)
        for folder in folders
        if (folder / FINAL_WEIGHTS).is_file()
    }
    htm = next((folder for folder, config in configs.items() if config.horizontal), None)
    vtm = next((folder for folder, config in configs.items() if config.vertical), None)
    scenes: dict[Path | None, Scene] = {}
    for folder in (htm, vtm):
        if folder is not None and folder not in scenes:
            weights, name = str(folder / FINAL_WEIGHTS), folder.resolve().name
            scenes[folder] = scene_of_split(
                configs[folder], weights, ONE_PROCESS, name, _OVERVIEW_BATCH
            )
    if not scenes:
        return []
    with style.house_style():
        figure = overview(scenes.get(htm), scenes.get(vtm))
        return style.write(figure, output / OVERVIEW, "What TokenMixup does")
