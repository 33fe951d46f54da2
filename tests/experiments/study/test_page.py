"""Studies: tables, pages and pictures are those of the records."""

import pytest

from experiments.documents.markdown import fill_blocks
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.study import page, tables
from experiments.study.page import (
    claims_table,
    makers,
    markdown,
    summary,
    table,
    verdict,
    write_report,
)
from experiments.study.plan import read_study
from experiments.study.records import study_records
from experiments.study.statistics import compare
from tests.helpers.study_helper import record_of, runner_of, write_study


def example(folder, **figures):
    """A study with records of the given variants: a list of top-1 by seed."""
    found = read_study(write_study(folder, seeds=[1, 2, 3]))
    return compare(
        found,
        [
            record_of(found, variant, seed, top1)
            for variant, values in figures.items()
            for seed, top1 in enumerate(values, start=1)
            if top1 is not None
        ],
    )


def test_the_page_leaves_nothing_out_and_says_what_is_missing(tmp_path):
    comparison = example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91.5, None, 93.5])
    text = markdown(comparison)
    assert "**5 of 9 trainings are done**" in text
    lines = [[c.strip() for c in row.split("|")[1:-1]] for row in table(comparison).splitlines()]
    assert lines[2][:4] == ["plain", "3", "91.00 ± 1.00", "–"]
    assert lines[3][:4] == ["HTM", "2", "92.50 ± 1.41", "+1.50 [+1.50, +1.50]"]
    assert lines[4][:4] == ["mask", "0", "–", "–"] and lines[4][4] == "HTM"
    for figure in ("90.00", "91.00", "92.00", "91.50", "93.50"):
        assert figure in page.every_training(comparison)
    assert "python -m experiments.study --study" in text and "a processor" in text
    assert "commits: abc" in text and "torch 2" in text and "2026-11-25" in text
    assert "compared with plain: `horizontal.layers: [1]" in text


def test_a_complete_study_says_so_and_its_words_follow_the_intervals(tmp_path):
    noise = example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91, 90, 92.5], mask=[80, 81, 82.1])
    assert "All 9 trainings are done." in markdown(noise)
    words = verdict(noise)
    assert "to plain: 1 of 2 intervals exclude 0: mask (−9.97)" in words
    assert "“against”: 1 of 1 intervals exclude 0: mask (−10.13)" in words
    none = verdict(example(tmp_path, plain=[90.0, 91.0, 92.0], HTM=[91, 90, 92.5]))
    assert "to plain: 0 of 1 intervals exclude 0." in none


def test_records_of_what_the_study_no_longer_has_do_not_count(tmp_path):
    found = read_study(write_study(tmp_path))
    stray = record_of(found, "HTM", 1, 99.0).model_copy(update={"variant": "gone"})
    comparison = compare(found, [stray, record_of(found, "HTM", 1, 50.0)])
    assert len(comparison.records) == 1 and "99.00" not in markdown(comparison)


def test_report_writes_page_and_pictures_always_the_same(tmp_path):
    runner = runner_of(tmp_path, write_study(tmp_path))
    for seed, top1 in ((1, 50.0), (2, 52.0)):
        for variant, value in (("plain", top1), ("HTM", top1 + seed)):
            runner.records.keep(record_of(runner.study, variant, seed, value))
    paths = write_report(runner.study, tmp_path / "results")
    contents = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["README.md", "study.png", "study.svg"]
    assert contents[1].startswith(b"\x89PNG") and contents[2].startswith(b"<?xml")
    assert [p.read_bytes() for p in write_report(runner.study, tmp_path / "results")] == contents


def test_documents_show_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = read_study("configs/studies/digits.yaml")
    for seed, variant in ((1, "plain"), (1, "HTM")):
        study_records(tmp_path, "digits").keep(record_of(found, variant, seed, 97.25))
    text = "a\n<!-- generated: study digits -->\nold\n<!-- end of what is generated -->\nz\n"
    made = fill_blocks(text, makers(tmp_path))
    assert "**2 of 40 trainings are done**" in made and "97.25" in made and "old" not in made
    assert fill_blocks(made, makers(tmp_path)) == made
    with pytest.raises(ConfigError, match=r"nothing.yaml: cannot read"):
        fill_blocks(text.replace("digits", "nothing"), makers(tmp_path))


