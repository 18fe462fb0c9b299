"""bench/reports.py launches what is left, reads run folders and puts them beside the authors' figures."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench import reports
from fastcifar.command import Command
from fastcifar.errors import InputError
from fastcifar.launch import Job
from fastcifar.models import ARCHITECTURES
from fastcifar.recipes import reported
from tests.bench_results import write_run
from tests.conftest import assert_user_error, run_cli

FACTS = {"hardware": "a CPU", "versions": {"torch": "2.11.0"}, "commit": "abc", "command": "python -m fastcifar.train"}


def begin(path, arch, losses, *, recipe=None, **keywords):
    """The run folder of an architecture's own recipe, or another."""
    write_run(path, Command(arch, settings=recipe or reported(arch).recipe), losses, FACTS, **{"accuracy": 0.5, **keywords})


@pytest.fixture
def trained(monkeypatch):
    """Training replaced by a folder with the epochs asked for, at a loss of 1.5; the jobs that were asked for."""
    jobs = []

    def train(job, console, title):
        jobs.append(job)
        write_run(job.path, job.command, [1.5] * job.stop_after, FACTS)
        return ""

    monkeypatch.setattr(Job, "train", train)
    monkeypatch.setattr(reports, "draw", lambda comparisons, path: None)
    return jobs


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench/reports.py", *map(str, arguments)])
    reports.main()


@pytest.fixture(autouse=True)
def data_is_there(monkeypatch):
    """Trainings are made up here, and so need none."""
    monkeypatch.setattr(reports.Manifest, "load", lambda path: None)


def test_every_report_architecture_has_its_curve_and_a_default():
    curves = reports.read_curves(reports.CURVES)
    assert set(curves) == set(reports.EPOCHS) == {arch for arch, row in ARCHITECTURES.items() if row.report != "-"}
    assert {arch for arch, curve in curves.items() if curve.accuracy_on == "held-out"} == {"resnet42", "light_resnet18"}
    for arch, curve in curves.items():
        assert reports.EPOCHS[arch] <= len(curve.train_loss) == len(curve.accuracy) <= 20
    # As the notebooks printed them.
    assert curves["dropout_resnet24"].accuracy[:5] == (37.22, 45.17, 55.32, 65.98, 74.05)
    assert curves["resnet42"].accuracy[:5] == (43.18, 55.68, 63.74, 67.86, 72.98)
    assert curves["se_resnet18"].train_loss[:3] == (2.0100, 1.8037, 1.6786)


def test_held_out_images_that_a_notebook_calls_test_are_told_by_the_source(tmp_path):
    path = tmp_path / "curves.json"
    curve = {"train_loss": [2.0], "test_accuracy": [40.0]}
    sources = {"a": "a.ipynb", "b": "b.ipynb (validation = held out of the training images)"}
    path.write_text(json.dumps({"runs": {name: curve | {"source": source} for name, source in sources.items()}}))
    assert {name: read.accuracy_on for name, read in reports.read_curves(path).items()} == {"a": "test", "b": "held-out"}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"runs": []}', *('{"runs": {"resnet42": ' + run + "}}" for run in (
        "1", '{"source": "x", "train_loss": [1.0]}', '{"source": "x", "train_loss": [], "test_accuracy": []}',
        '{"source": "x", "train_loss": [NaN], "test_accuracy": [1.0]}',
        '{"source": "x", "train_loss": ["one"], "test_accuracy": [1.0]}',
        '{"source": null, "train_loss": [1.0], "test_accuracy": [1.0]}',
    ))],
)  # fmt: skip
def test_a_file_without_curves_is_refused(tmp_path, content):
    path = tmp_path / "curves.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"curves\.json .*--curves"):
        reports.read_curves(path)


def test_trains_what_is_left_each_row_to_its_own_epoch(monkeypatch, trained, tmp_path):
    begin(tmp_path / "se_resnet18-seed0", "se_resnet18", [2.0, 1.9, 1.8])  # has its three
    begin(tmp_path / "resnet42-seed0", "resnet42", [2.0])  # was interrupted after one of two
    archs = ("se_resnet18", "resnet42", "robust_resnet64")
    run(monkeypatch, "--out", tmp_path, "--archs", *archs)
    assert [(job.name, job.stop_after) for job in trained] == [("resnet42-seed0", 2), ("robust_resnet64-seed0", 1)]
    assert trained[1].flags == ("--arch", "robust_resnet64", "--seed", "0", "--data", "data/beton", "--plan", "default")
    trained.clear()
    run(monkeypatch, "--out", tmp_path, "--archs", *archs)
    assert trained == []
    run(monkeypatch, "--out", tmp_path, "--archs", *archs, "--epochs", 3)
    assert [job.stop_after for job in trained] == [3, 3]


def test_a_trial_on_few_images_is_not_taken_for_the_run(monkeypatch, trained, tmp_path):
    arguments = ("--out", tmp_path, "--archs", "resnet42")
    for _ in range(2):
        run(monkeypatch, *arguments, "--", "--limit-train", 500)
    for epochs in (2, 3):  # done, and to be resumed
        with pytest.raises(InputError, match=r"limit_train: 500 before, 0 given.*give the same"):
            run(monkeypatch, *arguments, "--epochs", epochs)
    assert len(trained) == 1


def test_a_failed_training_ends_the_command_and_keeps_what_is_done(monkeypatch, tmp_path):
    arguments = ("--out", tmp_path, "--archs", "se_resnet18", "resnet42")
    begin(tmp_path / "se_resnet18-seed0", "se_resnet18", [2.0, 1.9])
    monkeypatch.setattr(Job, "train", lambda job, *_: "" if job.command.arch == "se_resnet18" else "ended by SIGKILL")
    with pytest.raises(InputError, match="resnet42 failed: ended by SIGKILL"):
        run(monkeypatch, *arguments)
    assert (tmp_path / "reports.md").exists()


