"""Outside scripts: what they are offered, and that they have a rate only with evidence."""

import subprocess
import time
from dataclasses import replace
from textwrap import dedent

import numpy as np
import psutil
import pytest
import torch
from torchvision.datasets import CIFAR10

from bench import outside
from bench.baselines import Task
from bench.outside import outside_scripts, read_statement, run_script
from fastcifar.dataset import load_splits
from fastcifar.errors import InputError
from fastcifar.recipes import reported


@pytest.fixture(scope="module")
def task(betons):
    """64 images in batches of 8."""
    data = load_splits(betons, torch.device("cpu"), limit_train=64, limit_test=20, val_fraction=0.0, seed=0, verify=False)
    return Task("se_resnet18", replace(reported("se_resnet18").recipe, batch_size=8), data, betons, steps=1)


def script(tmp_path, text=""):
    path = tmp_path / "outside.py"
    path.write_text(dedent(text))
    return [str(path)]


@pytest.mark.slow
def test_an_outside_script_gets_the_task_and_its_statement_and_output_are_kept(task, tmp_path):
    path = script(tmp_path, """
        import os, sys
        assert sorted(os.listdir()) == ['cifar-10-batches-py', 'cifar10'], os.listdir()
        assert os.path.isfile(os.environ['FASTCIFAR_DATA'] + '/train.beton')
        names = 'EPOCHS', 'IMAGES', 'TARGET', 'BATCH_SIZE', 'ARCH', 'DEVICE'
        assert [os.environ['FASTCIFAR_' + name] for name in names] == ['3', '64', '0.94', '8', 'se_resnet18', 'cpu']
        print('epoch 1'); print('a warning', file=sys.stderr)
        run = '{"seed": 1, "images_per_epoch": 64, "test_images": 20, "train_seconds": [1, 2], "epoch_top1": [0.25, 0.5]}'
        print('{"images": 192, "seconds": 2, "top1": 0.5, "seconds_to_accuracy": 1.5, "runs": [' + run + ']}')
    """)  # fmt: skip
    timing = run_script("mine", path, task, epochs=3, logs=tmp_path / "logs", target=0.94)
    assert not timing.error, timing
    assert (timing.images_per_second, timing.top1, timing.seconds_to_accuracy) == ([96.0], 0.5, 1.5)
    assert not timing.in_turns
    (run,) = timing.runs
    assert (run.name, run.arch, run.train_seconds, run.epochs_to(0.5)) == ("mine-seed1", "mine", [1.0, 2.0], 2)
    assert (tmp_path / "logs/mine.stdout.log").read_text().startswith("epoch 1\n")
    assert (tmp_path / "logs/mine.stderr.log").read_text() == "a warning\n"


def test_the_data_are_offered_as_airbench_and_torchvision_read_them(task, tmp_path, monkeypatch):
    outside.offer_data(tmp_path, task.data)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    assert sorted(path.name for path in (tmp_path / "cifar-10-batches-py").iterdir()) == sorted(["batches.meta", *names])
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        CIFAR10(tmp_path, download=False)
    # What the protocol tells a script to do first.
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setitem(CIFAR10.meta, "md5", None)
    for train, split in ((True, task.data.train), (False, task.data.test)):
        theirs = CIFAR10(tmp_path, train=train, download=False)
        assert theirs.classes == task.data.manifest.class_names
        assert np.array_equal(theirs.data, split.images.numpy())
        assert theirs.targets == split.labels.tolist()
    airbench = torch.load(tmp_path / "cifar10/train.pt")
    assert torch.equal(airbench["images"], task.data.train.images)
    assert torch.equal(airbench["labels"], task.data.train.labels)
    assert airbench["classes"] == task.data.manifest.class_names


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("import time; time.sleep(0.1)", "no rate: its last line must be a JSON object"),
        ("""print('{"images_per_second": 5}'); print('done')""", "no rate: its last line must be a JSON object"),
        ("raise RuntimeError('needs eight GPUs')", "exit code 1: RuntimeError: needs eight GPUs"),
        ("print('bye'); exit(3)", "exit code 3: bye"),
        ("exit(3)", "exit code 3: no output"),
    ],
)
def test_an_outside_script_without_evidence_has_no_rate(task, tmp_path, text, error):
    timing = run_script("mine", script(tmp_path, text), task, epochs=1, logs=tmp_path)
    assert timing.error.startswith(error)
    assert (timing.images_per_second, len(timing.error.splitlines())) == ([], 1)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"images_per_second": 5, "accuracy": 0.9}', {"images_per_second": [5.0]}),
        ('{"images_per_second": [100, 110], "top1": 1}', {"images_per_second": [100.0, 110.0], "top1": 1.0}),
        ('{"images": 10, "seconds": 4, "top1": null}', {"images_per_second": [2.5]}),
        *((line, "its last line") for line in ("", "12", "[1]", "{}", '{"seconds": 4}')),
        ('{"images": 10, "seconds": 0}', "seconds must be"),
        *((f'{{"images_per_second": {rate}}}', "images_per_second must be") for rate in ('"x"', "[]", "true", "0", "[NaN]")),
        ('{"images_per_second": 5, "runs": [3]}', "runs must be objects, got 3"),
        ('{"images_per_second": 5, "runs": [{"top1": 2}]}', "an accuracy is 2"),
        ('{"images_per_second": 5, "runs": [{"sown": 2}]}', "unknown field 'sown'"),
        ('{"images_per_second": 5, "top1": 94.1}', "top1 must be a number above 0, at most 1, got 94.1"),
        ('{"images_per_second": 5, "seconds_to_accuracy": -1}', "seconds_to_accuracy must be"),
    ],
)
def test_a_statement_is_evidence_or_refused(line, found):
    if isinstance(found, dict):
        assert read_statement("mine", line) == {"runs": []} | found
        return
    with pytest.raises((ValueError, InputError), match=found):
        read_statement("mine", line)


@pytest.mark.slow
def test_an_outside_script_that_takes_too_long_is_ended_with_its_workers(task, tmp_path, monkeypatch):
    path = script(tmp_path, """
        import subprocess, sys, time
        worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
        print(worker.pid, flush=True)
        time.sleep(60)
    """)  # fmt: skip

    def wait(process, timeout=None, wait=subprocess.Popen.wait):
        while timeout and not (tmp_path / "mine.stdout.log").read_text():  # however long it takes to start
            time.sleep(0.05)
        return wait(process, timeout and 0.1)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    timing = run_script("mine", path, task, epochs=1, logs=tmp_path, hours=1)
    assert timing.error.startswith("not done after")
    worker = int((tmp_path / "mine.stdout.log").read_text())
    waited = time.time() + 60
    while running(worker) and time.time() < waited:  # the signal is on its way
        time.sleep(0.05)
    assert not running(worker)


def running(pid):
    """Whether a process lives; one that has ended may stay as a zombie where nobody waits for it."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_names_of_outside_scripts_are_checked(tmp_path):
    (path,) = script(tmp_path)
    assert outside_scripts([f"mine={path}"]) == {"mine": [path]}
    assert outside_scripts([f"mine={path} {path} --epochs 8"]) == {"mine": [path, path, "--epochs", "8"]}
    for given, message in (
        (["mine"], "NAME=PATH"),
        ([f"../mine={path}"], "NAME=PATH"),
        (["mine=/nowhere.py"], "/nowhere.py is not a file"),
        ([f"ffcv={path}"], "that name is taken"),
        ([f"mine={path}", f"mine={path}"], "that name is taken"),
    ):
        with pytest.raises(InputError, match=message):
            outside_scripts(given)