def test_the_pages_of_the_repository_are_those_of_its_records(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in sorted((ROOT / "results" / "studies").glob("*/records.jsonl")):
        name = file.parent.name
        found = read_study(f"configs/studies/{name}.yaml")
        records = study_records(ROOT / "results", name).read()
        made = markdown(page.comparison_of(found, ROOT / "results"))
        assert (file.parent / "README.md").read_text() == made, f"{name}: --report makes it anew"
        for record in records:
            identity = found.identity(found.variants[record.variant], record.seed)
            assert record.identity == identity, f"{name}: {record.variant}/{record.seed}"
    for document, kind in ((ROOT / "README.md", "claims"), (ROOT / "docs/results.md", "study")):
        text = document.read_text(encoding="utf-8")
        assert f"<!-- generated: {kind} " in text
        assert fill_blocks(text, makers(ROOT / "results")) == text, "--report makes it anew"


def test_the_summary_has_every_study_of_htm_vtm_and_both(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert summary(tmp_path).count("\n") == 2, "no study has a record"
    for name in ("digits", "ablations"):  # the second compares other variants
        found = read_study(f"configs/studies/{name}.yaml")
        for seed in (1, 2):
            for variant, top1 in (("plain", 90.0), ("HTM", 91.0 + seed), ("VTM", 90.0)):
                study_records(tmp_path, name).keep(record_of(found, variant, seed, top1))
    (line,) = summary(tmp_path).splitlines()[2:]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[:3] == ["Handwritten digits", "90.00 ± 0.00", "2"]
    assert cells[3].startswith("+2.50 [−3.85, +8.85]") and cells[4].startswith("0.00 [")
    assert cells[5] == "–"


def test_a_study_with_measures_has_a_picture_of_the_sinks(tmp_path):
    figures = {name: [90.0, 91.0, 92.0] for name in ("plain", "HTM", "mask")}
    comparison = judged(tmp_path, ["HTM", "plain"], **figures)
    for record in comparison.records:
        study_records(tmp_path, "tiny").keep(record)
    paths = write_report(comparison.study, tmp_path)
    pictures = [path for path in paths if path.name.startswith("saliency")]
    contents = [path.read_bytes() for path in pictures]
    assert len(pictures) == 2 and contents[0].startswith(b"\x89PNG")
    write_report(comparison.study, tmp_path)
    assert [path.read_bytes() for path in pictures] == contents


def judged(folder, control, **figures):
    """A study with claims whose trainings are all done: the page's words."""
    pair = {"primary": [["HTM", "plain"]], "beside": [["mask", "HTM"]], "control": control}
    path = write_study(folder, seeds=[1, 2, 3], claims={"margin": 0.3, **pair})
    study = read_study(path)
    names = ("largest_share", "same_place_share", "border_share")
    sinks = {f"layer{layer}/{n}": 0.1 + 0.2 * layer for layer in range(3) for n in names}
    records = [
        record_of(study, variant, seed, top1).model_copy(
            update={
                "measures": dict.fromkeys({*tables.MEASURES} - {"loss"}, top1) | sinks,
                "loss": top1 / 100,
                "top1_by_epoch": {"1": seed + 50.0, "2": top1},
                "statistics_by_epoch": {
                    epoch: {f"htm/layer1/{n}": 0.25 for n in tables.DOSE} for epoch in ("2", "all")
                },
            }
        )
        for variant, values in figures.items()
        for seed, top1 in enumerate(values, start=1)
    ]
    return compare(study, records)


def test_claims_are_judged_once_all_trainings_are_done(tmp_path):
    figures = {"plain": [90.0, 91.0, 92.0], "HTM": [91.0, 92.1, 93.0], "mask": [91.1, 92.0, 93.0]}
    comparison = judged(tmp_path, ["HTM", "plain"], **figures)
    words = verdict(comparison)
    assert "positive control: +1.03 [+0.89, +1.18], p = 0.001. It is better, so" in words
    # differences 1, 1.1, 1: t = 31 of 2 degrees of freedom, by tables p = 0.00104
    assert "**HTM against plain**: +1.03 [+0.89, +1.18], p = 0.001, corrected" in words
    assert (
        "mask against HTM, beside them: 0.00 [−0.25, +0.25], p = 1.000, uncorrected, which decides "
        "nothing: equal within 0.3" in words
    )
    insensitive = verdict(judged(tmp_path, ["mask", "HTM"], **figures))
    assert "**the study is insensitive**" in insensitive
    text = markdown(comparison)
    assert "| HTM     | 0.920 ± 0.010 |    92.033 ± 1.002 |" in text, "of the measures"
    rows = [" ".join(line.split()) for line in text.splitlines()]
    row = "| HTM − plain | +0.010 [+0.009, +0.012] | +1.033 [+0.890, +1.177] | +1.03 [+0.89, +1.18]"
    assert any(line.startswith(row) for line in rows), "of their differences"
    assert any(line.startswith("| mask − HTM | 0.000 [−0.002, +0.002]") for line in rows)
    assert "| HTM     | 52.00 ± 1.00 | 92.03 ± 1.00 |" in text, "of the curve"
    assert "| HTM     |           25% |    0.2 |         25% |" in text, "of the dose"
    assert "| HTM     | 10%, 10%, 10% | 30%, 30%, 30% | 50%, 50%, 50% |" in text, "of the sinks"
    short = claims_table(comparison).splitlines()
    assert short[0].startswith("| Tiny, 3 seeds") and len(short) == 4
    cells = [cell.strip() for cell in short[2].strip("|").split("|")]
    assert cells == ["HTM against plain", "+1.03 [+0.89, +1.18]", "better"]
    some = {**figures, "mask": [91.1]}
    unfinished = judged(tmp_path, ["HTM", "plain"], **some)
    assert verdict(unfinished) == "- The claims are judged when all trainings are done.\n"
    assert unfinished.outcome is None


def test_a_search_tells_the_best_of_each_arm(tmp_path):
    path = write_study(tmp_path, arms=["plain", "HTM", "mask"])
    study = read_study(path)
    records = [record_of(study, "plain", seed, 50.0 + seed) for seed in (1, 2)]
    words = verdict(compare(study, [*records, record_of(study, "HTM", 1, 60.0)]))
    assert words.splitlines() == [
        "- Best of plain: plain, 51.50 ± 0.71.",
        "- HTM: not all of its trainings are done.",
        "- mask: not all of its trainings are done.",
    ]
