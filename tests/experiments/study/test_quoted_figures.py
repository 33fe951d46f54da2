"""Figures in the words of results.md and training_loop.md are those of the records."""

from experiments.provenance import ROOT
from experiments.study.page import comparison_of
from experiments.study.plan import read_study
from experiments.study.records import label_records, study_records
from experiments.study.statistics import paired_difference

RESULTS = ROOT / "results"


def words_of(name):
    """A document's words, whatever its lines."""
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def standings(name):
    """What became of a study's variants, by name."""
    study = read_study(ROOT / "configs" / "studies" / f"{name}.yaml")
    return {s.variant.name: s for s in comparison_of(study, RESULTS).standings}


def recorded(study, variant, measure):
    """Seed -> value."""
    records = study_records(RESULTS, study).read()
    return {one.seed: getattr(one, measure) for one in records if one.variant == variant}


def lowered(difference, digits=3):
    """A difference below 0 as what something is lower by."""
    low, high = difference.interval
    assert high < 0
    return f"{-difference.mean:.{digits}f} [{-high:.{digits}f}, {-low:.{digits}f}]"


def raised(difference, digits=3):
    low, high = difference.interval
    assert low > 0
    return f"{difference.mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def test_the_earlier_studies():
    """Fewer tokens, differences in images, and doses."""
    words = words_of("results.md")
    vit, cct = standings("released"), standings("released_cct")
    fewer = [
        1 - found[mask].tokens_mixed / found[right].tokens_mixed
        for found, mask, right in (
            (vit, "released mask", "HTM + VTM"),
            (cct, "HTM, released mask", "HTM"),
            (cct, "both, released mask", "HTM + VTM"),
        )
    ]
    assert f"{100 * min(fewer):.0f} to {100 * max(fewer):.0f}% fewer tokens" in words
    own, released = cct["HTM"].by_seed, cct["HTM, released mask"].by_seed
    images = [round((released[seed] - own[seed]) * 3.55) for seed in sorted(own)]
    assert images == [0, -1, 0, 0, 0] and "0, −1, 0, 0 and 0 of 355 images" in words
    found = standings("ablations")
    doses = [100 * found[name].mixed_share for name in ("HTM, layer 0", "HTM")]
    assert f"{doses[0]:.0f}% are mixed instead of {doses[1]:.0f}%" in words


def test_the_study_of_small_data():
    found = standings("small_data")
    loop, results = words_of("training_loop.md"), words_of("results.md")
    both, on_top = found["HTM + VTM"].to_plain, found["CutMix + HTM + VTM"].to_other
    gains = [f"{found[name].to_plain.mean:.2f}" for name in ("CutMix", "Mixup")]
    assert f"CutMix gained {gains[0]} points, Mixup {gains[1]}, HTM and VTM" in loop
    assert both.text(2).removeprefix("+") in loop
    assert f"lost {on_top.text(2).removeprefix('−').replace(' ', ' points ', 1)}" in loop
    assert f"scored {both.mean:.2f} points above" in results
    assert f"is worse, by {-on_top.mean:.2f} points" in results
    htm, pair = found["HTM"].measures_to["plain"], found["CutMix + HTM + VTM"].measures_to["CutMix"]
    assert (
        f"lowered the test loss by {-htm['loss'].mean:.3f} and the calibration error by "
        f"{-htm['calibration_error'].mean:.3f}" in results
    )
    assert (
        f"raised the test loss by {pair['loss'].mean:.3f} and the calibration error by "
        f"{pair['calibration_error'].mean:.3f}" in results
    )
    for name in ("HTM", "VTM", "HTM + VTM"):
        differences = found[name].measures_to["plain"]
        corrupted = ("top1_noise", "top1_blur", "top1_occlusion")
        assert not any(differences[corruption].excludes_zero for corruption in corrupted)
    hidden = [found[n].measures_to["plain"]["top1_occlusion"].mean for n in ("CutMix", "Mixup")]
    assert "CutMix gains {:.0f} points and Mixup {:.0f}".format(*hidden) in results


