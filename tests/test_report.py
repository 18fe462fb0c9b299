"""The report's figures from known results, what it claims and does not, and that no name can break out of the page."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from bench import report
from bench.report import build_report, escape, main, render, significant, target_top1, variant_rows
from bench.results import Ablation, Arm, Comparison, Results, Run, Timing, Variant, write_results
from fastcifar.errors import InputError
from tests.bench_results import ARCHS, make_results

HOSTILE = '</style></script><script>alert(1)</script>"><img src=x onerror=alert(2)>|`*_[x](http://evil) $\\frac{1 &amp; \u202e'


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Charts take seconds: only tests of the page itself draw them."""
    if not request.function.__name__.startswith(("test_hostile", "test_the_command", "test_one_seed")):
        monkeypatch.setattr(report, "draw_svg", lambda name, height, draw: "<svg></svg>")


def known_results(seeds=2):
    """One variant whose figures can be worked out by hand: 1,000 images; epochs of 10, 4, 5 and 4 s."""
    tops = [(0.2, 0.5, 0.6, 0.70), (0.2, 0.4, 0.6, 0.72)][:seeds]
    runs = [
        Run(
            f"se_resnet18-seed{seed}", "se_resnet18", seed, 128, 1000, 500, [10.0, 4.0, 5.0, 4.0], [1.0] * 4, list(row),
            top1=row[-1], flip_top1=row[-1] + 0.01, best_top1=max(row), first_step_seconds=3.0 + seed, compile_seconds=1.0,
            peak_memory_bytes=2**30 * (1 + seed), energy_joules=460.0,
        )
        for seed, row in enumerate(tops)
    ]  # fmt: skip
    variant = Variant("se_resnet18", "D", 2_818_090, 834_149_376, "85.574 % Kaggle", 500.0)
    speeds = Comparison({"rounds": 3, "images": 100}, [Timing("se_resnet18", "se_resnet18", "", [200.0, 250.0, 312.5])])
    data = {"name": "CIFAR-10", "official": True, "synthetic": False}
    return Results({"hardware": "one core"}, data, {}, [variant], runs, speeds)


def entries(results):
    """{column: entry} of the first row of both tables of variants."""
    tables = [section for section in build_report(results).sections if section.title.startswith("Variants")]
    return {title: entry for table in reversed(tables) for title, entry in zip(table.columns, table.rows[0], strict=True)}


def section(results, title):
    return next(section for section in build_report(results).sections if section.title.startswith(title))


def test_every_figure_of_a_known_result():
    found = entries(known_results())
    texts = {title: (entry.text.replace("\xa0", " "), entry.detail.replace("\xa0", " ")) for title, entry in found.items()}
    reach = 12.7062 * 0.01  # t(0.975, 1) x deviation / sqrt(2)
    top1 = ("71.00 ± 1.41", f"[{100 * (0.71 - reach):.2f}, {100 * (0.71 + reach):.2f}]")
    spread = math.exp(4.302653 * math.log(1.25) / math.sqrt(3))  # t(0.975, 2) on the logarithms of rates 1.25 apart
    assert texts == {
        "Variant": ("se_resnet18", "report D, 2 seeds × 4 epochs"),
        "Min/epoch": ("3.33", f"[{significant(10 / 3 / spread)}, {significant(10 / 3 * spread)}]"),  # 50,000 / 250 / 60
        "Top-1, %": top1,
        "Images/s": ("250", f"[{significant(250 / spread)}, {significant(250 * spread)}]"),
        "Epochs/s": ("0.00500", f"[{significant(0.005 / spread)}, {significant(0.005 * spread)}]"),
        "With flip, %": ("72.00 ± 1.41", f"[{100 * (0.72 - reach):.2f}, {100 * (0.72 + reach):.2f}]"),
        "Best, %": top1,
        "Report claims": ("85.574 % Kaggle", ""),
        "Training": ("4.00 s", "4.00 to 5.00 s"),
        "Evaluation": ("1.00 s", ""),
        "First step": ("3.50 s", "3.00 to 4.00 s"),
        "Compile": ("1.00 s", ""),
        "Peak memory": ("1.50 GiB", "1.00 to 2.00 GiB"),
        "Parameters": ("2,818,090", ""),
        "FLOPs/image": ("834 M", ""),
        "Of roofline": ("50 %", ""),
        "Energy/epoch": ("5.75 kJ", ""),  # 460 J for 4,000 images
    }
    columns = section(known_results(), "Variants: speed").columns
    assert columns[:4] == ["Variant", "Min/epoch", "Top-1, %", "Images/s"]  # what a phone shows first


