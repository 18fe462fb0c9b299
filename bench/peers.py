"""A task and outside scripts enter; whole training loops, timed in turns with ours, leave as peers.

Every loop of this process trains the same model on the same images by crop and flip, which all of them can do:

    fastcifar              the real training path with the levers of the benchmark
    ordinary loop          torchvision DataLoader with 2 workers, eager, float32, NCHW
    every built-in lever   the same with more workers, pinned memory, channels_last, bf16 autocast, fused optimizer, and on CUDA
                           torch.compile
    FFCV                   FFCV's own loader before that step; its JIT is not counted

An outside script (`--peer NAME=PATH`) is timed as `PROTOCOL` says, which `python bench/run.py --help` shows.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.figures import broke
from bench.ladder import one_line
from bench.loops import Task, ffcv, ordinary, ours
from bench.schema import Peer, Peers
from bench.timing import interleaved
from fastcifar.augmentation import Augmentation
from fastcifar.dataset import AnySet, ResidentSet
from fastcifar.errors import InputError

PROTOCOL = """An outside script (--peer NAME=PATH) is run by this Python in a process and a temporary folder of its own:

    FASTCIFAR_DATA         folder with train.beton and test.beton
    FASTCIFAR_EPOCHS       epochs it is asked to train
    FASTCIFAR_IMAGES       training images of an epoch
    FASTCIFAR_BATCH_SIZE, FASTCIFAR_ARCH, FASTCIFAR_DEVICE (cpu or cuda)
    cifar10/{train,test}.pt   in the folder it runs in: a dict of images (uint8 [N, 32, 32, 3]), labels (int64) and classes,
                           where cifar10-airbench's scripts look before they download, so that they train on the same data