def test_sinks_dose_and_labels():
    found = standings("small_data")
    loop, results = words_of("training_loop.md"), words_of("results.md")
    spans = []
    for name in ("largest_share", "border_share", "same_place_share"):
        means = [100 * found["plain"].measures[f"layer{n}/{name}"].mean for n in range(4)]
        spans.append((round(min(means)), round(max(means))))
    assert "one token of 49 holds {} to {}% of the saliency".format(*spans[0]) in results
    assert "at the border in {} to {}% of the images".format(*spans[1]) in results
    assert "at one and the same place in {} to {}%".format(*spans[2]) in results
    dose = found["HTM"].by_epoch["all"]
    assert f"HTM mixed {dose['mixed_share']:.0%} of the samples" in results
    taken = dose["tokens_mixed"]
    assert (
        f"It took {taken:.1f} tokens of an easy sample from the partner, {taken / 49:.0%}"
        in results
    )
    assert f"with them {dose['label_share']:.0%} of the label" in results
    means = {name: f"{100 * s.mean:.0f}" for name, s in found["plain"].agreement[0.0204].items()}
    for sentence in (
        "label gives the partner {share}%. The taken tokens are {share_by_tokens}%. The judge sees "
        "{share_seen}%, and {share_seen_random}% where",
        "Labels by saliency are off by {gap} points, labels by the number of tokens would be off "
        "by {gap_by_tokens}, and labels that leave the partner out by {share_seen}.",
        "of {share_by_tokens}% random tokens it sees {share_seen_random}%",
    ):
        assert sentence.format(**means) in results
    judged = [
        r.agreement
        for r in label_records(RESULTS, "small_data").read()
        if (r.variant, r.rho) == ("plain", 0.0204)
    ]
    vits = list(standings("small_data_vit").values())
    words = ("{} to {}% with a class token", "{} to {}% with registers", "{} to {}% where saliency")
    for standing, sentence in zip(vits, words, strict=True):
        shares = [100 * standing.measures[f"layer{n}/largest_share"].mean for n in (1, 2, 3)]
        assert sentence.format(round(min(shares)), round(max(shares))) in results
    means = {name: f"{100 * s.mean:.0f}" for name, s in vits[0].agreement[0.0204].items()}
    assert (
        "label gives the partner {share}%, the tokens are {share_by_tokens}%, the judge sees "
        "{share_seen}%, and {share_seen_random}% of random".format(**means)
        in results
    )
    shares = f"took {taken / 49:.0%} of the tokens and with them {dose['label_share']:.0%} of the"
    assert shares in loop
    assert len(judged) == 10
    assert all(one["share_seen"] < one["share_seen_random"] for one in judged)


def test_the_labels_by_tokens():
    loop, results = words_of("training_loop.md"), words_of("results.md")
    asked = standings("small_data_labels")
    mended = asked["every sample, labels by tokens"]
    gain, loss = mended.to_plain, mended.measures_to["every sample"]["loss"]
    assert gain.interval[0] > 0
    assert f"Labels by tokens gain {gain.mean:.2f} points." in results
    assert f"The test loss is lower by {lowered(loss)}, of which" in results
    assert f"[gained {gain.mean:.2f} points](" in loop
    by_saliency = asked["every sample"].by_epoch["all"]["label_share"]
    by_tokens = mended.by_epoch["all"]["tokens_mixed"] / 49
    assert f"less of the label, {by_tokens:.0%} instead of {by_saliency:.0%}," in results
    before = standings("small_data_ablations")
    cost, left = (before[f"every sample{end}"].to_plain for end in ("", ", labels by tokens"))
    assert f"it is {-cost.mean:.2f} points worse than plain" in results and cost.excludes_zero
    assert f"with labels by tokens the difference is {left.text(2)}. In the library" in results
    remedies = [
        before[f"{base}, {remedy}"].to_other
        for base in ("HTM", "every sample")
        for remedy in ("centred saliency", "labels by tokens")
    ]
    assert [one.excludes_zero for one in remedies] == [False, False, False, True]
    assert f"where every sample is mixed: {remedies[-1].text(2)}. Chosen for that" in results


