"""The data command finds its source, writes only what is needed, and leaves whole files or none."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from conftest import CLASSES, assert_user_error, run_cli, write_cifar_pickles
from rich.console import Console

from data_prep import synthetic, write_beton
from data_prep.cifar_pickles import LAYOUTS, read_split
from fastcifar.beton import Manifest, read_beton
from fastcifar.errors import InputError

FILES = ["test.beton", "test.json", "train.beton", "train.json"]
REAL_DOWNLOAD = write_beton.download
SMALL = ("--train-images", 50, "--test-images", 10)
Command = Callable[..., str]


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dataset: str, console: Console) -> bool:
        raise AssertionError("a download was attempted")

    monkeypatch.setattr(write_beton, "download", refuse)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, run here in an empty folder; it returns what was printed."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["write_beton.py", *map(str, arguments)])
        capsys.readouterr()
        write_beton.main()
        return capsys.readouterr().out

    return command


@pytest.fixture
def out(betons: Path, tmp_path: Path) -> Path:
    """A copy of the session's betons, to be changed."""
    return Path(shutil.copytree(betons, tmp_path / "out"))


@pytest.fixture(scope="module")
def other_pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar_pickles(tmp_path_factory.mktemp("other"), per_batch=10, test=10, seed=1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small stand-in's pickles and betons under data/, as the command itself leaves them."""
    folder = tmp_path_factory.mktemp("stand-in")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["write_beton.py", "--synthetic", *map(str, SMALL)])
        write_beton.main()
    return folder


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file; the folder may be missing."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# What is written


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_manifest_describes_the_data(betons: Path, pickles: Path, split: str) -> None:
    values = json.loads((betons / f"{split}.json").read_text())
    batches = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    pixels = read_split(pickles, LAYOUTS["cifar10"], split).images.astype(np.float64) / 255
    np.testing.assert_allclose(values.pop("mean"), pixels.mean(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(values.pop("std"), pixels.std(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    versions = values.pop("versions")
    assert versions["ffcv"] == "1.0.2"
    assert versions["numpy"] == np.__version__
    assert versions["fastcifar"]
    assert values == {
        "dataset": "cifar10",
        "split": split,
        "name": "CIFAR-10 (not the official archive)",
        "count": {"train": 200, "test": 50}[split],
        "class_names": CLASSES,
        "sha256": hashlib.sha256((betons / f"{split}.beton").read_bytes()).hexdigest(),
        "official": False,
        "synthetic": False,
        "source_md5": {name: md5(pickles / name) for name in (*batches, "batches.meta")},
    }


def test_statistics_are_exact_for_every_pixel_value() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 2
    images[..., 2] = 255
    mean, std = write_beton.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12, atol=1e-12)


def test_the_command_line_writes_four_files(betons: Path) -> None:
    assert sorted(path.name for path in betons.iterdir()) == FILES


def test_data_that_is_not_official_is_said_to_be_so_and_written(command: Command, other_pickles: Path, tmp_path: Path) -> None:
    printed = command("--source", other_pickles, "--out", tmp_path / "out")
    assert f"{other_pickles}: not the official archive" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert len(read_beton(tmp_path / "out" / "train.beton").labels) == 50


def test_data_with_the_official_md5_sums_is_called_so(
    command: Command, other_pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS["cifar10"]
    splits = {split: {name: md5(other_pickles / name) for name in names} for split, names in layout.splits.items()}
    meta = {name: md5(other_pickles / name) for name in layout.meta}
    monkeypatch.setitem(LAYOUTS, "cifar10", replace(layout, splits=splits, meta=meta))
    printed = command("--source", other_pickles, "--out", tmp_path / "out")
    assert "not the official archive" not in printed
    manifest = Manifest.load(tmp_path / "out" / "test.beton")
    assert manifest.official
    assert manifest.name == "CIFAR-10"


def test_cifar_100_is_written(command: Command, tmp_path: Path) -> None:
    source = tmp_path / "cifar-100-python"
    source.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 30), ("test", 20)):
        batch = {"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), "fine_labels": list(range(99, 99 - count, -1))}
        (source / name).write_bytes(pickle.dumps(batch))
    (source / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"fine {number}" for number in range(100)]}))
    command("--dataset", "cifar100", "--source", tmp_path, "--out", tmp_path / "out")
    read = read_beton(tmp_path / "out" / "test.beton")
    assert read.labels.tolist() == list(range(99, 79, -1))
    assert read.manifest.dataset == "cifar100"
    assert read.manifest.class_names[99] == "fine 99"


@pytest.mark.parametrize("name", ["mine", "mine [v2]", "[/]", "[red]mine"])
def test_a_name_of_ones_own_is_kept_and_shown(command: Command, other_pickles: Path, tmp_path: Path, name: str) -> None:
    printed = command("--source", other_pickles, "--out", tmp_path / "out", "--name", name)
    assert Manifest.load(tmp_path / "out" / "train.beton").name == name
    assert name in printed


