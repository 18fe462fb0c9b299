"""Cells: the numbers of real training, one process each, saved when finished, never run again, failures as lines."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import psutil
import pytest
from rich.console import Console

from bench import cells
from bench.cells import finished, run_job, run_jobs, settle
from bench.levers import LEVERS, chosen_levers, default_levers, run_options
from bench.schema import Cell, Epoch, read_cell, write_cell
from bench.train_cell import EnergyMeter, Job, override, peak_memory, train_cell
from fastcifar.command import parse_command
from fastcifar.device import choose_device
from fastcifar.errors import InputError
from fastcifar.recipes import reported
from fastcifar.train import train
from tests.conftest import REPOSITORY, run_cli

CPU = choose_device("cpu")
QUIET = Console(quiet=True)


def job_for(betons, key="cell", arch="se_resnet18", **changes):
    """A training of a second or two, by the arch's recipe with small batches."""
    job = Job(
        key, arch, 0, default_levers(arch, CPU), epochs=2, data=str(betons), limit_train=64, limit_test=20, device="cpu",
        overrides={"batch_size": 32},
    )  # fmt: skip
    return replace(job, **changes)


def timeless(cell: Cell):
    """What must be equal whenever and wherever a cell is trained."""
    rows = [(epoch.train_loss, epoch.train_top1, epoch.test_loss, epoch.test_top1) for epoch in cell.epochs]
    return cell.key, cell.arch, cell.seed, cell.levers, rows, cell.final_top1, cell.final_flip_top1, cell.best_top1


def fake_cell(job: Job) -> Cell:
    return Cell(job.key, job.arch, job.seed, job.levers, [Epoch(1.0, 0.1, 2.0, 0.2, 2.1, 0.25)], 32, 64, 20, 0.25, 0.26, 0.25)


def test_a_cell_has_the_numbers_of_training_itself(betons, tmp_path):
    cell = train_cell(job_for(betons), tell=lambda line: None)
    arguments = ["--data", str(betons), "--out", str(tmp_path / "run"), "--batch-size", "32", "--epochs", "2", "--no-plots"]
    folder = train(parse_command([*arguments, "--limit-train", "64", "--limit-test", "20"]), QUIET)
    rows, summary = folder.read_metrics(), folder.read_summary()
    assert [epoch.train_loss for epoch in cell.epochs] == [row["train_loss"] for row in rows]
    assert [epoch.train_top1 for epoch in cell.epochs] == [row["train_accuracy"] for row in rows]
    assert [epoch.test_loss for epoch in cell.epochs] == [row["eval_loss"] for row in rows]
    assert [epoch.test_top1 for epoch in cell.epochs] == [row["eval_accuracy"] for row in rows]
    assert cell.final_top1 == summary["final"]["top1"]
    assert cell.final_flip_top1 == summary["final_flip_tta_top1"]
    assert cell.best_top1 == summary["best_accuracy"]
    assert (cell.batch_size, cell.images_per_epoch, cell.test_images) == (32, 64, 20)
    assert cell.first_step_seconds > 0
    assert cell.compile_seconds >= 0
    assert cell.peak_memory is not None
    assert cell.peak_memory > 50 * 2**20


