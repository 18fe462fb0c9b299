"""Kills training, and the writing of betons, at random moments; what is resumed must end as if nothing had happened.

python -m tests.reliability.soak --kills 200 --seed 0 --out soak.json
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep import write_beton
from fastcifar import train
from fastcifar.arguments import parse_arguments
from fastcifar.checkpoint import load_checkpoint
from fastcifar.models import ARCHITECTURES
from fastcifar.run_folder import RunFolder
from tests.conftest import write_cifar_pickles
from tests.reliability.processes import start

CPU = torch.device("cpu")
TIMELESS = ("epoch", "train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "best_accuracy", "learning_rates")
SIGNALS = {signal.SIGKILL: 8, signal.SIGTERM: 1, signal.SIGINT: 1}  # and how often each
KILLS_A_RUN = 6  # at most; then the run may finish
NARROW = replace(ARCHITECTURES["light_resnet18"], widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1))
RECIPE = "--arch narrow --recipe light_resnet18 --epochs 4 --held-out 0 --batch-size 20 --ema-decay 0.9 --optimizer adamw"


@dataclass(frozen=True)
class Options:
    """Kill, go on, and compare with what was never killed."""

    kills: int = 200  # processes to end, at random moments
    seed: int = 0  # of the moments and signals
    out: Path | None = None  # JSON with the figures


def main() -> None:
    """Run the whole trial; exit 1 when a result differs."""
    options = parse_arguments(Options, "python -m tests.reliability.soak")
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    figures = soak(folder, options.kills, random.Random(options.seed))
    print(json.dumps(figures, indent=2))
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(folder)
    sys.exit(bool(figures["differences"]))


def soak(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill `kills` processes in all, a fifth of them writers of betons. Returns the figures."""
    ARCHITECTURES["narrow"] = NARROW
    pickles, betons = write_cifar_pickles(folder / "pickles"), folder / "betons"
    write = ["--source", str(pickles), "--out"]
    seconds_to_write = _finish(write_beton.main, [*write, str(betons)])
    options = [*RECIPE.split(), "--no-plots", "--data", str(betons)]
    seconds_to_train = _finish(train.main, [*options, "--out", str(folder / "whole")])
    wanted = outcome(folder / "whole")
    done: Counter[str] = Counter()
    differences: list[str] = []
    while sum(done[name] for name in ("training", "writing")) < kills:
        number = done["runs"] = done["runs"] + 1
        if rng.random() < 0.2:
            out = folder / f"betons{number}"
            killed = _kill_and_go_on(write_beton.main, lambda out=out: [*write, str(out)], seconds_to_write, rng)
            done["writing"] += killed
            differences += [f"{out.name}: {file}" for file in _other_bytes(out, betons)]
        else:
            out = folder / f"run{number}"

            def again(out: Path = out) -> list[str]:
                return ["--resume", str(out)] if (out / "config.json").exists() else [*options, "--out", str(out)]

            done["training"] += _kill_and_go_on(train.main, again, seconds_to_train, rng)
            got = outcome(out)
            differences += [f"{out.name}: {part}" for part in wanted if not same(wanted[part], got[part])]
        shutil.rmtree(out)
    return {"kills": kills, "killed": dict(done), "differences": differences}


def outcome(path: Path) -> dict[str, Any]:
    """What a finished run is, but for its times."""
    folder = RunFolder(path)
    last, best = (vars(load_checkpoint(file, CPU)) for file in (folder.last, folder.best))
    curves = EventAccumulator(str(path), size_guidance={"scalars": 0})
    curves.Reload()
    scalars = {
        tag: [(event.step, None if tag.startswith("speed/") else event.value) for event in curves.Scalars(tag)]
        for tag in curves.Tags()["scalars"]
    }
    return {
        "last.pt": last,
        "best.pt": best,
        "metrics": [{name: row[name] for name in TIMELESS} for row in folder.read_metrics()],
        "summary": folder.read_summary()["final"],
        "TensorBoard": scalars,
        "files": sorted(file.name for file in path.iterdir() if not file.name.startswith("events.")),
    }


def _kill_and_go_on(command: Callable[[], None], arguments: Callable[[], list[str]], seconds: float, rng: random.Random) -> int:
    """Run a command until it ends by itself, killed up to KILLS_A_RUN times before; returns how often it was."""
    killed = 0
    for left in range(rng.randint(1, KILLS_A_RUN), -1, -1):
        child = start(command, arguments())
        if left:
            time.sleep(rng.uniform(0, seconds))
            number = rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
            os.kill(child, number)
            _, status = os.waitpid(child, 0)
            killed += status != 0  # it may have ended before
        else:
            _, status = os.waitpid(child, 0)
            if status:
                raise RuntimeError(f"{arguments()} ended with status {status}")
    return killed


def _finish(command: Callable[[], None], arguments: list[str]) -> float:
    """Run a command in a child to its end; returns its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(start(command, arguments), 0)
    if status:
        raise RuntimeError(f"{arguments} ended with status {status}")
    return time.monotonic() - began


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, tensors anywhere inside."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _other_bytes(folder: Path, reference: Path) -> list[str]:
    """Files of a folder that are not those of the reference, byte for byte."""
    names = sorted({file.name for part in (folder, reference) for file in part.iterdir()})
    return [name for name in names if not all((part / name).exists() for part in (folder, reference))
            or (folder / name).read_bytes() != (reference / name).read_bytes()]  # fmt: skip


if __name__ == "__main__":
    main()