def test_a_folder_with_brackets_in_its_name_is_shown_as_it_is(command: Command, pickles: Path, out: Path) -> None:
    folder = out.rename(out.with_name("out [old]"))
    assert f"{folder / 'train.beton'}: intact" in command("--source", pickles, "--out", folder)


# What is left alone, and what is not


def test_a_second_run_changes_nothing_and_says_so(command: Command, pickles: Path, out: Path) -> None:
    before = state(out)
    printed = command("--source", pickles, "--out", out)
    assert printed.count("intact, left alone") == 2
    assert state(out) == before


def test_force_writes_again(command: Command, pickles: Path, out: Path) -> None:
    before = state(out)
    printed = command("--source", pickles, "--out", out, "--force")
    assert "left alone" not in printed
    after = state(out)
    assert list(after) == FILES
    for name in FILES:
        assert after[name][0] == before[name][0]  # the same bytes
        assert after[name][1] > before[name][1]  # written anew


def test_another_name_for_the_same_data_is_written_without_force(command: Command, pickles: Path, out: Path) -> None:
    before = state(out)
    command("--source", pickles, "--out", out, "--name", "another name")
    assert read_beton(out / "train.beton").manifest.name == "another name"
    assert state(out)["train.beton"][0] == before["train.beton"][0]


def flip_a_pixel(out: Path) -> None:
    with open(out / "train.beton", "rb+") as file:
        file.seek((1 << 23) + 5000)
        byte = file.read(1)
        file.seek((1 << 23) + 5000)
        file.write(bytes([byte[0] ^ 1]))


def zero_the_header(out: Path) -> None:
    with open(out / "train.beton", "rb+") as file:
        file.write(bytes(24))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip_a_pixel,
    "no header": zero_the_header,
    "truncated": lambda out: os.truncate(out / "train.beton", 1 << 23),
    "empty": lambda out: os.truncate(out / "train.beton", 0),
    "missing": lambda out: (out / "train.beton").unlink(),
    "no manifest": lambda out: (out / "train.json").unlink(),
    "broken manifest": lambda out: (out / "train.json").write_text('{"dataset": '),
    "another's manifest": lambda out: shutil.copy(out / "test.json", out / "train.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_beton_is_written_again_without_force(command: Command, pickles: Path, out: Path, damage: str) -> None:
    before = state(out)
    DAMAGE[damage](out)
    printed = command("--source", pickles, "--out", out)
    after = state(out)
    assert {name: content for name, (content, _) in after.items()} == {name: content for name, (content, _) in before.items()}
    assert after["train.beton"][1] > before["train.beton"][1]
    assert after["test.beton"] == before["test.beton"]  # was intact
    assert printed.count("left alone") == 1
    assert "read back byte for byte" in printed


def test_an_intact_beton_of_other_data_is_not_replaced(command: Command, other_pickles: Path, out: Path) -> None:
    before = state(out)
    with pytest.raises(InputError) as caught:
        command("--source", other_pickles, "--out", out)
    assert str(out / "train.beton") in str(caught.value)
    assert "--force" in str(caught.value)
    assert "--out" in str(caught.value)
    assert state(out) == before


def test_an_intact_beton_of_other_data_is_replaced_with_force(command: Command, other_pickles: Path, out: Path) -> None:
    command("--source", other_pickles, "--out", out, "--force")
    source = read_split(other_pickles, LAYOUTS["cifar10"], "test")
    np.testing.assert_array_equal(read_beton(out / "test.beton").images, source.images)


def test_real_data_replaces_the_stand_in_without_force(command: Command, pickles: Path, stand_in: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stand_in / "data" / "beton", tmp_path / "out"))
    assert Manifest.load(out / "train.beton").synthetic
    command("--source", pickles, "--out", out)
    for split, count in (("train", 200), ("test", 50)):
        manifest = read_beton(out / f"{split}.beton").manifest
        assert (manifest.synthetic, manifest.count) == (False, count)


def test_the_stand_in_does_not_replace_real_data_without_force(command: Command, out: Path) -> None:
    before = state(out)
    with pytest.raises(InputError, match=r"train\.beton.*--force"):
        command("--synthetic", *SMALL, "--out", out)
    assert state(out) == before


def test_a_stand_in_of_another_size_replaces_the_stand_in(command: Command, stand_in: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stand_in / "data" / "beton", tmp_path / "out"))
    command("--synthetic", "--train-images", 20, "--test-images", 5, "--out", out)
    assert len(read_beton(out / "train.beton").labels) == 20
    assert len(read_beton(out / "test.beton").labels) == 5


# Where the data comes from


