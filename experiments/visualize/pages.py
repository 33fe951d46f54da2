"""Whole figures, put together and written to files."""

from pathlib import Path

from experiments.config import load_config
from experiments.documents import figures as style
from experiments.errors import DataError
from experiments.training.distributed import ONE_PROCESS
from experiments.training.evaluation import Assessment
from experiments.training.folder import CONFIG_FILE, FINAL_WEIGHTS
from experiments.visualize import horizontal, vertical
from experiments.visualize.scenes import Scene, scene_of_split

OVERVIEW = "tokenmixup"
_OVERVIEW_BATCH = 64
_OVERVIEW_ROWS = 4


def write_scene(scene: Scene, folder: Path) -> list[Path]:
    """Write every figure of a scene, as PNG and SVG, and give their paths in order.

    `tokenmixup` is HTM and VTM at a glance, where the model has both. For each HTM layer there are
    `htm_layerN` (each image, step by step) and `htm_layerN_gain` (who gains from whom), for each
    VTM layer `vtm_layerN` (what is remembered of eight images; further ones are in
    `vtm_layerN_from8` and so on) and `vtm_layerN_attention` (how much each head attends to it).

    Raises:
        DataError: the model has neither HTM nor VTM.
    """
    recording, count = scene.recording, len(scene.images)
    refuse_nothing([scene])
    both = recording.horizontal and recording.attention
    written = write_overview([scene], folder) if both else []
    with style.house_style():
        for layer in recording.horizontal:
            name = f"htm_layer{layer.layer}"
            figure = style.make_figure(horizontal.rows_height(count))
            horizontal.draw_rows(figure, scene, layer, list(range(count)))
            written += style.write(figure, folder / name, f"{scene.run}: {name}")
            width, height = horizontal.gain_size(layer)
            figure = style.make_figure(height, width)
            horizontal.draw_gain(figure, scene, layer)
            written += style.write(figure, folder / f"{name}_gain", f"{scene.run}: {name} gain")
        for attention in recording.attention:
            name = f"vtm_layer{attention.layer}"
            for first in range(0, count, vertical.MOST_COLUMNS):
                chosen = list(range(first, min(count, first + vertical.MOST_COLUMNS)))
                width = vertical.tokens_width(len(chosen))
                figure = style.make_figure(vertical.tokens_height(attention), width)
                vertical.draw_tokens(figure, scene, attention, chosen)
                page = f"_from{first}" if first else ""
                written += style.write(figure, folder / (name + page), f"{scene.run}: {name}")
            figure = style.make_figure(vertical.attention_height(attention))
            vertical.draw_attention(figure, scene, attention)
            caption = f"{scene.run}: {name} attention"
            written += style.write(figure, folder / f"{name}_attention", caption)
    return written


def write_overview(scenes: list[Scene], folder: Path) -> list[Path]:
    """Write one figure of HTM in the first scene that has it, and of VTM in the first that does.

    Raises:
        DataError: no scene has HTM or VTM.
    """
    refuse_nothing(scenes)
    htm = next((scene for scene in scenes if scene.recording.horizontal), None)
    vtm = next((scene for scene in scenes if scene.recording.attention), None)
    heights = []
    if htm is not None:
        layer = htm.recording.horizontal[0]
        rows = horizontal.most_mixed(layer, htm.labels, _OVERVIEW_ROWS)
        heights.append(horizontal.rows_height(len(rows)))
    if vtm is not None:
        attention = vtm.recording.attention[-1]
        columns = vertical.spread_over_classes(vtm.labels, vertical.MOST_COLUMNS)
        heights.append(vertical.tokens_height(attention))
    with style.house_style():
        figure = style.make_figure(sum(heights))
        panels = list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
        if htm is not None:
            horizontal.draw_rows(panels.pop(0), htm, layer, rows)
        if vtm is not None:
            vertical.draw_tokens(panels.pop(0), vtm, attention, columns)
        return style.write(figure, folder / OVERVIEW, "What TokenMixup does")


def draw_runs(folders: list[Path], output: Path) -> list[Path]:
    """Write the overview of the first run with HTM and of the first with VTM; none without."""
    configs = {folder: load_config(folder / CONFIG_FILE) for folder in folders}
    wanted = [
        next((f for f, config in configs.items() if config.horizontal is not None), None),
        next((f for f, config in configs.items() if config.vertical is not None), None),
    ]
    scenes = []
    for folder in dict.fromkeys(wanted):
        if folder is not None:
            weights = str(folder / FINAL_WEIGHTS)
            assessment = Assessment(configs[folder], weights, ONE_PROCESS)
            scenes.append(scene_of_split(assessment, folder.resolve().name, _OVERVIEW_BATCH))
    return write_overview(scenes, output) if scenes else []


def refuse_nothing(scenes: list[Scene]) -> None:
    """Raise DataError where no scene has HTM or VTM."""
    if not any(scene.recording.horizontal or scene.recording.attention for scene in scenes):
        names = ", ".join(scene.run for scene in scenes)
        raise DataError(
            f"{names}: there is nothing to draw: the config has neither horizontal nor vertical; "
            "add one, such as --vertical.layers [1]"
        )