def test_what_was_begun_is_resumed_and_all_stop_at_their_epoch(monkeypatch, tmp_path):
    begin(tmp_path / "resnet42-seed0", "resnet42", [2.0])
    real, commands = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **keywords: commands.append(command) or real("true", **keywords))
    monkeypatch.setattr(reports, "draw", lambda comparisons, path: None)
    with pytest.raises(InputError, match="robust_resnet64 failed: exit code 0, nothing said"):
        run(monkeypatch, "--out", tmp_path, "--archs", "resnet42", "robust_resnet64", "--", "--cutout", 0)
    folders = [str(tmp_path / f"{arch}-seed0") for arch in ("resnet42", "robust_resnet64")]
    begun = ["--arch", "robust_resnet64", "--seed", "0", "--data", "data/beton"]
    begun += ["--plan", "default", "--cutout", "0", "--out", folders[1]]
    assert [command[1:] for command in commands if "fastcifar.train" in command] == [  # and git, for the commit
        ["-m", "fastcifar.train", "--resume", folders[0], "--data", "data/beton", "--stop-after", "2"],
        ["-m", "fastcifar.train", *begun, "--stop-after", "1"],
    ]


def test_tables_figure_and_json_show_theirs_ours_and_the_difference(monkeypatch, tmp_path, capsys):
    begin(tmp_path / "se_resnet18-seed0", "se_resnet18", [2.0, 1.9], accuracy=0.405)
    few_epochs = replace(reported("light_resnet18_v2_45").recipe, batch_size=64)
    begin(tmp_path / "light_resnet18_v2_45-seed0", "light_resnet18_v2_45", [2.2, 2.1, 2.0], recipe=few_epochs)
    begin(tmp_path / "resnet42-seed0", "resnet42", [1.8], accuracy=None, summary=False)
    run(monkeypatch, "--out", tmp_path, "--only-draw")

    text = (tmp_path / "reports.md").read_text()
    assert "| 1 | 2.0100 | 2.0000 | -0.0100 | 44.49 | 40.50 | -3.99 |" in text
    assert "| 2 | 1.8037 | 1.9000 | +0.0963 | 51.65 | 40.50 | -11.15 |" in text
    assert "| 3 | - | 2.0000 | - | - | 50.00 | - |" in text  # the authors printed two epochs of this one
    assert "| 1 | 1.7466 | 1.8000 | +0.0534 | 43.18 | - | - |" in text
    assert "accuracy, theirs (held-out) | ours (test)" in text
    assert text.count("Not the recipe of this row") == 1
    assert "my JPEGs, 50,000 training images, seed 0; a CPU; torch 2.11.0; commit abc; `python -m fastcifar.train`" in text
    assert "391 against 390" in text
    assert "se_resnet18: training loss differs by +0.0963 at most, in epoch 2" in capsys.readouterr().out

    written = json.loads((tmp_path / "reports.json").read_text())
    assert {"hardware", "versions", "commit", "command"} <= written.keys()
    found = {entry["arch"]: entry for entry in written["comparisons"]}
    assert list(found) == ["se_resnet18", "resnet42", "light_resnet18_v2_45"]
    assert found["se_resnet18"]["train_loss"][0] == {"theirs": 2.01, "ours": 2.0, "difference": pytest.approx(-0.01)}
    assert [entry["is_row_recipe"] for entry in found.values()] == [True, True, False]
    assert Image.open(tmp_path / "reports.png").size[1] > 3 * 400  # three rows of panels


def test_the_figure_draws_both_curves_and_names_the_training_set(monkeypatch, tmp_path):
    begin(tmp_path / "resnet42-seed0", "resnet42", [1.8, 1.4], accuracy=0.4)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    run(monkeypatch, "--out", tmp_path, "--only-draw", "--archs", "resnet42")
    monkeypatch.undo()
    (figure,) = figures
    assert "my JPEGs" in figure.get_suptitle()
    loss, accuracy = figure.axes
    assert [line.get_label() for line in loss.lines + accuracy.lines] == [
        *("authors", "ours"), *("authors, held-out", "ours, test"),
    ]  # fmt: skip
    assert list(loss.lines[0].get_ydata()) == [1.7466, 1.3439, 1.1065, 0.9361, 0.8184]  # three epochs beyond ours
    assert list(loss.lines[1].get_ydata()) == [1.8, 1.4]
    assert list(accuracy.lines[1].get_ydata()) == [40.0, 40.0]
    assert loss.lines[1].get_linewidth() > loss.lines[0].get_linewidth()


def test_a_folder_of_another_architecture_is_refused(monkeypatch, tmp_path):
    begin(tmp_path / "resnet42-seed0", "se_resnet18", [1.8])
    with pytest.raises(InputError, match=r"resnet42-seed0 is a run of se_resnet18"):
        run(monkeypatch, "--out", tmp_path, "--only-draw")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--archs", "se_resnet"), "unknown arch 'se_resnet': did you mean se_resnet18"),
        (("--archs", "resnet18"), "has no curve of resnet18"),
        (("--epochs", "-1"), "epochs must be 0 or more"),
        (("--only-draw",), "no finished epoch"),
        (("--", "--stop_after=3"), "--stop-after is the benchmark's to set"),
    ],
)
def test_mistakes_are_named(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, "--out", tmp_path, *arguments)


@pytest.mark.slow
def test_the_command_answers_a_mistake_in_one_line(tmp_path):
    assert_user_error(
        run_cli("bench/reports.py", "--out", tmp_path, "--curves", tmp_path / "none.json"), "none.json is missing"
    )