def test_without_turns_speeds_are_the_trainings_own_and_said_to_be():
    results = replace(known_results(), speeds=None)
    assert entries(results)["Images/s"].text == "232"  # steady epochs: 250, 200, 250 images/s twice
    assert any("not in turns" in note for note in section(results, "Variants: speed").notes)
    assert any("timed in turns" in note for note in section(known_results(), "Variants: speed").notes)


def test_one_seed_has_its_images_interval_and_says_so_once():
    found = entries(known_results(seeds=1))["Top-1, %"]
    assert found.text == "70.00"
    assert found.detail.replace("\xa0", " ") == "[65.84, 73.85]"  # Wilson's of 350 of 500
    page = render(build_report(make_results(seeds=1, epochs=2)), "report.html")
    assert page.lower().count("one seed") == 1
    assert "mathdefault" not in page  # digits between powers of ten, where an axis spans less than one


def test_time_to_an_accuracy_says_who_did_not_reach_it():
    results = known_results()
    assert [run.epochs_to(0.5) for run in results.runs] == [2, 3]
    assert target_top1(results, variant_rows(results)) == 0.7
    assert target_top1(results, []) is None

    def row(target, results=results):
        found = section(replace(results, settings={"target_top1": target}), f"To {100 * target:g} %")
        return {title: entry.text for title, entry in zip(found.columns, found.rows[0], strict=True)}, found.rows[0]

    texts, _ = row(0.5)
    assert texts == {"Trained": "se_resnet18", "Last epoch, %": "71.00\xa0±\xa01.41", "Seconds": "16.5 s"}  # 14 and 19 s
    assert row(0.71)[1][2].detail == "1 of 2 seeds"
    assert row(0.9)[0]["Seconds"] == "not reached"
    sides = {0.5: "] ▲ above", 0.7: "] neither side shown", 0.9: "] ▼ below"}  # of 58.29 to 83.71 %
    assert all(row(target)[1][1].detail.endswith(side) for target, side in sides.items())
    counted = [replace(run, epoch_flops=[1e12] * 4, epoch_joules=[200.0, 100.0, 100.0, None]) for run in results.runs]
    texts, _ = row(0.5, replace(results, runs=counted))
    assert (texts["TFLOP"], texts["Energy"]) == ("2.50", "0.350 kJ")


def test_a_rate_is_that_of_the_largest_images_after_the_first_epoch():
    run = replace(known_results().runs[0], train_seconds=[9.0, 1.0, 4.0, 5.0], images_per_epoch=100)
    assert run.rates == [100.0, 25.0, 20.0]
    assert replace(run, epoch_flops=[1e12, 1e12, 2e12, 2e12]).rates == [25.0, 20.0]
    assert replace(run, epoch_flops=[2e12], train_seconds=[9.0]).rates == [100 / 9]


def test_outside_scripts_runs_stand_beside_ours_and_are_the_reference():
    ours = known_results()
    runs = [replace(run, arch="airbench", train_seconds=[2 * s for s in run.train_seconds]) for run in ours.runs]
    script = Timing("airbench", "airbench", "", [50.0], in_turns=False, runs=runs)
    results = replace(ours, settings={"target_top1": 0.7}, baselines=Comparison({}, [script]))
    found = section(results, "To 70 %")
    assert [row[0].text for row in found.rows] == ["se_resnet18", "airbench"]
    assert found.columns[-1] == "Speed against airbench"
    assert [row[-1].text for row in found.rows] == ["2.00×", "–"]
    assert [row[2].text for row in found.rows] == ["23.0 s", "46.0 s"]
    assert len(section(results, "Learning curves").charts) == 2  # without FLOPs
    (row,) = section(results, "Other training loops").rows
    assert [entry.text for entry in row] == ["airbench", "50.0"]  # with nothing of ours to compare it with


