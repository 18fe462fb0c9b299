"""Small CIFAR data and command-line calls for every test; nothing here needs a network."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# One thread a process, before torch starts them: tests run side by side. OMP_NUM_THREADS=2 before pytest makes it two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# What would make a test depend on the machine it runs on.
for name in (
    "CIFAR_DIR", "FASTCIFAR_TRACEBACK", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "PYTHONUNBUFFERED", "RANK", "WORLD_SIZE", "RAY_ADDRESS", "NUMBA_DISABLE_JIT", "WANDB_DIR", "WANDB_NAME", "WANDB_CONSOLE",
    "MLFLOW_TRACKING_URI",
):  # fmt: skip
    os.environ.pop(name, None)

# Without a GPU, Triton's kernels run under its interpreter, which must be chosen before the first import of Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A suite started in the background has Ctrl-C ignored, and training lets such a choice stand.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples every time; no deadline, since other work may share the machine.
hypothesis.settings.register_profile("fastcifar", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastcifar")


def learnable_images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images [N, 32, 32, 3] uint8: each class has its own colour and direction of stripes, under noise."""
    y, x = np.mgrid[:32, :32] / 32
    angle = np.pi * np.arange(10) / 10
    colour = 128 + 70 * np.stack([np.cos(2 * angle), np.sin(2 * angle), np.cos(4 * angle)], axis=-1)
    phase = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    base = colour[:, None, None, :] + 30 * np.sin(2 * np.pi * 4 * phase)[..., None]
    noise = rng.normal(0, 20, (len(labels), 32, 32, 3))
    return np.clip(base[labels] + noise, 0, 255).astype(np.uint8)


def write_cifar_pickles(folder: Path, per_batch: int = 40, test: int = 50, seed: int = 0) -> Path:
    """Write a small CIFAR-10 in the official layout into `folder`: five training batches, the test batch, the names."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    sizes = {f"data_batch_{number}": per_batch for number in range(1, 6)} | {"test_batch": test}
    for name, size in sizes.items():
        labels = rng.permutation(np.arange(size) % 10)  # every class from ten images on
        images = learnable_images(labels, rng)
        batch = {
            b"batch_label": name.encode(),
            b"labels": labels.tolist(),
            b"data": np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(size, 3072),
            b"filenames": [f"{name}_{number:04d}.png".encode() for number in range(size)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"num_cases_per_batch": per_batch, b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return folder


def write_cifar100(folder: Path, images: int = 20) -> Path:
    """A small CIFAR-100 as Python 3 would write it, with text keys; labels run down from 99."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name in ("train", "test"):
        fine = [99 - number % 100 for number in range(images)]
        batch = {"data": rng.integers(0, 256, (images, 3072), dtype=np.uint8), "fine_labels": fine}
        batch |= {"coarse_labels": [label // 5 for label in fine], "filenames": [f"{number}.png" for number in range(images)]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))
    meta = {"fine_label_names": [f"fine {i}" for i in range(100)], "coarse_label_names": [f"coarse {i}" for i in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=4))
    return folder


def run_cli(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` from the repository's root (or `cwd`), `env` added to the environment, without network.

    timeout: seconds, against a command that hangs; a busy machine may take long.
    """
    nowhere = "http://127.0.0.1:9"  # the discard port: a download fails at once instead of leaving this machine
    proxies = {name: nowhere for base in ("http_proxy", "https_proxy", "all_proxy") for name in (base, base.upper())}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd or REPOSITORY,
        env=os.environ | proxies | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_user_error(process: subprocess.CompletedProcess[str], *fragments: object) -> None:
    """The command ended as a user's mistake must: exit code 2, one line that says what is wrong, no traceback."""
    everything = process.stdout + process.stderr
    assert "Traceback" not in everything, everything
    assert process.returncode == 2, everything
    lines = process.stderr.splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: "), process.stderr
    for fragment in fragments:
        assert str(fragment) in lines[0]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command's `main` in this process, which saves the seconds of its imports; returns what it printed to stdout."""

    def call(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="session")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pickles: 200 training and 50 test images."""
    return write_cifar_pickles(tmp_path_factory.mktemp("pickles"))


@pytest.fixture(scope="session")
def betons(pickles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.beton, test.beton and manifests, written from `pickles` by the command. Copy it to change it."""
    from data_prep import write_beton  # after the environment is set

    out = tmp_path_factory.mktemp("betons")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["write_beton.py", "--source", str(pickles), "--out", str(out)])
        write_beton.main()
    return out


@pytest.fixture(autouse=True)
def same_threads():
    """Importing FFCV sets PyTorch to one thread, with which sums come out in another order: not for the tests after it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command's `main` in this process as a user's mistake must end: exit code 2 and one line, which is returned."""
    from fastcifar.errors import run_command

    def refused(main: Callable[[], None], *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run_command(main)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: "), lines
        return lines[0]

    return refused
