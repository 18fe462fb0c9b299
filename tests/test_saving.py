"""Epochs written by a thread: what is on the disk, when, and what becomes of errors. A GPU's training does so; here a CPU's."""

import threading
from functools import partial

import pytest
import torch
from test_capture import CPU, RECIPES, assert_same_training, narrow, run  # noqa: F401  # a fixture

from fastcifar import train as train_module
from fastcifar.checkpoint import Checkpoint, load_checkpoint
from fastcifar.errors import Stopped
from fastcifar.run_folder import RunFolder
from fastcifar.saving import EpochWriter, Fetch

Writer = partial(EpochWriter, device=CPU, background=True)


def checkpoint(epoch, best_epoch):
    names = [f"class {c}" for c in range(10)]
    weights = {"weight": torch.full((2, 3, 4, 4), float(epoch)).contiguous(memory_format=torch.channels_last)}
    head = ("se_resnet18", True, names, [0.5] * 3, [0.2] * 3, "data", ["a", "b"])
    return Checkpoint(*head, epoch, weights, None, {"state": {0: {"step": torch.tensor(epoch)}}}, 0.5, best_epoch)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return RunFolder(tmp_path)


@pytest.fixture
def written(monkeypatch):
    """Notes the epochs (last, best) of every write."""
    written, original = [], RunFolder.save_epoch

    def noted(self, rows, last, best=None):
        assert [row["epoch"] for row in rows] == list(range(1, last.epoch + 1))
        original(self, rows, last, best)
        written.append((last.epoch, best.epoch if best else None))

    monkeypatch.setattr(RunFolder, "save_epoch", noted)
    return written


def epochs_on_disk(folder):
    return [load_checkpoint(path, CPU).model["weight"].unique().tolist() for path in (folder.last, folder.best)]


def save(writer, epoch, best_epoch, rows):
    """As training does: the rows go on growing, the weights moving."""
    rows.append({"epoch": epoch})
    moving = checkpoint(epoch, best_epoch)
    writer.save(rows, moving)
    moving.model["weight"].fill_(-1.0)


def test_the_newest_and_the_best_are_written_at_the_first_epoch_and_at_the_end(folder, written):
    rows = []
    with Writer(folder, interval=60.0) as writer:
        for epoch, best in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 3)):
            save(writer, epoch, best, rows)
    assert written == [(1, 1), (5, 3)]
    assert epochs_on_disk(folder) == [[5.0], [3.0]]
    assert not list(folder.path.glob("*.partial"))


def test_every_epoch_is_written_where_there_is_time(folder, written):
    rows = []
    with Writer(folder, interval=0.0) as writer:
        for epoch in range(1, 4):
            save(writer, epoch, 1, rows)
            writer.flush()
    assert written == [(1, 1), (2, None), (3, None)]
    assert epochs_on_disk(folder) == [[3.0], [1.0]]


def test_the_best_epochs_state_is_one_file_with_two_names_until_the_next(folder):
    folder.save_epoch([], checkpoint(1, 1))
    assert folder.last.samefile(folder.best)
    folder.save_epoch([], checkpoint(2, 1))
    assert epochs_on_disk(folder) == [[2.0], [1.0]]


def test_an_error_of_the_thread_is_the_next_calls(folder, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device", "last.pt")

    def saves(then):
        with Writer(folder, interval=60.0) as writer:
            save(writer, 1, 1, [])
            then(writer)

    monkeypatch.setattr(RunFolder, "save_epoch", fails)
    for then in (EpochWriter.flush, lambda _: None):  # the end of the block flushes too
        with pytest.raises(OSError, match="No space left"):
            saves(then)
    with pytest.raises(ZeroDivisionError):  # not hidden by the other
        saves(lambda _: 1 / 0)


@pytest.mark.parametrize(("error", "epochs"), [(ValueError, 3), (partial(Stopped, 2, ""), 3), (KeyboardInterrupt, 1)])
def test_only_an_interruption_at_once_leaves_out_what_waited(folder, error, epochs):
    rows = []

    def three_epochs():
        with Writer(folder, interval=60.0) as writer:
            save(writer, 1, 1, rows)
            writer.flush()
            save(writer, 2, 1, rows)
            save(writer, 3, 1, rows)
            raise error()

    with pytest.raises((ValueError, KeyboardInterrupt)):
        three_epochs()
    assert epochs_on_disk(folder) == [[float(epochs)], [1.0]]


def test_a_training_that_saves_in_the_background_leaves_the_same_files(betons, tmp_path, monkeypatch):
    recipe = RECIPES["AdamW, average and dropout"]
    plain = run(betons, tmp_path / "plain", *recipe)
    threads = []

    def background(folder, device, background):
        threads.append(threading.active_count())
        return EpochWriter(folder, device, background=True)

    monkeypatch.setattr(train_module, "EpochWriter", background)
    folder = run(betons, tmp_path / "run", *recipe)
    assert threads
    assert_same_training(plain, folder)
    one, other = (load_checkpoint(f.best, CPU) for f in (plain, folder))
    assert one.best_epoch == other.best_epoch == one.epoch == other.epoch


def test_what_is_fetched_is_what_was_there_then():
    tree = {"a": [torch.arange(6).view(2, 3), 5], "b": (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),)}
    fetched = Fetch(CPU)(tree)
    tree["a"][0].zero_()
    copy = fetched()
    assert copy["a"][0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["a"][1] == 5
    assert copy["b"][0].stride() == tree["b"][0].stride()