def test_killed_in_the_middle_and_restarted_no_finished_cell_runs_again_and_all_are_as_undisturbed(betons, tmp_path):
    out = tmp_path / "bench"
    arguments = [
        "bench/run.py", "--quick", "--data", betons, "--out", out, "--archs", "se_resnet18", "light_resnet18", "--epochs", "2",
        "--limit-train", "64", "--limit-test", "20", "--batch-size", "32", "--no-ladder", "--no-peers", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    waited = time.time() + 100
    while not list(out.glob("cells/*.json")) and process.poll() is None and time.time() < waited:
        time.sleep(0.05)
    first = list(out.glob("cells/*.json"))
    assert len(first) == 1, process.communicate()[0]
    time.sleep(1)  # into the second cell
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert workers
    assert not psutil.wait_procs(workers, timeout=10)[1]  # they end with their parent
    before = first[0].read_bytes()

    again = run_cli(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert first[0].read_bytes() == before
    assert "[1/1] light_resnet18-seed0" in again.stdout
    results = json.loads((out / "results.json").read_text())
    assert [cell["arch"] for cell in results["cells"]] == ["light_resnet18", "se_resnet18"]
    assert {variant["arch"] for variant in results["variants"]} == {"light_resnet18", "se_resnet18"}
    assert results["data"]["sha256"].keys() == {"train", "test"}
    for path in out.glob("cells/*.json"):
        cell = read_cell(path)
        undisturbed = train_cell(job_for(betons, cell.key, cell.arch), tell=lambda line: None)
        assert timeless(cell) == timeless(undisturbed)


def test_a_cell_that_fails_leaves_one_line_and_the_others_go_on(betons, tmp_path, monkeypatch):
    hopeless = job_for(betons, "hopeless", "dropout_resnet24", overrides={"batch_size": 32, "peak_lr": 1e30})
    cell = run_job(hopeless)  # a real process
    assert cell.error is not None
    assert "lower --peak-lr" in cell.error
    assert "\n" not in cell.error

    jobs = [job_for(betons, key) for key in ("a", "b", "c")]

    def run(job, advance):
        advance(0.5)
        return replace(fake_cell(job), error="ended by SIGKILL (out of memory?)") if job.key == "b" else fake_cell(job)

    monkeypatch.setattr(cells, "run_job", run)
    saved = []
    made = run_jobs(jobs, tmp_path, dict.fromkeys("abc", 1.0), QUIET, lambda: saved.append(1))
    assert [cell.error is None for cell in made] == [True, False, True]
    assert len(saved) == 3
    ran = []
    monkeypatch.setattr(cells, "run_job", lambda job, advance: ran.append(job.key) or fake_cell(job))
    made = run_jobs(jobs, tmp_path, dict.fromkeys("abc", 1.0), QUIET)
    assert ran == ["b"]  # what failed is tried again, what is finished is not
    assert all(cell.error is None for cell in made)


def test_a_killed_process_is_a_line_too(betons, monkeypatch):
    monkeypatch.setattr(cells.sys, "executable", "/bin/sh")
    monkeypatch.setattr(cells.subprocess, "Popen", killed_at_once(subprocess.Popen))
    cell = run_job(job_for(betons))
    assert cell.error == "ended by SIGKILL (out of memory?)"


def killed_at_once(popen):
    return lambda command, **keywords: popen(["/bin/sh", "-c", "kill -9 $$"], **keywords)


@pytest.mark.parametrize("line", ['{"cell": {"key": "ce', '{"epochs"}', "[]", "{}", '{"cell": {"key": "cell"}}'])
def test_a_line_cut_off_is_the_cells_failure(betons, monkeypatch, line):
    popen = subprocess.Popen
    monkeypatch.setattr(cells.subprocess, "Popen", lambda command, **keywords: popen(["/bin/echo", line], **keywords))
    assert run_job(job_for(betons)).error == f"its process told what is no cell: {line}"


def test_a_job_in_a_file_is_trained(betons, tmp_path):
    path = tmp_path / "job.json"
    path.write_text(json.dumps(asdict(job_for(betons, epochs=1)), indent=1))
    for content, code in ((path.read_text(), 0), ("{", 2), ('{"key": "a"}', 2)):
        path.write_text(content)
        with path.open() as file:
            process = subprocess.run(
                [sys.executable, "-m", "bench.train_cell"], stdin=file, capture_output=True, text=True, cwd=REPOSITORY
            )
        assert process.returncode == code, process.stderr
        if code:
            assert len(process.stderr.splitlines()) == 1
        else:
            assert json.loads(process.stdout.splitlines()[-1])["cell"]["key"] == "cell"


def test_a_broken_cell_file_is_named_and_its_cell_runs_again(betons, tmp_path):
    job = job_for(betons)
    write_cell(tmp_path, fake_cell(job))
    assert finished(tmp_path, job, QUIET) is not None
    path = tmp_path / "cells" / "cell.json"
    for content in ('{"key": "cell"', '{"key": "cell"}', "[]", path.read_text().replace('"cell"', '"another"', 1)):
        path.write_text(content)
        console = Console(record=True, width=400, file=open(os.devnull, "w"))  # noqa: SIM115
        assert finished(tmp_path, job, console) is None
        said = console.export_text().splitlines()
        assert len(said) == 1
        assert "cell.json" in said[0]
        assert "runs again" in said[0]


def test_settings_are_recorded_and_others_refused(tmp_path):
    path = tmp_path / "settings.json"
    settle(path, {"epochs": 2, "arms": {"a": {"cutout": 0}}})
    settle(path, {"epochs": 2, "arms": {"b": {}}})
    settle(path, {"epochs": 2, "ladder": {"rounds": 6}})
    with pytest.raises(InputError, match=r"\(epochs: 2 there, 3 given\)"):
        settle(path, {"epochs": 3})
    with pytest.raises(InputError, match="arms a"):
        settle(path, {"epochs": 2, "arms": {"a": {"cutout": 8}}})
    with pytest.raises(InputError, match="ladder rounds: 6 there, 7 given"):
        settle(path, {"ladder": {"rounds": 7}})
    assert json.loads(path.read_text())["arms"] == {"a": {"cutout": 0}, "b": {}}
    path.write_text("{")
    with pytest.raises(InputError, match="choose another --out"):
        settle(path, {"epochs": 2})


def test_levers_are_rows_and_those_a_device_lacks_say_why(betons):
    assert default_levers("se_resnet18", CPU)[:2] == ["resident", "channels_last"]
    assert "compile" not in default_levers("se_resnet18", CPU)
    assert chosen_levers(["compile"], "se_resnet18", CPU) == ["resident", "channels_last", "compile"]
    assert chosen_levers([], "se_resnet18", CPU) == ["resident", "channels_last"]
    with pytest.raises(InputError, match="CUDA graphs need a GPU"):
        chosen_levers(["captured"], "se_resnet18", CPU)
    with pytest.raises(InputError, match="unknown lever 'compiled': did you mean compile"):
        chosen_levers(["compiled"], "se_resnet18", CPU)
    assert all(row.name == name and row.title and row.what for name, row in LEVERS.items())
    run = run_options(["bf16"], data=betons)
    assert (run.precision, run.compile, run.kernels) == ("bf16", False, "torch")
    run = run_options(["kernels", "compile"], data=betons)
    assert (run.precision, run.compile, run.kernels) == ("fp32", True, "auto")


def test_overrides_reach_every_part_of_a_recipe_and_are_checked():
    recipe = reported("se_resnet18").recipe
    changed = override(recipe, {"head_dropout": 0, "peak_lr": 0.2, "cutout": 0, "milestones": [3, 5], "optimizer": "adamw"})
    assert (changed.head_dropout, changed.schedule.peak_lr, changed.augmentation.cutout) == (0.0, 0.2, 0)
    assert (changed.schedule.milestones, changed.optimizer) == ((3, 5), "adamw")
    assert recipe.schedule.peak_lr == 0.1
    ending = override(recipe, {"mixup_alpha": 0.4, "mixup_alpha_end": 0.1})
    assert override(ending, {"mixup_alpha_end": None}).augmentation.mixup_alpha_end is None
    for values, message in (
        ({"cutuot": 0}, "did you mean cutout"),
        ({"cutout": 40}, "cutout must be 0..32"),
        ({"cutout": True}, "cutout must be of type int"),
        ({"squeeze_excitation": 1}, "must be of type bool"),
        ({"peak_lr": "high"}, "must be of type float"),
        ({"augmentation": {}}, "unknown field"),
        ({"cutout": None}, "cutout must be of type int"),
        ({"mixup_alpha_end": "x"}, "mixup_alpha_end must be of type float"),
        ({"milestones": ["x"]}, "milestones must be a list of numbers"),
    ):
        with pytest.raises(InputError, match=message):
            override(recipe, values)


def test_what_a_device_does_not_tell_is_none():
    meter = EnergyMeter(CPU)
    with meter:
        pass
    assert meter.joules is None
    memory = peak_memory(CPU)
    assert memory is None or 2**24 < memory < 2**40
