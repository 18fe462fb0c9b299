"""bench/run.py and bench/ablate.py in small: plan, resumption, Ctrl-C, ladder and peers with one that crashes, studies."""

import importlib
import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench import ablate, cells, collect, ladder, peers, run
from bench.ablate import STUDIES, Configuration, Study, make_job, parse_arm
from bench.figures import all_figures, target_top1
from bench.roofline import Rates, cost_of_arch
from bench.run import QUICK, Options, measure, prepare
from bench.schema import read_results
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES
from tests.conftest import assert_user_error, run_cli
from tests.test_bench_cells import fake_cell

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measuring this machine's takes a second; test_roofline.py does."""
    monkeypatch.setattr(collect, "measure_rates", lambda device: Rates(1e12, 5e10))


@pytest.fixture
def small(betons, tmp_path):
    """Options of a run over two architectures without ladder and peers."""
    return replace(
        QUICK, archs=("se_resnet18", "resnet42"), data=betons, out=tmp_path / "bench", limit_train=64, limit_test=20,
        batch_size=16, epochs=2, rounds=2, steps=1, ladder=False, peers=False, device="cpu",
    )  # fmt: skip


def count_cells(monkeypatch, stop_after=None):
    """Replace training by a fake; return the list of keys it was asked for. stop_after: then Ctrl-C."""
    ran = []

    def fake(job, advance):
        if len(ran) == stop_after:
            raise KeyboardInterrupt
        ran.append(job.key)
        return fake_cell(job)

    monkeypatch.setattr(cells, "run_job", fake)
    return ran


def test_the_small_version_covers_everything_and_its_plan_is_within_ten_minutes(betons):
    assert set(QUICK.archs) == set(ARCHITECTURES)
    assert QUICK.ladder
    assert QUICK.peers
    assert QUICK.rounds >= 6  # below, a median has no interval
    assert Options().limit_train == 0
    gflop_of_all = sum(cost_of_arch(arch).flops for arch in ARCHITECTURES) / 1e9
    images = QUICK.epochs * QUICK.limit_train + (QUICK.epochs + 2) * QUICK.limit_test / 3
    assert gflop_of_all * images / 300 < 260  # seconds at 300 GFLOP/s, what two cores train at


