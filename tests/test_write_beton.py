"""The data command finds its source, writes only what is needed, and leaves whole files or none."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from conftest import CLASSES, assert_user_error, run_cli, write_cifar100, write_cifar_pickles
from rich.console import Console

from data_prep import beton_writer, synthetic, write_beton
from data_prep.cifar_pickles import LAYOUTS, read_split
from fastcifar.beton import Manifest, read_beton
from fastcifar.errors import InputError, run_command

FILES = ["test.beton", "test.json", "train.beton", "train.json"]
REAL_DOWNLOAD = write_beton.download
METADATA = 24 + 3 * 1041  # where it begins: 32 bytes a sample, its label at 16, its index at 24
SMALL = ("--train-images", 50, "--test-images", 10)
NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
Command = Callable[..., str]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No network: the list fills with what was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(write_beton, "download", lambda dataset, console: bool(asked.append(dataset)))
    return asked


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., str]) -> Command:
    """The command, run here in an empty folder; it returns what was printed."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return partial(call, write_beton.main)


@pytest.fixture
def out(betons: Path, tmp_path: Path) -> Path:
    """A copy of the session's betons, to be changed."""
    folder = Path(shutil.copytree(betons, tmp_path / "out"))
    for path in folder.iterdir():
        os.utime(path, (0, 0))  # whatever is written is newer
    return folder


@pytest.fixture(scope="module")
def other_pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cifar_pickles(tmp_path_factory.mktemp("other"), per_batch=10, test=10, seed=1)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a small synthetic dataset's pickles and betons under data/, as the command itself leaves them."""
    folder = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["write_beton.py", "--synthetic", *map(str, SMALL)])
        write_beton.main()
    return folder


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file; the folder may be missing."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in state(folder).items()}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = state(folder)
    yield
    assert state(folder) == before


def digest(path: Path, algorithm: str) -> str:
    return hashlib.new(algorithm, path.read_bytes()).hexdigest()


def md5(path: Path) -> str:
    return digest(path, "md5")