def test_the_folder_in_the_environment_is_used(
    command: Command, other_pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_DIR", str(other_pickles))
    command("--out", tmp_path / "out")
    source = Manifest.load(tmp_path / "out" / "test.beton").source_md5
    assert source["test_batch"] == md5(other_pickles / "test_batch")


def test_a_named_source_goes_before_the_environment(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR_DIR", str(tmp_path / "absent"))
    assert "left alone" in command("--source", pickles, "--out", out)


def test_a_wrong_folder_in_the_environment_is_an_error(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CIFAR_DIR", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="absent"):
        command("--out", tmp_path / "out")


def test_an_empty_variable_in_the_environment_counts_as_none(
    command: Command, monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    monkeypatch.setenv("CIFAR_DIR", "")
    assert "left alone" in command("--out", out)


def test_pickles_under_data_are_found(command: Command, pickles: Path, out: Path) -> None:
    shutil.copytree(pickles, "data/cifar-10-batches-py")
    assert command("--out", out).count("intact, left alone") == 2


def test_intact_betons_without_a_source_are_left_alone(command: Command, out: Path) -> None:
    before = state(out)
    assert "left alone" in command("--out", out)
    assert state(out) == before


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network: the list fills with what was asked for."""
    asked: list[str] = []

    def download(dataset: str, console: Console) -> bool:
        asked.append(dataset)
        return False

    monkeypatch.setattr(write_beton, "download", download)
    return asked


def test_without_data_and_network_the_stand_in_is_made(command: Command, offline: list[str], tmp_path: Path) -> None:
    printed = command(*SMALL, "--out", tmp_path / "out")
    assert offline == ["cifar10"]
    assert printed.splitlines()[0] == synthetic.NAME
    for split, count in (("train", 50), ("test", 10)):
        manifest = read_beton(tmp_path / "out" / f"{split}.beton").manifest
        assert manifest.synthetic
        assert not manifest.official
        assert manifest.name == synthetic.NAME
        assert manifest.count == count


def test_the_stand_in_is_drawn_once(command: Command, stand_in: Path) -> None:
    shutil.copytree(stand_in, ".", dirs_exist_ok=True)
    pickles_before, before = state(Path("data/synthetic-50-10")), state(Path("data/beton"))
    assert len(pickles_before) == 7
    printed = command("--synthetic", *SMALL)
    assert synthetic.NAME in printed
    assert printed.count("intact, left alone") == 2
    assert state(Path("data/synthetic-50-10")) == pickles_before
    assert state(Path("data/beton")) == before


def test_a_download_is_used(command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(dataset: str, console: Console) -> bool:
        shutil.copytree(pickles, "data/cifar-10-batches-py")
        return True

    monkeypatch.setattr(write_beton, "download", download)
    (out / "train.beton").unlink()
    command("--out", out)
    assert not read_beton(out / "train.beton").manifest.synthetic


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "CIFAR-10 there"])
def test_cifar_100_without_network_is_an_error(command: Command, offline: list[str], out: Path, there: bool) -> None:
    if not there:
        shutil.rmtree(out)
    before = state(out)
    with pytest.raises(InputError, match="--source"):
        command("--dataset", "cifar100", "--out", out)
    assert offline == ["cifar100"]
    assert state(out) == before
    assert not Path("data").exists()  # no stand-in was drawn for it


def test_incomplete_pickles_under_data_are_an_error_without_a_network(
    command: Command, offline: list[str], pickles: Path, tmp_path: Path
) -> None:
    shutil.copytree(pickles, "data/cifar-10-batches-py")
    Path("data/cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(InputError, match="data_batch_4"):
        command("--out", tmp_path / "out")
    assert offline == ["cifar10"]  # an interrupted unpacking would have been mended


def test_a_download_with_the_wrong_md5_or_a_full_disk_is_no_reason_for_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    before = socket.getdefaulttimeout()
    try:
        for raised, expected in (
            (RuntimeError("File not found or corrupted."), InputError),
            (OSError(errno.ENOSPC, "No space left on device"), OSError),
        ):

            def fail(root: str, download: bool, raised: Exception = raised) -> None:
                raise raised

            monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
            with pytest.raises(expected):
                REAL_DOWNLOAD("cifar10", Console(quiet=True))
    finally:
        socket.setdefaulttimeout(before)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("timed out")], ids=lambda error: type(error).__name__)
def test_a_failing_download_is_reported_and_goes_no_further(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import torchvision.datasets

    def fail(root: str, download: bool) -> None:
        assert download
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    console = Console(record=True, soft_wrap=True)
    before = socket.getdefaulttimeout()
    try:
        assert REAL_DOWNLOAD("cifar10", console) is False
    finally:
        socket.setdefaulttimeout(before)
    assert str(error) in console.export_text()


# What goes wrong on the way


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "older betons there"])
def test_a_failure_while_writing_leaves_what_was_there(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, there: bool
) -> None:
    from ffcv.memory_allocator import MemoryAllocator

    if not there:
        shutil.rmtree(out)
    before = state(out)

    def flush_page(allocator: MemoryAllocator) -> None:
        allocator.fp.write(bytes(1000))
        raise error

    monkeypatch.setattr(MemoryAllocator, "flush_page", flush_page)
    with pytest.raises(type(error)) as caught:
        command("--source", pickles, "--out", out, "--force")
    assert state(out) == before
    if isinstance(error, OSError):
        assert caught.value.filename == str(out / "train.beton")


def test_a_manifest_that_cannot_be_written_leaves_a_beton_that_is_written_again(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state(out)

    def save(manifest: Manifest, beton: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(beton))

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", save)
        with pytest.raises(OSError, match="No space"):
            command("--source", pickles, "--out", out, "--force", "--name", "another name")
    command("--source", pickles, "--out", out)
    assert {name: content for name, (content, _) in state(out).items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_what_the_disk_changed_is_noticed(command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ffcv.memory_allocator import MemoryAllocator

    before, flush_page = state(out), MemoryAllocator.flush_page

    def flush_wrongly(allocator: Any) -> None:
        allocator.page_data[3072] ^= 1
        flush_page(allocator)

    monkeypatch.setattr(MemoryAllocator, "flush_page", flush_wrongly)
    with pytest.raises(InputError, match=r"train\.beton"):
        command("--source", pickles, "--out", out, "--force")
    assert state(out) == before


def test_too_little_space_is_refused_before_writing(
    command: Command, pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep import ffcv_writer

    def write(*arguments: object) -> None:
        raise AssertionError("writing began")

    free = 1 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=(1 << 40) - free, free=free))
    monkeypatch.setattr(ffcv_writer, "write", write)
    with pytest.raises(InputError) as caught:
        command("--source", pickles, "--out", tmp_path / "out")
    assert str(tmp_path / "out") in str(caught.value)
    assert "1 MB" in str(caught.value)
    assert "--out" in str(caught.value)
    assert state(tmp_path / "out") == {}


def test_a_byte_less_than_the_file_takes_is_too_little(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, size = state(out), (out / "train.beton").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(InputError, match="free some space"):
        command("--source", pickles, "--out", out, "--force")
    assert state(out) == before


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--synthetic", "--train-images", "7"], "7"),
        (["--synthetic", "--train-images", "0"], "0"),
        (["--synthetic", "--test-images", "0"], "0"),
        (["--synthetic", "--dataset", "cifar100"], "cifar100"),
        (["--dataset", "mnist"], "mnist"),
        (["--sauce", "x"], "--sauce"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], shown: str
) -> None:
    with pytest.raises((SystemExit, InputError)) as caught:
        command(*arguments)
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    assert shown in capsys.readouterr().err + str(caught.value)
    assert list(Path().iterdir()) == []


# The command line itself


def test_a_missing_source_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = run_cli("data_prep/write_beton.py", "--source", tmp_path / "absent", "--out", tmp_path / "out")
    assert_user_error(process, tmp_path / "absent", "cifar-10-batches-py")
    assert not (tmp_path / "out").exists()


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_would_run_code_is_one_line_and_exit_code_2(other_pickles: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(other_pickles, tmp_path / "source"))
    mark = tmp_path / "mark"
    (source / "data_batch_3").write_bytes(pickle.dumps({b"data": Payload(mark), b"labels": [0]}))
    process = run_cli("data_prep/write_beton.py", "--source", source, "--out", tmp_path / "out")
    assert_user_error(process, source / "data_batch_3", "system")
    assert not mark.exists()
    assert state(tmp_path / "out") == {}


def test_what_a_strange_file_says_does_not_steer_the_terminal(other_pickles: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(other_pickles, tmp_path / "source"))
    (source / "data_batch_1").write_bytes(pickle.dumps({"\x1b[2J\x1b]0;title\x07": 1}))
    process = run_cli("data_prep/write_beton.py", "--source", source, "--out", tmp_path / "out")
    assert_user_error(process, source / "data_batch_1")
    assert process.stderr.rstrip("\n").isprintable()


FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
runpy.run_path("data_prep/write_beton.py", run_name="__main__")
"""


def test_a_full_disk_is_one_line_and_exit_code_2_and_leaves_nothing(pickles: Path, tmp_path: Path) -> None:
    """A limit on the size of a file, in the middle of the page of pixels, stands for the full disk."""
    process = run_cli("-c", FULL_DISK, "--source", pickles, "--out", tmp_path / "out")
    assert_user_error(process, tmp_path / "out" / "train.beton", "limit")
    assert state(tmp_path / "out") == {}
