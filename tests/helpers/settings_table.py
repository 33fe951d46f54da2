"""The table of TokenMixup's settings in docs/recipe.md, made from the configs."""

from experiments.config.reading import load_config
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT

CONFIGS = [
    f"{model}_{variant}"
    for model in ("cct_7-3x1_cifar10", "cct_7-3x1_cifar100", "vit_imagenet")
    for variant in ("HTM", "VTM", "HVTM")
]
HEAD = ("config", "HTM layer", "τ", "ρ", "ScoreNet", "λ", "VTM layer", "κ")


def table(name: str) -> str:
    """One row per config of the paper, "–" where a config has no such setting."""
    assert name == "tokenmixup"
    rows = []
    for config in CONFIGS:
        settings = load_config(ROOT / "configs" / f"{config}.yaml")
        htm, vtm = settings.horizontal, settings.vertical
        cells = ["–"] * 7
        if htm is not None:
            stop = ", stop-gradient" if htm.scorenet_stop_gradient else ""
            layers = ", ".join(map(str, htm.layers))
            cells[:3] = [layers, str(htm.tau), str(htm.rho)]
            cells[3:5] = [f"{htm.scorenet}{stop}", str(htm.scorenet_lambda)]
        if vtm is not None:
            cells[5:] = [", ".join(map(str, vtm.layers)), str(vtm.kappa)]
        rows.append([f"`{config}`", *cells])
    return aligned_table(HEAD, rows, right=())