# What is written


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_manifest_describes_the_data(betons: Path, pickles: Path, split: str) -> None:
    values = json.loads((betons / f"{split}.json").read_text())
    batches = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    pixels = read_split(pickles, LAYOUTS["cifar10"], split).images.astype(np.float64) / 255
    np.testing.assert_allclose(values.pop("mean"), pixels.mean(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(values.pop("std"), pixels.std(axis=(0, 1, 2)), rtol=0, atol=1e-6)
    versions = values.pop("versions")
    assert versions["numpy"] == np.__version__
    assert versions["fastcifar"]
    assert len(values.pop("manifest_sha256")) == 64
    assert values == {
        "dataset": "cifar10",
        "split": split,
        "name": "CIFAR-10 (not the official archive)",
        "count": {"train": 200, "test": 50}[split],
        "class_names": CLASSES,
        "sha256": hashlib.sha256((betons / f"{split}.beton").read_bytes()).hexdigest(),
        "official": False,
        "synthetic": False,
        **{
            f"source_{algorithm}": {name: digest(pickles / name, algorithm) for name in (*batches, "batches.meta")}
            for algorithm in ("md5", "sha256")
        },
    }


def test_statistics_are_exact_for_every_pixel_value() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 2
    images[..., 2] = 255
    mean, std = write_beton.channel_statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std(axis=(0, 1, 2)), rtol=1e-12, atol=1e-12)


def test_data_that_is_not_official_is_said_to_be_so_and_written(command: Command, other_pickles: Path, tmp_path: Path) -> None:
    printed = command("--source", other_pickles, "--out", tmp_path / "out")
    assert f"{other_pickles}: not the official archive" in printed
    assert list(state(tmp_path / "out")) == FILES
    assert len(read_beton(tmp_path / "out" / "train.beton").labels) == 50


def test_data_with_the_official_md5_sums_is_called_so(
    command: Command, other_pickles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS["cifar10"]
    splits = {split: {name: md5(other_pickles / name) for name in names} for split, names in layout.splits.items()}
    meta = {name: md5(other_pickles / name) for name in layout.meta}
    monkeypatch.setitem(LAYOUTS, "cifar10", replace(layout, splits=splits, meta=meta))
    assert "not the official archive" not in command("--source", other_pickles, "--out", tmp_path / "out")
    manifest = Manifest.load(tmp_path / "out" / "test.beton")
    assert (manifest.official, manifest.name) == (True, "CIFAR-10")


def test_cifar_100_is_written(command: Command, tmp_path: Path) -> None:
    write_cifar100(tmp_path / "cifar-100-python", images=20)
    command("--dataset", "cifar100", "--source", tmp_path, "--out", tmp_path / "out")
    read = read_beton(tmp_path / "out" / "test.beton")
    assert read.labels.tolist() == list(range(99, 79, -1))
    assert (read.manifest.dataset, read.manifest.class_names[99]) == ("cifar100", "fine 99")


@pytest.mark.parametrize("name", ["mine [v2]", "[/]"])
def test_names_are_kept_and_shown_as_they_are(command: Command, other_pickles: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out [old]"
    printed = command("--source", other_pickles, "--out", folder, "--name", name)
    assert Manifest.load(folder / "train.beton").name == name
    assert f"{folder / 'train.beton'}: 50 images, {name}, read back byte for byte" in printed


# What is left alone, and what is not


def test_a_second_run_changes_nothing_and_says_so(command: Command, pickles: Path, out: Path) -> None:
    with unchanged(out):
        assert command("--source", pickles, "--out", out).count("intact, left alone") == 2
        assert "no source was named: left alone" in command("--out", out)


def test_force_writes_the_same_again(command: Command, pickles: Path, out: Path) -> None:
    before = state(out)
    assert "left alone" not in command("--source", pickles, "--out", out, "--force")
    after = state(out)
    assert list(after) == FILES
    for name in FILES:
        assert after[name][0] == before[name][0]
        assert after[name][1] > before[name][1]


def test_another_name_for_the_same_data_is_written_without_force(command: Command, pickles: Path, out: Path) -> None:
    before = contents(out)
    command("--source", pickles, "--out", out, "--name", "another name")
    assert read_beton(out / "train.beton").manifest.name == "another name"
    assert contents(out)["train.beton"] == before["train.beton"]


def overwrite(path: Path, position: int, content: bytes) -> None:
    with open(path, "rb+") as file:
        file.seek(position)
        file.write(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a changed pixel": lambda out: overwrite(out / "train.beton", (1 << 23) + 5000, b"new"),
    "no header": lambda out: overwrite(out / "train.beton", 0, bytes(24)),
    "truncated": lambda out: os.truncate(out / "train.beton", 1 << 23),
    "missing": lambda out: (out / "train.beton").unlink(),
    "no manifest": lambda out: (out / "train.json").unlink(),
    "broken manifest": lambda out: (out / "train.json").write_text('{"dataset": '),
    "the test split's beton and manifest": lambda out: [
        shutil.copy(path, path.with_stem("train")) for path in (out / "test.beton", out / "test.json")
    ],
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
    assert printed.count("left alone") == printed.count("read back byte for byte") == 1


def test_an_intact_beton_of_other_data_is_replaced_only_with_force(command: Command, other_pickles: Path, out: Path) -> None:
    for source in (("--source", other_pickles), ("--synthetic", *SMALL)):
        with unchanged(out), pytest.raises(InputError, match=r"train\.beton holds other data .*--out.*--force"):
            command(*source, "--out", out)
    command("--source", other_pickles, "--out", out, "--force")
    source = read_split(other_pickles, LAYOUTS["cifar10"], "test")
    np.testing.assert_array_equal(read_beton(out / "test.beton").images, source.images)


def test_a_synthetic_dataset_is_replaced_without_force(command: Command, pickles: Path, drawn: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(drawn / "data" / "beton", tmp_path / "out"))
    smaller, real = ("--synthetic", "--train-images", 20, "--test-images", 5), ("--source", pickles)
    for arguments, is_synthetic, counts in ((smaller, True, (20, 5)), (real, False, (200, 50))):
        command(*arguments, "--out", out)
        manifests = [read_beton(out / f"{split}.beton").manifest for split in ("train", "test")]
        assert [(manifest.synthetic, manifest.count) for manifest in manifests] == [(is_synthetic, n) for n in counts]


# Where the data comes from


def test_the_environment_names_a_source_unless_the_command_line_does(
    command: Command, other_pickles: Path, pickles: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_DIR", str(other_pickles))
    command("--out", tmp_path / "new")
    assert Manifest.load(tmp_path / "new" / "test.beton").source_md5["test_batch"] == md5(other_pickles / "test_batch")
    monkeypatch.setenv("CIFAR_DIR", str(tmp_path / "absent"))
    assert "left alone" in command("--source", pickles, "--out", out)
    with pytest.raises(InputError, match="absent"):
        command("--out", out)
    monkeypatch.setenv("CIFAR_DIR", "")
    assert "left alone" in command("--out", out)


def test_pickles_under_data_are_found(command: Command, pickles: Path, out: Path) -> None:
    shutil.copytree(pickles, "data/cifar-10-batches-py")
    assert command("--out", out).count("intact, left alone") == 2


def test_without_data_and_network_a_synthetic_dataset_is_drawn(command: Command, offline: list[str], tmp_path: Path) -> None:
    printed = command(*SMALL, "--out", tmp_path / "out")
    assert offline == ["cifar10"]
    assert printed.splitlines()[0] == synthetic.NAME
    for split, count in (("train", 50), ("test", 10)):
        manifest = read_beton(tmp_path / "out" / f"{split}.beton").manifest
        assert (manifest.synthetic, manifest.official, manifest.name, manifest.count) == (True, False, synthetic.NAME, count)


def test_the_synthetic_dataset_is_drawn_once(command: Command, drawn: Path) -> None:
    shutil.copytree(drawn, ".", dirs_exist_ok=True)
    assert len(state(Path("data/synthetic-50-10"))) == 7
    with unchanged(Path("data/synthetic-50-10")), unchanged(Path("data/beton")):
        printed = command("--synthetic", *SMALL)
    assert synthetic.NAME in printed
    assert printed.count("intact, left alone") == 2


def test_a_download_is_used(command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        write_beton, "download", lambda dataset, console: bool(shutil.copytree(pickles, "data/cifar-10-batches-py"))
    )
    (out / "train.beton").unlink()
    command("--out", out)
    assert not read_beton(out / "train.beton").manifest.synthetic


def test_cifar_100_without_network_is_an_error(command: Command, offline: list[str], out: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", out):  # with nothing there, and with CIFAR-10 there
        with unchanged(folder), pytest.raises(InputError, match="--source"):
            command("--dataset", "cifar100", "--out", folder)
    assert offline == ["cifar100", "cifar100"]
    assert not Path("data").exists()  # no synthetic dataset was drawn for it


def test_incomplete_pickles_under_data_are_an_error_without_a_network(
    command: Command, offline: list[str], pickles: Path, tmp_path: Path
) -> None:
    shutil.copytree(pickles, "data/cifar-10-batches-py")
    Path("data/cifar-10-batches-py/data_batch_4").unlink()
    with pytest.raises(InputError, match="data_batch_4"):
        command("--out", tmp_path / "out")
    assert offline == ["cifar10"]  # an interrupted unpacking would have been completed


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (URLError("no route"), False),
        (TimeoutError("timed out"), False),
        (ConnectionResetError("reset by peer"), False),
        (RuntimeError("File not found or corrupted."), InputError),  # torchvision's word for a wrong md5
        (NO_SPACE, OSError),  # no reason for a synthetic dataset
    ],
    ids=repr,
)
def test_a_download_fails_quietly_only_without_network(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: Any
) -> None:
    import torchvision.datasets

    def fail(root: str, download: bool) -> None:
        assert download
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    console = Console(record=True, soft_wrap=True)
    before = socket.getdefaulttimeout()
    try:
        if expected is False:
            assert REAL_DOWNLOAD("cifar10", console) is False
            assert str(error) in console.export_text()
        else:
            with pytest.raises(expected):
                REAL_DOWNLOAD("cifar10", console)
    finally:
        socket.setdefaulttimeout(before)


# Names, which any file may have made up


def test_names_carry_nothing_that_would_steer_a_terminal(command: Command, other_pickles: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(other_pickles, tmp_path / "source"))
    names = [b"\x1b]0;title\x07", "\u202eauto".encode(), "\xe9".encode(), b"\xe9", b"deer" * 100, *map(str, range(5))]
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    printed = command("--source", source, "--out", tmp_path / "out", "--name", "\x1b[2J")
    assert printed.replace("\n", "").isprintable()
    manifest = Manifest.load(tmp_path / "out" / "test.beton")
    assert manifest.name == r"\x1b[2J"
    assert manifest.class_names[:5] == [r"\x1b]0;title\x07", r"\u202eauto", "\xe9", "\xe9", "deer" * 50]
    assert "left alone" in command("--source", source, "--out", tmp_path / "out", "--name", "\x1b[2J")


# --check


def test_check_compares_hash_statistics_and_pickles(command: Command, pickles: Path, out: Path) -> None:
    with unchanged(out), unchanged(pickles):
        lines = command("--check", "--out", out).splitlines()
        assert [line.split(":")[0] for line in lines] == [str(out / f"{split}.beton") for split in ("train", "test")]
        assert all("hash and statistics right, no pickles at hand" in line for line in lines)
        shutil.copytree(pickles, "data/cifar-10-batches-py")
        assert command("--check", "--out", out).count("byte for byte as in data/cifar-10-batches-py") == 2
        assert command("--check", "--out", out, "--source", pickles).count(f"byte for byte as in {pickles}") == 2


def test_check_finds_the_pickles_of_a_synthetic_dataset(command: Command, drawn: Path) -> None:
    shutil.copytree(drawn, ".", dirs_exist_ok=True)
    assert command("--check").count("byte for byte as in data/synthetic-50-10") == 2


def relabel(out: Path) -> None:
    """Write the beton's labels anew, with a manifest that agrees with them: only its pickles tell."""
    path = out / "train.beton"
    labels = path.read_bytes()[METADATA + 16]
    overwrite(path, METADATA + 16, bytes([(labels + 1) % 10]))
    replace(Manifest.load(path), sha256=digest(path, "sha256")).save(path)


CHECKS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    **{
        name: (lambda out, _, damage=damage: damage(out), r"train\.(beton|json)")
        for name, damage in DAMAGE.items()
    },
    "a pixel of a pickle": (lambda _, source: overwrite(source / "data_batch_3", 5000, b"new"), "data_batch_3 .* sha256"),
    "a label": (lambda out, _: relabel(out), r"train\.beton does not hold what is in"),
    "statistics": (
        lambda out, _: replace(Manifest.load(out / "train.beton"), mean=[0.5, 0.5, 0.4]).save(out / "train.beton"),
        r"train\.json has another mean or std",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHECKS)
def test_check_names_what_differs_and_changes_nothing(
    refused: Callable[..., str], pickles: Path, out: Path, tmp_path: Path, change: str
) -> None:
    source = Path(shutil.copytree(pickles, tmp_path / "source"))
    damage, message = CHECKS[change]
    damage(out, source)
    with unchanged(out), unchanged(source):
        assert re.search(message, refused(write_beton.main, "--check", "--out", out, "--source", source))
        refused(write_beton.main, "--check", "--force", "--out", out)


# What goes wrong on the way


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_failure_while_writing_leaves_what_was_there(
    command: Command, pickles: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def write(path: Path, *arguments: Any) -> None:
        path.write_bytes(bytes(1000))
        raise error

    monkeypatch.setattr(beton_writer, "write", write)
    for folder in (tmp_path / "new", out):
        before = contents(folder)
        with pytest.raises(type(error)) as caught:
            command("--source", pickles, "--out", folder, "--force")
        assert contents(folder) == before
        if isinstance(error, OSError):
            assert caught.value.filename == str(folder / "train.beton")


def test_a_manifest_that_cannot_be_written_leaves_a_beton_that_is_written_again(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)

    def save(manifest: Manifest, beton: Path) -> None:
        raise NO_SPACE

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "save", save)
        with pytest.raises(OSError, match="No space"):
            command("--source", pickles, "--out", out, "--force", "--name", "another name")
    command("--source", pickles, "--out", out)
    assert contents(out) == before


DISK_ERRORS = {
    "pixel": {(1 << 23) + 5000: b"new"},
    "label": {METADATA + 16 + 1: b"\1"},
    "indices": {METADATA + 24: b"\1", METADATA + 32 + 24: b"\0"},  # exchanged, so that they are still 0..N-1
}


@pytest.mark.parametrize("changed", DISK_ERRORS)
def test_what_the_disk_changed_is_noticed(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    def write(path: Path, *arguments: Any) -> None:
        real_write(path, *arguments)
        for position, content in DISK_ERRORS[changed].items():
            overwrite(path, position, content)

    real_write = beton_writer.write
    monkeypatch.setattr(beton_writer, "write", write)
    with unchanged(out), pytest.raises(InputError, match=r"train\.beton.* does not read back"):
        command("--source", pickles, "--out", out, "--force")


def test_too_little_space_is_refused_before_writing(
    command: Command, pickles: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (out / "train.beton").stat().st_size
    for free, shown in ((1 << 20, "1 MB are free"), (size - 1, "free some space")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with unchanged(out), pytest.raises(InputError, match=shown) as caught:
            command("--source", pickles, "--out", out, "--force")
        assert str(out) in str(caught.value)
        assert "--out" in str(caught.value)


def test_a_full_disk_is_one_line_and_exit_code_2_and_leaves_nothing(
    command: Command, pickles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of a file, in the middle of the page of pixels, simulates the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, hard))
    try:
        with pytest.raises(SystemExit, match="2"):
            run_command(lambda: print(command("--source", pickles, "--out", tmp_path / "out")))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'out' / 'train.beton'}")
    assert "limit" in line
    assert state(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "arguments",
    [
        "--synthetic --train-images 7",
        "--synthetic --train-images 0",
        "--synthetic --test-images 0",
        "--synthetic --dataset cifar100",
        "--dataset mnist",
        "--sauce x",
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    with pytest.raises((SystemExit, InputError)) as caught:
        command(*arguments.split())
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    assert arguments.split()[-1 if "sauce" not in arguments else 0] in capsys.readouterr().err + str(caught.value)
    assert list(Path().iterdir()) == []


# The command line itself


def test_a_users_mistake_is_one_harmless_line_and_exit_code_2(other_pickles: Path, tmp_path: Path) -> None:
    """No folder; a pickle that would run code; a pickle whose own words would steer the terminal."""
    mark, source, out = tmp_path / "mark", tmp_path / "source", tmp_path / "out"
    for content, fragments in (
        (None, ("cifar-10-batches-py",)),
        (f"cos\nsystem\n(S'touch {mark}'\ntR.".encode(), (source / "data_batch_3", "system")),
        (pickle.dumps({"\x1b[2J\x1b]0;title\x07": 1}), (source / "data_batch_3",)),
    ):
        if content is not None:
            shutil.copytree(other_pickles, source, dirs_exist_ok=True)
            (source / "data_batch_3").write_bytes(content)
        process = run_cli("data_prep/write_beton.py", "--source", source, "--out", out)
        assert_user_error(process, source, *fragments)
        assert process.stderr.rstrip("\n").isprintable()
        assert state(out) == {}
    assert not mark.exists()
