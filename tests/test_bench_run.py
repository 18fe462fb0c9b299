"""bench/run.py and bench/ablate.py in small: plan, resumption, Ctrl-C, ladder and peers with one that crashes, studies."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench import ablate, cells, collect, ladder, peers, run
from bench.ablate import STUDIES, Configuration, Study, make_job, parse_arm
from bench.loops import Task, ours
from bench.peers import meet, outside_scripts, run_script, stated_rates
from bench.roofline import Rates, cost_of_arch
from bench.run import QUICK, Options, measure, prepare
from bench.schema import read_results
from fastcifar.dataset import load_splits
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES
from fastcifar.recipes import reported
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


@pytest.fixture
def task(betons):
    """One step of 16 images."""
    data = load_splits(betons, CPU, limit_train=64, limit_test=20, val_fraction=0.0, seed=0, verify=False)
    return Task("se_resnet18", replace(reported("se_resnet18").recipe, batch_size=16), data, betons, steps=1)


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
    assert measure(bench) == 0
    assert len(ran) == 2
    said = console.export_text()
    assert said.index("in all about") < said.index("[1/2] se_resnet18")
    assert measure(prepare(small, QUIET)) == 0
    assert len(ran) == 2
    assert measure(prepare(replace(small, seeds=(0, 1)), QUIET)) == 0
    assert len(ran) == 4  # another seed is more of the same
    results = read_results(small.out / "results.json")
    assert [(cell.arch, cell.seed) for cell in results.cells] == [(a, s) for a in ("resnet42", "se_resnet18") for s in (0, 1)]
    assert results.environment["rates"]["flops_per_second"] > 0
    assert results.settings["batch_size"] == 16
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
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(small, changes, message):
    with pytest.raises(InputError, match=message):
        prepare(replace(small, **changes), QUIET)
    assert not small.out.exists()


def test_the_ladder_times_every_rung_in_turns_and_names_those_it_lacks(task, monkeypatch):
    def broken(task, levers):
        if levers[-1] == "bf16":
            raise RuntimeError("no such\ninstruction")
        return ours(task, levers)

    monkeypatch.setattr(ladder, "ours", broken)
    made = ladder.climb(task, rounds=2, left_out={"compile"}, say=lambda line: None)
    by_name = {rung.name: rung for rung in made.rungs}
    assert next(iter(by_name)) == "eager fp32 NCHW, DataLoader"
    for name in (ladder.BASELINE_TITLE, "resident data", "channels_last", "fused kernels"):
        assert by_name[name].error is None, by_name[name]
        assert len(by_name[name].images_per_second) == 2
    assert by_name["bf16 autocast"].error == "RuntimeError: no such instruction"
    assert by_name["torch.compile"].error == "left out of this run"
    assert by_name["whole step captured"].error == "not applicable: CUDA graphs need a GPU"
    assert all(not rung.images_per_second for rung in made.rungs if rung.error)


def test_peers_are_timed_beside_ours_and_one_that_crashes_is_a_line(task, tmp_path, monkeypatch):
    def no_ffcv(task):
        raise ImportError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(peers, "ffcv", no_ffcv)
    script = tmp_path / "peer.py"
    script.write_text('print("epoch 1"); print(\'{"images_per_second": [100, 110]}\')')
    scripts = outside_scripts((f"mine={script}",))
    met = meet(task, rounds=2, scripts=scripts, epochs=3, peer_images=0, say=lambda line: None)
    by_name = {peer.name: peer for peer in met.entries}
    assert next(iter(by_name)) == "fastcifar"
    for name in ("fastcifar", "ordinary loop", "every built-in lever"):
        assert by_name[name].error is None
        assert len(by_name[name].images_per_second) == 2
    assert by_name["FFCV"].error == "ImportError: libopencv_core.so.406: cannot open shared object file"
    assert by_name["mine"].images_per_second == [100, 110]


def test_an_outside_script_gets_the_data_and_is_timed_by_its_word_or_the_wall(task, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import os, torch\n"
        "data = torch.load('cifar10/train.pt')\n"
        "assert data['images'].dtype == torch.uint8 and tuple(data['images'].shape) == (64, 32, 32, 3), data['images'].shape\n"
        "assert len(data['labels']) == 64 and len(data['classes']) == 10\n"
        "assert os.path.isfile(os.environ['FASTCIFAR_DATA'] + '/train.beton')\n"
        "assert os.environ['FASTCIFAR_EPOCHS'] == '3' and os.environ['FASTCIFAR_IMAGES'] == '64'\n"
        "print('done')\n"
    )
    peer = run_script("mine", script, task, epochs=3, peer_images=0)
    assert peer.error is None, peer
    assert "192 images over the wall time" in peer.note
    script.write_text("raise RuntimeError('needs eight GPUs')")
    assert run_script("mine", script, task, epochs=3, peer_images=0).error == "exit code 1: RuntimeError: needs eight GPUs"
    for line in (
        "",
        "{}",
        "[1]",
        '{"images_per_second": "x"}',
        '{"images_per_second": 0}',
        '{"images_per_second": [NaN]}',
        "12",
    ):
        assert stated_rates(line) is None, line
    assert stated_rates('{"images_per_second": 5, "accuracy": 0.9}') == [5.0]


@pytest.mark.slow
def test_ffcvs_loader_trains_beside_ours_and_leaves_the_threads_alone(task):
    before = torch.get_num_threads()
    met = meet(task, rounds=2, scripts={}, epochs=1, peer_images=0, say=lambda line: None)
    assert [peer.error for peer in met.entries] == [None] * 4
    assert torch.get_num_threads() == before


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