def test_a_plan_comes_first_and_a_finished_cell_is_not_run_again(small, monkeypatch):
    console = Console(record=True, width=120, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    bench = prepare(small, console)
    run.show_plan(bench)
    ran = count_cells(monkeypatch)
    assert measure(bench) == []
    assert len(ran) == 2
    said = console.export_text()
    assert said.index("in all about") < said.index("[1/2] se_resnet18")
    assert measure(prepare(small, QUIET)) == []
    assert len(ran) == 2
    assert measure(prepare(replace(small, seeds=(0, 1), target=42.5), QUIET)) == []
    assert len(ran) == 4  # another seed is more of the same
    results = read_results(small.out / "results.json")
    assert [(cell.arch, cell.seed) for cell in results.cells] == [(a, s) for a in ("resnet42", "se_resnet18") for s in (0, 1)]
    assert results.environment["rates"]["flops_per_second"] > 0
    assert results.settings["batch_size"] == 16
    assert target_top1(results, all_figures(results)) == 0.425
    assert prepare(small, QUIET).out == small.out  # without --target it is derived again
    assert target_top1(collect.collect(small.out, QUIET), all_figures(results)) != 0.425
    assert results.variants[0].roofline_images_per_second is not None
    assert (small.out / "report.html").exists()
    with pytest.raises(InputError, match=r"begun with other settings \(epochs: 2 there, 3 given\)"):
        prepare(replace(small, epochs=3), QUIET)
    with pytest.raises(InputError, match="limit_test"):
        prepare(replace(small, limit_test=10), QUIET)


def test_ctrl_c_leaves_what_is_finished(small, monkeypatch):
    ran = count_cells(monkeypatch, stop_after=1)
    arguments = ["--archs", *small.archs, "--data", small.data, "--out", small.out, "--limit-train", "64", "--limit-test", "20"]
    more = ["--quick", "--batch-size", "16", "--epochs", "2", "--no-ladder", "--no-peers", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench/run.py", *map(str, arguments), *more])
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run.main()
    assert [cell.key for cell in read_results(small.out / "results.json").cells] == ran
    assert len(ran) == 1


def test_mistakes_are_one_line(betons, tmp_path):
    assert_user_error(run_cli("bench/run.py", "--archs", "se_resnet81"), "se_resnet81", "did you mean se_resnet18")
    process = run_cli("bench/ablate.py", "--arms", "full=", "x=cutuot=0", "--data", betons, "--out", tmp_path / "x")
    assert_user_error(process, "cutuot", "did you mean cutout")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levers": ("turbo",)}, "unknown lever 'turbo'"),
        ({"levers": ("captured",)}, "CUDA graphs need a GPU"),
        ({"batch_size": 512}, "batch_size 512 is larger"),
        ({"peer": ("airbench",)}, "NAME=PATH"),
        ({"peer": ("airbench=/nowhere/a.py",)}, "not a file"),
        ({"peer": (f"FFCV={__file__}",)}, "taken"),
        ({"limit_train": 10**6}, "lower the limit"),
        ({"limit_train": 128, "batch_size": 0, "peer_arch": "mish_se_resnet18", "ladder": True}, "batch_size 512 is larger"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(small, changes, message):
    with pytest.raises(InputError, match=message):
        prepare(replace(small, **changes), QUIET)
    assert not small.out.exists()


def test_what_failed_is_counted_and_tried_again_and_nothing_else_is(small, tmp_path, monkeypatch):
    count_cells(monkeypatch)
    broken, levers = True, []

    def loop(task, built_in=False):
        if broken:
            raise RuntimeError("no")
        return lambda: None

    monkeypatch.setattr(ladder, "ours", lambda task, levers: lambda: None)
    monkeypatch.setattr(peers, "ours", lambda task, named: levers.append(named) or (lambda: None))
    monkeypatch.setattr(ladder, "ordinary", loop)
    monkeypatch.setattr(peers, "ordinary", lambda task, built_in=False: lambda: None)
    monkeypatch.setattr(peers, "ffcv", lambda task: importlib.import_module("ffcv") if broken else lambda: None)
    monkeypatch.setitem(sys.modules, "ffcv", None)  # not installed, which is no failure
    scripts = [tmp_path / "good.py", tmp_path / "bad.py"]
    for script in scripts:
        script.write_text(f"open({str(tmp_path / script.stem)!r}, 'a').write('ran ')\n")
    with scripts[1].open("a") as file:
        file.write(f"import os; os.path.exists({str(tmp_path / 'mended')!r}) or exit('not yet')\n")
    options = replace(small, ladder=True, peers=True, levers=(), peer=tuple(f"{s.stem}={s}" for s in scripts))
    assert measure(prepare(options, QUIET)) == ["ladder: eager fp32 NCHW, DataLoader", "peer: bad"]
    results = read_results(small.out / "results.json")
    assert results.peers.entries[3].error == "not applicable: no FFCV here"
    broken = False
    (tmp_path / "mended").touch()
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    bench = prepare(options, console)
    run.show_plan(bench)
    assert "; again for peer: bad" in console.export_text()
    assert measure(bench) == []
    assert [(tmp_path / script.stem).read_text() for script in scripts] == ["ran ", "ran ran "]
    assert levers == [["resident", "channels_last"]]  # those of --levers; the loops were not timed again
    with pytest.raises(InputError, match="peers levers"):
        prepare(replace(options, levers=("bf16",)), QUIET)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_made_of_recipes_that_can_be_trained(name):
    study, options = STUDIES[name], ablate.Options(study=name)
    jobs = [make_job(options, study, row, 0, CPU) for row in study.rows]
    assert len({job.key for job in jobs}) == len(jobs)
    recipes = [job.recipe for job in jobs]
    assert len({(job.arch, repr(recipe)) for job, recipe in zip(jobs, recipes, strict=True)}) == len(jobs)
    assert all(row.claim for row in study.rows)
    assert all(recipe.epochs == options.epochs for recipe in recipes)


def test_arms_are_lists_of_overrides():
    assert parse_arm("full=") == Configuration("full", {})
    assert parse_arm("a=cutout=0,squeeze_excitation=false,optimizer=adamw,peak_lr=1e-3").overrides == {
        "cutout": 0, "squeeze_excitation": False, "optimizer": "adamw", "peak_lr": 1e-3,
    }  # fmt: skip
    lists = parse_arm("a=milestones=[3,5],mixup_alpha_end=null,cutout=0").overrides
    assert lists == {"milestones": [3, 5], "mixup_alpha_end": None, "cutout": 0}
    with pytest.raises(InputError, match="give --epochs"):
        make_job(
            ablate.Options(arms=("a=",)), Study("se_resnet18", "x", (parse_arm("a=epochs=1"),)), parse_arm("a=epochs=1"), 0, CPU
        )
    for text in ("full", "=cutout=0", "a=cutout", "a==3"):
        with pytest.raises(InputError, match="--arms takes"):
            parse_arm(text)
    with pytest.raises(InputError, match="two of the same name"):
        ablate.chosen_study(ablate.Options(arms=("a=", "a=cutout=0")))
    with pytest.raises(InputError, match="not both"):
        ablate.chosen_study(ablate.Options(study="report_d", arms=("a=",)))


def test_an_ablation_goes_on_and_joins_the_results_of_its_folder(small, monkeypatch):
    ran = count_cells(monkeypatch, stop_after=3)
    measure(prepare(small, QUIET))  # two cells of run.py
    study = Study(
        "se_resnet18", "two arms", (Configuration("full"), Configuration("no se", {"squeeze_excitation": False}, "worse"))
    )
    options = ablate.Options(
        arms=("x=",), data=small.data, epochs=2, seeds=(0, 1), limit_train=64, limit_test=20, batch_size=16, device="cpu"
    )
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(options, "two", study, small.out, QUIET)
    half = read_results(small.out / "results.json").ablations[0]
    assert [arm.top1 for arm in half.arms] == [[0.25, None], [None, None]]

    ran = count_cells(monkeypatch)
    assert ablate.ablate(options, "two", study, small.out, QUIET) == 0
    assert len(ran) == 3
    results = read_results(small.out / "results.json")
    assert len(results.cells) == 2  # run.py's stay
    ablation = results.ablations[0]
    assert (ablation.name, ablation.arch, ablation.seeds, ablation.images_per_epoch) == ("two arms", "se_resnet18", [0, 1], 64)
    assert [arm.top1 for arm in ablation.arms] == [[0.25, 0.25], [0.25, 0.25]]
    assert ablation.arms[1].claim == "worse"
    changed = replace(study, rows=(study.rows[0], Configuration("no se", {"cutout": 0})))
    with pytest.raises(InputError, match="arms no se"):
        ablate.ablate(options, "two", changed, small.out, QUIET)


def test_a_broken_part_is_left_out_with_a_line(small, monkeypatch):
    count_cells(monkeypatch)
    measure(prepare(small, QUIET))
    (small.out / "ladder.json").write_text('{"arch": "se_resnet18"')
    path = next((small.out / "cells").glob("resnet42*"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"speed": 1}))
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    results = collect.collect(small.out, console)
    assert [cell.arch for cell in results.cells] == ["se_resnet18"]
    assert results.ladder is None
    said = console.export_text().splitlines()
    assert len(said) == 2
    assert "unknown field 'speed'" in said[0]
    assert "ladder.json is not valid JSON" in said[1]