def test_nothing_is_ranked_whose_intervals_overlap():
    def headlines(results):
        return {what for what, _, _ in build_report(results).headlines}

    apart = make_results(seeds=1)  # 10,000 test images each
    assert {"Fastest", "Highest accuracy"} <= headlines(apart)
    few = replace(apart, runs=[replace(run, test_images=200) for run in apart.runs])
    assert "Highest accuracy" not in headlines(few)
    assert "No Pareto front" in section(few, "Speed against accuracy").notes[0]
    slow = [replace(t, images_per_second=[r * f for r, f in zip(t.images_per_second, [0.5] * 6 + [2.0] * 6, strict=True)])
            for t in apart.speeds.timings]  # fmt: skip
    assert "Fastest" not in headlines(replace(apart, speeds=replace(apart.speeds, timings=slow)))
    rows = section(apart, "Variants: speed").rows
    assert [row[0].text for row in rows] == list(ARCHS)  # the table's own order, not by speed


def test_a_busy_machine_is_a_banner():
    def banners(load):
        return build_report(replace(known_results(), environment={"cores": 2, "load": load})).banners

    assert banners({"at the start": 1.2, "before the speeds": 2.1}) == []
    (said,) = banners({"at the start": 1.2, "before the speeds": 7.5})
    assert "Busy machine: its load was 7.5 before the speeds, on 2 cores" in said


def test_what_the_data_is_stands_first():
    def banners(**data):
        return build_report(replace(known_results(), data={"name": "x", **data})).banners

    assert "accuracy means nothing" in banners(synthetic=True, official=False)[0]
    assert "Not the official archive" in banners(synthetic=False, official=False)[0]
    assert banners(synthetic=False, official=True) == []
    synthetic = build_report(make_results(seeds=1, data={"name": "synthetic dataset", "synthetic": True}))
    assert not any("accuracy" in what for what, _, _ in synthetic.headlines)


def test_optimizations_and_baselines_claim_only_what_they_show():
    steps = section(make_results(), "Optimizations").rows
    verdicts = [row[2].detail.split("] ")[1] for row in steps[1:5]]
    assert verdicts == ["▲ faster", "▲ faster", "▲ faster", "no difference shown"]
    assert (steps[0][2].text, steps[3][3].text) == ("–", "2.99×")
    assert (steps[5][1].text, steps[5][1].detail) == ("–", "not applicable: needs a GPU")
    loops = section(make_results(), "Other training loops")
    assert loops.rows[1][2].text == "3.03×"
    assert (loops.rows[3][1].text, loops.rows[3][1].detail) == (
        "failed",
        "ModuleNotFoundError: No module named 'airbench'",
    )
    assert loops.rows[4][2].detail == "1 round: no interval"
    assert any("Not timed in turns: airbench, script" in note for note in loops.notes)
    in_turns = make_results()
    in_turns = replace(in_turns.baselines, timings=in_turns.baselines.timings[:3])
    assert not any("Not timed" in note for note in section(make_results(baselines=in_turns), "Other training loops").notes)
    failed = section(make_results(), "Failed").rows
    assert [row[0].text for row in failed] == ["resnet42-seed9", "report_d/3-seed4", "baselines: airbench"]