If the last line it prints is JSON with "images_per_second" (a number, or a list of repetitions), that is its rate. Otherwise it
is the images it trained on (--peer-images, by default FASTCIFAR_EPOCHS x FASTCIFAR_IMAGES) over the wall time of the process,
start and evaluation included; a script with its own number of epochs and runs needs --peer-images. A script that fails
leaves its last line of error, one that takes longer than two hours is ended with its workers, and the others go on.
"""

SHARED = Augmentation()  # crop with padding 4 and flip: what every loop can do
LOOPS = ("fastcifar", "ordinary loop", "every built-in lever", "FFCV")
WARMUP = 1
PATIENCE = 2 * 3600.0  # seconds an outside script may take
Say = Callable[[str], None]


def outside_scripts(named: tuple[str, ...]) -> dict[str, Path]:
    """{name: path} of `NAME=PATH` arguments. Raises InputError for anything else, or a script that is not there."""
    scripts: dict[str, Path] = {}
    for argument in named:
        name, _, path = argument.partition("=")
        if not name or not path:
            raise InputError(
                f"--peer takes NAME=PATH, got {argument!r}: give the script a name, e.g. airbench=/src/airbench94.py"
            )
        if not Path(path).is_file():
            raise InputError(f"--peer {name}: {path} is not a file: name the script to run")
        if name in LOOPS or name in scripts:
            raise InputError(f"--peer {name}: that name is taken: choose another")
        scripts[name] = Path(path).resolve()
    return scripts


def meet(
    task: Task, *, levers: list[str], rounds: int, scripts: dict[str, Path], epochs: int, peer_images: int,
    before: Peers | None = None, say: Say = print,
) -> Peers:  # fmt: skip
    """Time all loops of this process in turns, then each outside script in its own.

    levers: ours. peer_images: 0 = epochs x images. before: what an earlier run measured; only what failed in it is timed again,
    which for the loops of this process means all of them.
    """
    known = {peer.name: peer for peer in before.entries} if before else {}
    if all(name in known and not broke(known[name]) for name in LOOPS):
        peers = {name: known[name] for name in LOOPS}
    else:
        peers = meet_loops(task, levers=levers, rounds=rounds, say=say)
    for name, path in scripts.items():
        if name in known and not broke(known[name]):
            peers[name] = known[name]
            continue
        peers[name] = run_script(name, path, task, epochs=epochs, peer_images=peer_images)
        say(f"peer: {name}: {peers[name].error or f'{peers[name].images_per_second[0]:,.0f} img/s'}")
    return Peers(task.arch, task.recipe.batch_size, list(peers.values()))


def meet_loops(task: Task, *, levers: list[str], rounds: int, say: Say) -> dict[str, Peer]:
    """Time the loops of this process in turns."""
    task = replace(task, recipe=replace(task.recipe, augmentation=SHARED))
    builders: tuple[tuple[Callable[[], Callable[[], None]], str], ...] = (
        (
            lambda: ours(task, levers),
            f"the real training path with {', '.join(levers)}; all loops crop and flip",
        ),
        (lambda: ordinary(task), "DataLoader with 2 workers, eager, fp32, NCHW"),
        (lambda: ordinary(task, built_in=True), _built_in(task.device)),
        (lambda: ffcv(task), "FFCV's loader before the step with every built-in lever; JIT not counted"),
    )
    peers: dict[str, Peer] = {}
    turns: dict[str, Callable[[], object]] = {}
    for name, (build, note) in zip(LOOPS, builders, strict=True):
        try:
            turn = build()
            turn()  # compiles, starts workers; and shows whether it works at all
            peers[name], turns[name] = Peer(name, note=note), turn
        except Exception as error:  # whatever a peer raises, the others go on
            absent = isinstance(error, ModuleNotFoundError) and error.name == "ffcv"  # an option, which is no failure
            peers[name] = Peer(name, note=note, error="not applicable: no FFCV here" if absent else one_line(error))
        say(f"peer: {name}: {peers[name].error or 'ready'}")
    timings = interleaved(turns, rounds=rounds, warmup=WARMUP, drop=True)
    for name, seconds in timings.seconds.items():
        peers[name] = replace(peers[name], images_per_second=[task.images / one for one in seconds])
    for name, raised in timings.errors.items():
        peers[name] = replace(peers[name], error=one_line(raised))
        say(f"peer: {name}: {peers[name].error}")
    return peers


def _built_in(device: torch.device) -> str:
    compiled = ", torch.compile, pinned memory" if device.type == "cuda" else ""
    return f"DataLoader, channels_last, bf16 autocast, fused optimizer{compiled}"


def run_script(name: str, path: Path, task: Task, *, epochs: int, peer_images: int) -> Peer:
    """Time an outside script in a process of its own, as `PROTOCOL` says."""
    variables = {
        "FASTCIFAR_DATA": str(task.folder.resolve()),
        "FASTCIFAR_EPOCHS": str(epochs),
        "FASTCIFAR_IMAGES": str(len(task.data.train)),
        "FASTCIFAR_BATCH_SIZE": str(task.recipe.batch_size),
        "FASTCIFAR_ARCH": task.arch,
        "FASTCIFAR_DEVICE": task.device.type,
    }
    with tempfile.TemporaryDirectory() as folder:
        for split, data in (("train", task.data.train), ("test", task.data.test)):
            _export(Path(folder) / "cifar10" / f"{split}.pt", data, task.data.manifest.class_names)
        started = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, str(path)], cwd=folder, env=os.environ | variables, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                told, complained = process.communicate(timeout=PATIENCE)
            except BaseException as stopped:  # too late, or Ctrl-C, which a session of its own does not hear
                with suppress(ProcessLookupError):  # it had just ended
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers it started
                if isinstance(stopped, subprocess.TimeoutExpired):
                    return Peer(name, note=str(path), error=f"not done after {PATIENCE / 3600:.0f} hours")
                raise
        seconds = time.perf_counter() - started
    if process.returncode:
        lines = (complained or told).strip().splitlines()
        return Peer(name, note=str(path), error=f"exit code {process.returncode}: {(lines or ['no output'])[-1][:200]}")
    printed = told.strip().splitlines()
    rates = stated_rates(printed[-1]) if printed else None
    if rates is not None:
        return Peer(name, rates, f"{path}, by its own clock", apart=True)
    images = peer_images or epochs * len(task.data.train)
    return Peer(name, [images / seconds], f"{path}, {images:,} images over the wall time of its process", apart=True)


def stated_rates(line: str) -> list[float] | None:
    """The rates in a script's last line; None when it is not such a line, or a rate is not a number above 0."""
    try:
        values: Any = json.loads(line)["images_per_second"]
        rates = [float(value) for value in (values if isinstance(values, list) else [values])]
    except (ValueError, TypeError, KeyError, IndexError):
        return None
    return rates if rates and all(math.isfinite(rate) and rate > 0 for rate in rates) else None


def _export(path: Path, data: AnySet, classes: list[str]) -> None:
    assert isinstance(data, ResidentSet)
    path.parent.mkdir(exist_ok=True)
    torch.save({"images": data.images.cpu(), "labels": data.labels.cpu(), "classes": classes}, path)
