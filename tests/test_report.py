"""The report's figures from known results, its wording, and that nothing in a results file can break out of the page."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import pytest

from bench.figures import all_figures, target_top1
from bench.report import escape_markdown, render_html, render_markdown, write_reports
from bench.schema import Ablation, Arm, Cell, Epoch, Peer, Peers, Results, Variant, write_results
from bench.view import build_report
from bench.view.charts import NARROW, WIDE, linear_ticks, logarithmic_ticks, scatter
from bench.view.labels import label_box
from bench.view.wording import significant
from fastcifar.errors import InputError
from tests.bench_results import ARCHS, make_results
from tests.conftest import assert_user_error, run_cli

HOSTILE = '</style></script><script>alert(1)</script>"><img src=x onerror=alert(2)>|`*_[x](http://evil) &amp; \u202e'


def known_results(seeds=2):
    """One variant whose figures can be worked out by hand: 1,000 images; epochs of 10, 4, 5 and 4 s."""
    tops = [(0.2, 0.5, 0.6, 0.70), (0.2, 0.4, 0.6, 0.72)][:seeds]
    cells = [
        Cell(
            f"se_resnet18-seed{seed}", "se_resnet18", seed, ["bf16"],
            [Epoch(s, 1.0, 1.0, 0.5, 1.0, top) for s, top in zip((10.0, 4.0, 5.0, 4.0), row, strict=True)],
            batch_size=128, images_per_epoch=1000, test_images=500, final_top1=row[-1], final_flip_top1=row[-1] + 0.01,
            best_top1=max(row), first_step_seconds=3.0 + seed, compile_seconds=1.0, peak_memory=2**30 * (1 + seed),
            energy_joules=460.0,
        )
        for seed, row in enumerate(tops)
    ]  # fmt: skip
    variant = Variant("se_resnet18", "D", 2_818_090, 834_000_000, 9_000_000, "85.574 % Kaggle", 500.0)
    return Results({"hardware": "one core"}, {"name": "CIFAR-10", "official": True, "synthetic": False}, {}, [variant], cells)


def entries(report):
    """{column: entry} of the first row, both tables together."""
    both = reversed(report.tables)  # of the columns in both, the first table's
    return {column.title: value for table in both for column, value in zip(table.columns, table.rows[0], strict=True)}


def test_every_figure_of_a_known_result():
    found = entries(build_report(known_results()))
    # steady epochs: 250, 200, 250 images/s twice
    assert (found["Images/s"].text, found["Images/s"].detail, found["Images/s"].sort) == ("250", "200 to 250", 250.0)
    assert (found["Epochs/s"].text, found["Epochs/s"].sort) == ("0.00500", 0.005)  # 50,000 images
    deviation = math.sqrt(2 * 0.01**2)
    reach = 12.7062 * deviation / math.sqrt(2)
    assert found["Top-1, %"].text == "71.00 ± 1.41"
    assert found["Top-1, %"].detail.replace("\xa0", " ") == f"[{100 * (0.71 - reach):.2f}, {100 * (0.71 + reach):.2f}]"
    assert found["With flip, %"].text == "72.00 ± 1.41"
    assert found["Best, %"].sort == pytest.approx(0.71)
    assert found["To 70 %"].text == "23.0 s"  # 10 + 4 + 5 + 4, both seeds
    assert found["Training"].text == "4.00 s"
    assert found["Evaluation"].text == "1.00 s"
    assert (found["First step"].text, found["First step"].detail) == ("3.50 s", "3.00 to 4.00 s")
    assert found["Peak memory"].text == "2.00 GiB"  # the highest
    assert found["Parameters"].text == "2,818,090"
    assert (found["FLOPs/image"].text, found["FLOPs/image"].detail) == ("834 M", "208 GFLOP/s")
    assert found["Of roofline"].text == "50 %"
    assert found["Energy/epoch"].text == "5.75 kJ"  # 460 J for 4,000 images
    assert found["Report claims"].text == "85.574 % Kaggle"


def test_one_seed_has_no_interval_and_says_so():
    report = build_report(known_results(seeds=1))
    assert entries(report)["Top-1, %"].text == "70.00"
    assert entries(report)["Top-1, %"].detail == "one seed: no interval"
    assert "1 seed" in entries(report)["Variant"].detail
    assert not report.curves[0].panels[0].band


def test_seconds_to_an_accuracy_say_who_did_not_reach_it():
    results = known_results()
    (row,) = all_figures(results)
    assert row.seconds_to(0.5) == [14.0, 19.0]
    assert row.seconds_to(0.71) == [None, 23.0]
    stated = build_report(replace(results, settings={"target_top1": 0.71}))
    assert entries(stated)["To 71 %"].detail == "1 of 2 seeds"
    never = build_report(replace(results, settings={"target_top1": 0.9}))
    assert "To 90 %" in entries(never)
    assert entries(never)["To 90 %"].text == "not reached"
    assert target_top1(results, []) is None


def test_a_single_epoch_is_used_and_named():
    results = make_results(epochs=1)
    report = build_report(results)
    assert any("contain compiling" in note for note in report.table_notes)
    assert report.curves == []


def test_levers_tell_cells_of_one_variant_apart():
    results = known_results()
    both = replace(results, cells=[results.cells[0], replace(results.cells[1], levers=[])])
    assert [row.label for row in all_figures(both)] == ["se_resnet18 (bf16)", "se_resnet18 (no levers)"]


def test_the_ladder_and_peers_claim_only_what_they_show():
    ladder, peers, _ = build_report(make_results()).bars
    verdicts = [bar.values[1].detail.split("] ")[1].replace("\xa0", " ") for bar in ladder.bars[1:5]]
    assert verdicts == ["▲ faster", "▲ faster", "▲ faster", "no difference shown"]
    assert ladder.bars[0].values[1].text == "–"
    assert ladder.bars[3].values[2].text == "2.95×"
    assert (ladder.bars[5].error, ladder.bars[5].failed) == ("not applicable: needs a GPU", False)
    assert (peers.bars[3].error, peers.bars[3].failed) == ("failed: ModuleNotFoundError: No module named 'airbench'", True)
    assert peers.bars[1].values[1].text == "3.02×"
    assert peers.bars[0].bar.high == 1.0
    few = make_results()
    few = replace(few, peers=Peers("x", 8, [Peer(p.name, p.images_per_second[:5]) for p in few.peers.entries[:2]]), ladder=None)
    (chart, _) = build_report(few).bars
    assert chart.bars[1].values[1].detail == "5 rounds: no interval"
    assert "below 6" in chart.notes[0]


def test_the_ablation_is_paired_and_corrected():
    full, better, noisy = [0.60, 0.62, 0.61], [0.65, 0.67, 0.662], [0.601, 0.619, None]
    arms = [Arm("full", {}, full), Arm("better", {"mixup_alpha": 0.0}, better, "93 %"), Arm("noisy", {}, noisy)]
    dead = Arm("dead", {}, [None, None, None])
    ablation = Ablation("D", "se_resnet18", 3, 1000, [0, 1, 2], [*arms, dead])
    (chart,) = build_report(Results({}, {}, {}, ablations=[ablation])).bars
    # differences 0.05, 0.05, 0.052: mean 0.050667, sd 0.0011547, t = 76, p = 0.000173; doubled by Holm
    assert chart.bars[1].values[1].text == "+5.07"
    assert "p < 0.001, ▲\xa0better" in chart.bars[1].values[1].detail
    assert chart.bars[1].note == "mixup_alpha=0.0"
    assert chart.bars[1].values[2].text == "93 %"
    assert "2 pairs" in chart.bars[2].values[1].detail
    assert "no difference shown" in chart.bars[2].values[1].detail
    assert chart.bars[3].error == "no run finished"


def test_a_peer_timed_apart_is_not_paired_with_rounds():
    peers = [
        Peer("ours", [100.0, 110.0, 90.0]),
        Peer("script", [50.0], "PATH", apart=True),
        Peer("own", [49.0, 50.0, 51.0], apart=True),
    ]
    peers.append(Peer("fewer", [49.0, 51.0]))  # unequal numbers cannot be rounds of the same
    (chart,) = build_report(Results({}, {}, {}, peers=Peers("x", 8, peers))).bars
    assert chart.bars[1].values[1].detail == "1 round: no interval, timed apart"
    assert "faster, timed apart" in chart.bars[2].values[1].detail
    assert "timed apart" in chart.bars[3].values[1].detail
    assert any("Welch" in note for note in chart.notes)


def test_facts_are_written_for_people():
    rates = {"flops_per_second": 295123456789.1}
    results = Results({"memory": 8 * 2**30, "load": [0.4123456, 1.0], "rates": rates, "gpu": None}, {}, {"quick": True})
    facts = dict(build_report(results).environment)
    assert facts == {"memory": "8.00 GiB", "load": "0.4123, 1", "rates": "flops per second 2.951e+11", "setting, quick": "yes"}


def test_what_the_data_is_stands_first():
    def warnings(**data):
        return build_report(replace(known_results(), data={"name": "x", **data})).warnings

    assert "accuracy means nothing" in warnings(synthetic=True, official=False)[0]
    assert "Not the official archive" in warnings(synthetic=False, official=False)[0]
    assert warnings(synthetic=False, official=True) == []
    stand_in = build_report(replace(known_results(), data={"name": "synthetic stand-in", "synthetic": True}))
    assert not any("accuracy" in what for what, _, _ in stand_in.headlines)
    assert "official archive" in " ".join(build_report(known_results()).lead)


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("seed", range(5))
def test_labels_of_the_scatter_lie_apart_and_within(size, seed):
    chart = scatter(all_figures(make_results(seed=seed)), size)
    boxes = [label_box(mark) for mark in chart.marks]
    assert all(a.shared(b) == 0 for a, b in combinations(boxes, 2))
    assert all(box.left >= 0 and box.right <= size[0] and box.top >= 0 and box.bottom <= size[1] for box in boxes)


def test_ticks_are_round_and_few():
    assert linear_ticks(0.2, 0.7, 6) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    assert linear_ticks(55.1, 74.9, 5) == [60, 65, 70]
    assert logarithmic_ticks(0.0015, 0.02, 5) == pytest.approx([0.002, 0.005, 0.01, 0.02])
    assert logarithmic_ticks(101.0, 104.0, 5) == [101, 102, 103, 104]
    assert 2 <= len(logarithmic_ticks(1e-3, 1e9, 4)) <= 4


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.007756, "0.00776"), (6.405, "6.41"), (12345.6, "12,300"), (-2.5, "−2.50")]
)
def test_significant_digits(value, text):
    assert significant(value) == text


def test_empty_results_make_a_page_without_empty_sections():
    report = build_report(Results({}, {}, {}))
    page = render_html(report)
    assert "no variant was trained" in page
    assert "<table" not in page
    assert "<svg" not in page
    assert "##" not in render_markdown(report)


class Tags(HTMLParser):
    """Every tag of a page, and the attributes that load or run something."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.loads, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [
            (name, value) for name, value in attributes if name in ("src", "href", "srcset") or name.startswith("on")
        ]