def test_an_outside_scripts_own_statements_are_shown():
    script = Timing("own", "own", images_per_second=[50.0], in_turns=False, top1=0.94, seconds_to_accuracy=12.0)
    ours = Timing("fastcifar", "fastcifar", images_per_second=[100.0, 110.0])
    loops = section(replace(known_results(), baselines=Comparison({}, [ours, script])), "Other training loops")
    assert loops.columns[3:] == ["Top-1 it states, %", "To its target"]
    assert [entry.text for entry in loops.rows[1][3:]] == ["94.00", "12.0 s"]


def test_the_ablation_is_paired_and_corrected():
    tops = {"full": [0.60, 0.62, 0.61], "better": [0.65, 0.67, 0.662], "noisy": [0.601, 0.619, None], "dead": [None] * 3}
    runs = [
        replace(
            known_results().runs[0], name=f"x/{arm}-seed{seed}", epoch_top1=[0.3, 0.9, top1, None],
            error="" if top1 else "crashed", epoch_flops=[1e12, 1e12, 2e12, 2e12],
        )
        for arm, values in tops.items()
        for seed, top1 in enumerate(values)
    ]  # fmt: skip
    arms = [Arm(arm, "--mixup-alpha 0", "93 %", [f"x/{arm}-seed{seed}" for seed in range(3)]) for arm in tops]
    ablation = Ablation("x", "D", "se_resnet18", 4, [0, 1, 2], arms)
    found = section(Results({}, {}, {}, runs=runs, ablations=[ablation]), "Ablation: D").rows
    # differences 0.05, 0.05, 0.052: mean 0.050667, sd 0.0011547, t = 76, p = 0.000173; doubled by Holm
    texts = [entry.text for entry in found[1][2:]]
    assert (found[1][0].detail, *texts) == ("--mixup-alpha 0", "+5.07", "6.00", "23.0 s", "93 %")
    assert "3 pairs, p < 0.001, ▲ better" in found[1][2].detail
    assert "2 pairs" in found[2][2].detail
    assert "no difference shown" in found[2][2].detail
    assert found[3][1].text == "no run finished"


def test_empty_results_make_a_page_without_empty_sections():
    built = build_report(Results({}, {}, {}))
    page = render(built, "report.html")
    assert "no variant was trained" in page
    assert "<table" not in page
    assert "<svg" not in page
    assert "##" not in render(built, "report.md")