def test_the_ablations_on_small_data():
    loop, results = words_of("training_loop.md"), words_of("results.md")
    found, plain = standings("small_data_ablations"), "plain, drop path 0.1"

    def measured(name, to, measure="loss"):
        return found[name].measures_to[to][measure]

    htm, loss = found["HTM"].to_plain, measured("HTM", plain)
    none = found["plain, no drop path"]
    assert (
        f"the same drop path by {htm.text(2)} points, and by {loss.text(3)} in test loss. Drop "
        f"path alone lowers plain's loss by {raised(none.measures_to[plain]['loss'])}." in results
    )
    assert not none.measures_to[plain]["calibration_error"].excludes_zero, "this is open"
    assert f"at the same drop path: the difference is {htm.text(2)}." in results

    names = ("loss", "calibration_error")
    htm, vtm = (
        [measured(f"CutMix + {which}", "CutMix", name) for name in names]
        for which in ("HTM", "VTM")
    )
    by_vtm = [one.text(3).removeprefix("+") for one in vtm]
    assert not any(one.excludes_zero for one in vtm)
    assert (
        f"raises the test loss by {raised(htm[0])} and the calibration error by {raised(htm[1])}, "
        f"VTM by {by_vtm[0]} and {by_vtm[1]}." in results
    )
    mended = lowered(measured("CutMix + HTM, labels by tokens", "CutMix + HTM"))
    losses = [
        recorded("small_data_ablations", name, "loss")
        for name in ("CutMix + HTM, labels by tokens", "CutMix")
    ]
    remains = paired_difference(*losses)
    assert f"take {mended} of that loss away; {raised(remains)} remains" in results
    assert f"lowered the test loss by {mended}, with five seeds" in loop
    assert not any(
        found[f"CutMix + {name}"].to_other.excludes_zero
        for name in ("HTM", "VTM", "HTM, labels by tokens")
    ), "top-1 cannot tell"
    both, cutmix = (
        recorded("small_data", name, "top1") for name in ("CutMix + HTM + VTM", "CutMix")
    )
    five = paired_difference({seed: both[seed] for seed in range(1, 6)}, cutmix)
    assert f"differ from CutMix by only {five.text(2)} points" in results

    dose = found["every sample"].to_other
    assert f"mixes every sample, and scores {lowered(dose, 2)} points below HTM" in results
    assert f"HTM scored [{-dose.mean:.2f} points lower](" in loop
    assert f"[it cost {-found['every sample'].to_plain.mean:.2f} points](" in loop
    chosen = [
        found[f"{base}, random {what}"].to_other
        for base in ("HTM", "every sample")
        for what in ("partners", "saliency")
    ]
    assert not any(one.excludes_zero for one in chosen)
    assert (
        "optimal ones by {}, random saliency from attention's by {}; where every sample is mixed, "
        "by {} and {}.".format(*(one.text(2) for one in chosen))
        in results
    )
    others = [
        found[name].to_other.text(2)
        for name in ("HTM, layer 0", "HTM, layer 2", "HTM, released mask", "VTM, no gradient")
    ]
    assert (
        "Layer 0 differs from layer 1 by {}, layer 2 by {}, the released code's mask from the "
        "paper's by {}.".format(*others[:3])
        in results
    )
    assert f"into the remembered tokens top-1 differs by {others[3]}." in results
    partners = lowered(measured("HTM, random partners", "HTM"))
    assert f"In test loss random partners are lower, by {partners}." in results
    shares = [
        round(100 * found[f"every sample{end}"].by_epoch["all"]["largest_saliency_share"])
        for end in ("", ", centred saliency")
    ]
    centred = found["every sample, centred saliency"].to_other
    assert (
        f"the most salient token holds {shares[1]}% instead of {shares[0]}%, and top-1 changes by "
        f"{centred.text(2)}." in results
    )