def test_hostile_names_are_text():
    results = make_results()
    cells = [replace(cell, arch=HOSTILE, key=HOSTILE) for cell in results.cells if cell.arch == "se_resnet18"]
    cells.append(Cell(HOSTILE, HOSTILE, 5, [HOSTILE], error=HOSTILE))
    ladder = replace(results.ladder, arch=HOSTILE, rungs=[replace(r, name=HOSTILE, note=HOSTILE) for r in results.ladder.rungs])
    peers = replace(results.peers, entries=[replace(e, name=HOSTILE, note=HOSTILE) for e in results.peers.entries])
    ablation = results.ablations[0]
    ablation = replace(
        ablation, name=HOSTILE, arms=[replace(a, name=HOSTILE, overrides={HOSTILE: HOSTILE}) for a in ablation.arms]
    )
    hostile = Results(
        {HOSTILE: HOSTILE, "hardware": HOSTILE}, {"name": HOSTILE}, {HOSTILE: [HOSTILE]},
        [replace(results.variants[0], arch=HOSTILE, claim=HOSTILE, report=HOSTILE)], cells, ladder, peers, [ablation],
    )  # fmt: skip
    report = build_report(hostile)
    tags, usual = Tags(render_html(report)), Tags(render_html(build_report(results)))
    assert set(tags.tags) <= set(usual.tags)
    assert tags.tags.count("script") == tags.tags.count("style") == 1
    assert all(value.startswith("#") or value == "data:," for _, value in tags.loads)
    markdown = render_markdown(report)
    assert "<" not in markdown
    assert "](" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(row.replace("\\|", "").split("|")) for row in rows[:3]} == {len(rows[0].split("|"))}