class Tags(HTMLParser):
    """Every tag of a page, and the attributes that load or run something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        loading = ("src", "href", "xlink:href", "srcset")
        self.loads += [(name, value) for name, value in attributes if name in loading or name.startswith("on")]


def hostile_results():
    """Every name is markup, and longer than a phone is wide."""
    results, long = make_results(), HOSTILE + "w" * 120

    def rename(comparison):
        timings = [replace(t, name=f"{long}{n}", title=long, note=long) for n, t in enumerate(comparison.timings)]
        return replace(comparison, settings={"arch": long}, timings=timings)

    runs = [replace(run, arch=long) for run in results.runs if run.arch in ("resnet18", "se_resnet18")]
    arms = [
        replace(arm, name=f"{long}{number}", flags=long, claim=long) for number, arm in enumerate(results.ablations[0].arms)
    ]
    return Results(
        {long: long, "hardware": long, "command": long}, {"name": long, "synthetic": True}, {long: [long]},
        [replace(results.variants[0], arch=long, claim=long, report=long)], [*runs, Run(long, error=long)],
        optimizations=rename(results.optimizations), baselines=rename(results.baselines),
        ablations=[replace(results.ablations[0], title=long, arms=arms)],
    )  # fmt: skip


def test_hostile_names_are_text():
    built = build_report(hostile_results())
    tags, usual = Tags(render(built, "report.html")), Tags(render(build_report(make_results()), "report.html"))
    assert set(tags.tags) <= set(usual.tags)
    assert tags.tags.count("script") == 1
    assert all(value.startswith("#") or value == "data:," for _, value in tags.loads)
    markdown = render(built, "report.md")
    assert "<" not in markdown
    assert "](" not in markdown
    assert escape("se_resnet18, 2.00× [1.98, 2.02]") == "se_resnet18, 2.00× [1.98, 2.02]"
    assert escape("a|b\nc _d_ <e>") == "a\\|b c \\_d\\_ &lt;e&gt;"


def test_tables_of_the_markdown_are_rectangular_and_hold_every_variant():
    lines = render(build_report(make_results()), "report.md").splitlines()
    tables, width = 0, None
    for line in lines:
        width = (line.count("|") if width is None else width) if line.startswith("|") else None
        tables += line.startswith("|--")
        assert width is None or line.count("|") == width, line
    assert tables == 8
    assert all(arch in "\n".join(lines) for arch in ARCHS)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.007756, "0.00776"), (6.405, "6.41"), (12345.6, "12,300"), (-2.5, "−2.50")]
)
def test_significant_digits(value, text):
    assert significant(value) == text


def test_the_command_writes_both_beside_the_results(tmp_path, call):
    write_results(tmp_path, make_results())
    assert str(tmp_path / "report.md") in call(main, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 250_000
    call(main, tmp_path / "results.json")
    assert (tmp_path / "report.html").read_text() == page  # the same results, the same page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (
            lambda text: text.replace('"schema": 2', '"schema": 1'),
            "json is of version 0.1, and this version reads format 2 only: read the report beside it",
        ),
        (lambda text: text.replace('"seed": 0', '"seed": "0"', 1), "seed: expected int, found str"),
        (lambda text: text.replace('"seed": 0', '"sown": 0', 1), "unknown field 'sown'"),
        (lambda text: text.replace('"top1": 0.', '"top1": 1.', 1), "an accuracy is 1."),
        (lambda text: text.replace('"seed": 0', f'"seed": {10**400}', 1), "a number of 1329 bits"),
        (lambda text: text.replace('"cores": 2', '"cores": "x"', 1), "expected int, found str"),
        (lambda text: text.replace('"at the start": 0.4', '"at the start": []', 1), "load: expected float, found list"),
        (lambda text: text.replace('"at the start": 0.4', '"at the start": Infinity', 1), "a number is inf"),
        (lambda text: text.replace('"seed": 0', f'"{"x" * 5000}": 0', 1), "(5002 characters)"),
    ],
)
def test_broken_results_are_one_line(change, words, tmp_path, refused):
    write_results(tmp_path, make_results())
    file = tmp_path / "results.json"
    file.write_text(change(file.read_text()))
    assert words in refused(main, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("top1", 1.5, "an accuracy is 1.5"), ("top1", math.nan, "an accuracy is nan"),
        ("train_seconds", [0.0] * 4, "a training time is 0.0"), ("images_per_epoch", 0, "a number of images or epochs is 0"),
        ("first_step_seconds", -1.0, "a time is -1.0"), ("energy_joules", math.inf, "a count is inf"),
    ],
)  # fmt: skip
def test_impossible_figures_are_refused(field, value, words):
    results = known_results()
    with pytest.raises(InputError, match=words):
        build_report(replace(results, runs=[replace(results.runs[0], **{field: value})]))


def test_csvs_hold_every_run_and_every_round(tmp_path):
    results = make_results()
    write_results(tmp_path, results)
    runs, timings = ((tmp_path / f"{name}.csv").read_text().splitlines() for name in ("runs", "timings"))
    assert len(runs) == 1 + len(results.runs)
    first = dict(zip(runs[0].split(","), runs[1].split(","), strict=True))
    assert first["arch"] == "dropout_resnet24"
    assert float(first["top1"]) == results.runs[0].top1
    assert float(first["train_seconds"]) == sum(results.runs[0].train_seconds)
    assert len(timings) == 1 + 12 * (9 + 5 + 3) + 1
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == 2


def test_unequal_rounds_are_refused():
    timings = [Timing("a", "a", "", [1.0]), Timing("b", "b", "", [1.0, 2.0])]
    with pytest.raises(InputError, match="unequal numbers of rounds"):
        build_report(replace(known_results(), optimizations=Comparison({}, timings)))
