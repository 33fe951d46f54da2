"""Tables of what a study measured besides accuracy: final weights, HTM's dose, saliency, labels."""

from experiments.documents.markdown import aligned_table
from experiments.study.measures import BLUR, NOISE, PATCH, SALIENCY_IMAGES
from experiments.study.statistics import Comparison, Difference, Standing, Summary, layers_of

MEASURES = {
    "loss": ("loss", 3),
    "calibration_error": ("calibration error", 3),
    "top1_noise": ("top-1, noise", 2),
    "top1_blur": ("blur", 2),
    "top1_occlusion": ("occlusion", 2),
    "train_top1": ("training images", 2),
    "train_loss": ("their loss", 3),
}
DOSE = {
    "mixed_share": ("samples mixed", "{:.0%}"),
    "tokens_mixed": ("tokens", "{:.1f}"),
    "label_share": ("label share", "{:.0%}"),
    "largest_saliency_share": ("largest saliency", "{:.0%}"),
    "same_place_share": ("at one place", "{:.0%}"),
}
AGREEMENT = {
    "tokens": ("tokens", "{:.1f}"),
    "share": ("label", "{:.0%}"),
    "share_by_tokens": ("by tokens", "{:.0%}"),
    "share_seen": ("seen", "{:.0%}"),
    "share_seen_random": ("seen, random places", "{:.0%}"),
    "gap": ("label off by", "{:.0%}"),
    "gap_by_tokens": ("by tokens off by", "{:.0%}"),
}


def measures(comparison: Comparison, picture: str) -> list[str]:
    """Further measures of the final weights, and HTM's dose; nothing for studies without them.

    `picture` is the name of that of the attention sinks.
    """
    parts = []
    tested = [s for s in comparison.standings if s.measures]
    if tested:
        rows = [[s.variant.name, *(_measure(s, name) for name in MEASURES)] for s in tested]
        head = ["variant", *(title for title, _ in MEASURES.values())]
        parts += [
            "Of the final weights: cross-entropy; expected calibration error in 15 bins; top-1 on "
            f"the evaluated images under Gaussian noise (standard deviation {NOISE:g} of pixels "
            f"from 0 to 1), under a blur ({BLUR:g} pixel), and with a quarter of the patches "
            f"({PATCH}×{PATCH} pixels) in grey; top-1 and cross-entropy on the training images, "
            "not augmented.\n",
            aligned_table(head, rows, range(1, len(head))),
            *_differences(tested),
            *_curves(tested),
        ]
    mixing = [s for s in comparison.standings if s.by_epoch]
    if mixing:
        rows = [
            [s.variant.name, *(form.format(s.by_epoch["all"][n]) for n, (_, form) in DOSE.items())]
            for s in mixing
        ]
        head = ["variant", *(title for title, _ in DOSE.values())]
        parts += [
            "HTM over the whole training: samples mixed; tokens and label share taken from the "
            "partner, per easy sample (the share by the settings, also where a rule gives "
            "another); the share of saliency that the most salient token holds; and the share of a "
            "batch's samples in which it is at the most frequent place.\n",
            aligned_table(head, rows, range(1, len(head))),
        ]
    layers = layers_of(comparison)
    if layers:
        rows = [
            [s.variant.name, *(_saliency(s, layer) for layer in layers)]
            for s in comparison.standings
            if s.measures
        ]
        head = ["variant", *(f"layer {layer}" for layer in layers)]
        parts += [
            f"Saliency in the final weights, for {SALIENCY_IMAGES:,} evaluated images: the share "
            "that the most salient token holds; the share of the images in which it is at the most "
            "frequent place; and at the border.\n",
            aligned_table(head, rows, range(1, len(head))),
            f"![Attention sinks by layer and over the training]({picture}.svg)\n",
        ]
    return parts


def agreement(comparison: Comparison, picture: str) -> list[str]:
    """How well the labels agree with what a judge sees; nothing where none was asked.

    `picture` is the name of that of the shares.
    """
    rows = [
        [s.variant.name, f"{rho:g}", *(_agreement(found, name) for name in AGREEMENT)]
        for s in comparison.standings
        for rho, found in s.agreement.items()
    ]
    if not rows:
        return []
    head = ["variant", "rho", *(title for title, _ in AGREEMENT.values())]
    return [
        "Labels against the picture: all samples of test batches mixed by the saliency at layer "
        "0, pairs of different classes. The partner's share of the label, by saliency and by the "
        "number of tokens; what a model trained on all images sees of the partner in the mixed "
        "picture, and what it sees if as many tokens are taken at random places; and how far each "
        "label is off what it sees, mean of the absolute values. A label that ignored the partner "
        "would be off by what is seen.\n",
        aligned_table(head, rows, range(1, len(head))),
        f"![The partner's share, by the label and as seen]({picture}.svg)\n",
    ]


def _differences(standings: list[Standing]) -> list[str]:
    rows = [
        [f"{s.variant.name} − {reference}", *(_difference(found, name) for name in MEASURES)]
        for s in standings
        for reference, found in s.measures_to.items()
        if found
    ]
    head = ["variant − variant", *(title for title, _ in MEASURES.values())]
    return [
        "Their differences, paired over the seeds, with 95% intervals, not corrected for their "
        "number: they describe the models and decide nothing.\n",
        aligned_table(head, rows, range(1, len(head))),
    ]


def _curves(standings: list[Standing]) -> list[str]:
    epochs = list(dict.fromkeys(epoch for s in standings for epoch in s.curve))
    rows = [
        [s.variant.name, *(s.curve[e].text(2) if e in s.curve else "–" for e in epochs)]
        for s in standings
    ]
    return [
        "Top-1 over the training, after so many epochs, on validation images, which are not those "
        "of the tables above.\n",
        aligned_table(["variant", *epochs], rows, range(1, len(epochs) + 1)),
    ]


def _difference(found: dict[str, Difference], name: str) -> str:
    return found[name].text(MEASURES[name][1]) if name in found else "–"


def _agreement(found: dict[str, Summary], name: str) -> str:
    return AGREEMENT[name][1].format(found[name].mean) if name in found else "–"


def _saliency(standing: Standing, layer: int) -> str:
    names = ("largest_share", "same_place_share", "border_share")
    values = (standing.measures[f"layer{layer}/{name}"].mean for name in names)
    return ", ".join(f"{value:.0%}" for value in values)


def _measure(standing: Standing, name: str) -> str:
    return standing.measures[name].text(MEASURES[name][1])