def test_markdown_keeps_names_readable():
    assert escape_markdown("se_resnet18, 2.00× [1.98, 2.02]") == "se_resnet18, 2.00× [1.98, 2.02]"
    assert escape_markdown("a|b\nc _d_ <e>") == "a\\|b c \\_d\\_ &lt;e&gt;"


def test_tables_of_the_markdown_are_rectangular():
    lines = render_markdown(build_report(make_results())).splitlines()
    tables, width = 0, None
    for line in lines:
        width = (line.count("|") if width is None else width) if line.startswith("|") else None
        tables += line.startswith("|--")
        assert width is None or line.count("|") == width, line
    assert tables == 6
    assert all(arch in "\n".join(lines) for arch in ARCHS)


def test_the_command_writes_both_beside_the_results(tmp_path):
    write_results(tmp_path / "results.json", make_results())
    process = run_cli("bench/report.py", tmp_path)
    assert process.returncode == 0, process.stderr
    page = (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.md") in process.stdout
    assert len(page) < 150_000
    assert write_reports(tmp_path / "results.json", make_results()) == [tmp_path / "report.html", tmp_path / "report.md"]
    assert (tmp_path / "report.html").read_text() == page  # the same results, the same page


def test_broken_results_are_one_line(tmp_path):
    file = tmp_path / "results.json"
    assert_user_error(run_cli("bench/report.py", tmp_path), file, "is missing")
    write_results(file, make_results())
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert_user_error(run_cli("bench/report.py", tmp_path), file, "not valid JSON")
    values = json.loads(whole)
    values["cells"][0]["epochs"][1]["train_seconds"] = 0.0
    file.write_text(json.dumps(values))
    assert_user_error(run_cli("bench/report.py", file), values["cells"][0]["key"], "a training time is 0.0")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("final_top1", 1.5, "an accuracy is 1.5"), ("final_top1", math.nan, "an accuracy is nan"),
        ("images_per_epoch", 0, "images_per_epoch is 0"), ("first_step_seconds", -1.0, "a time is -1.0"),
        ("energy_joules", math.inf, "a count is inf"),
    ],
)  # fmt: skip
def test_impossible_figures_are_refused(field, value, words):
    results = known_results()
    with pytest.raises(InputError, match=words):
        build_report(replace(results, cells=[replace(results.cells[0], **{field: value})]))


def test_unequal_rounds_and_runs_are_refused():
    results = make_results()
    rungs = [replace(results.ladder.rungs[0], images_per_second=[1.0]), *results.ladder.rungs[1:]]
    with pytest.raises(InputError, match="unequal numbers of rounds"):
        build_report(replace(results, ladder=replace(results.ladder, rungs=rungs)))
    arms = [replace(results.ablations[0].arms[0], top1=[0.5])]
    with pytest.raises(InputError, match="1 runs for 5 seeds"):
        build_report(replace(results, ablations=[replace(results.ablations[0], arms=arms)]))
