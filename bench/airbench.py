#!/usr/bin/env python3
"""Runs the original airbench94_muon.py, or hiverge's cifar10_speedrun.py, on this machine and our data.

python bench/airbench.py /src/airbench94_muon.py --seeds 0 1 2
python bench/run.py --baseline 'airbench=bench/airbench.py /src/airbench94_muon.py --epochs 8'

The script is the author's, run as a program from a copy in which only this is replaced:

    everywhere  `range(200)`, its number of runs: one for each of --seeds, each seeded by torch.manual_seed
                `ceil(8 * len(train_loader))` and its like: stretched by --epochs over the script's own, where they are given
                the function that prints a row of its table also tells us that row
    on a CPU    `.cuda()`, `torch.device("cuda")`, `device="cuda"`: the CPU
                `.half()`, `torch.half`: bfloat16 where the CPU computes in it, else float32
                `torch.cuda.Event`: time.perf_counter
                `torch.cuda.synchronize()`, `.empty_cache()`, `._sleep()`, `.pin_memory()`: nothing
                the run that only warms up `torch.compile` trains 8 steps instead of all

It finds our images where it looks before it downloads, at their size and in their order. Left as they are: network, optimizers,
schedules, augmentation, views, batch size, `torch.compile` (--no-compile switches that off), and what its timers enclose.

The last line is JSON of the protocol in bench/outside.py. An epoch's seconds are those between the script's timers; its
accuracy is that of the script's evaluation after it, the last epoch's that of its test-time views. Their time is not counted in
airbench94_muon; it is in hiverge's script, whose table has one row and one time for everything. FLOPs: three forward passes for
each image trained on.
"""

import json
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from bench.outside import offer_data
from fastcifar.arguments import parse_arguments
from fastcifar.dataset import load_splits
from fastcifar.device import choose_device, choose_precision
from fastcifar.errors import InputError, require, run_command

PROGRAM = "python bench/airbench.py"
WARM_UP = 8  # steps of the warm-up run on a CPU, where a whole one takes as long as any other

EPOCHS = r"\bceil\((\d[\d.]*) \* len\(train_loader\)\)"
# (what, pattern, replacement): each must be found. `host` is a `Host`.
EVERYWHERE = (
    ("number of runs", r"\brange\(200\)", "host.runs()"),
    ("epochs", EPOCHS, r"host.steps(\1, train_loader, run)"),
    ("rows of the table", r"^def print_training_details\(", r"@host.listen\n\g<0>"),
)
ON_CPU = (
    ("model on the GPU", r"\.cuda\(\)", ""),
    ("data on the GPU", r'\btorch\.device\("cuda"\)', 'torch.device("cpu")'),
    ("half precision", r"\.half\(\)", ".to(host.dtype)"),
    ("CUDA's clock", r"\btorch\.cuda\.Event\(enable_timing=True\)", "host.event()"),
    ("waiting for the GPU", r"\btorch\.cuda\.synchronize\(\)", "None"),
)
ALSO_ON_CPU = (  # hiverge's alone
    (r'\bdevice="cuda"', 'device="cpu"'),
    (r"\btorch\.half\b", "host.dtype"),
    (r"\btorch\.cuda\.(?:empty_cache\(\)|_sleep\(.*\))$", "None"),
    (r"\.pin_memory\(\)", ""),
)
LEFT_OVER = re.compile(r"^(?!\s*#).*\b(?:cuda|half|float16)\b.*$", re.MULTILINE)


@dataclass(frozen=True)
class Options:
    """Run the original airbench94_muon.py or hiverge's cifar10_speedrun.py on this machine and our data."""

    script: tyro.conf.Positional[Path]  # the file as its author published it
    epochs: float = float(os.environ.get("FASTCIFAR_EPOCHS") or 0)  # of each run; 0 = the script's own
    seeds: tuple[int, ...] = (0,)  # of the runs
    compile: bool = True  # False: the script's `torch.compile` compiles nothing
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    data: Path = Path(os.environ.get("FASTCIFAR_DATA") or "data/beton")  # folder with train.beton and test.beton
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all

    def __post_init__(self) -> None:
        require(self, self.epochs >= 0, "epochs", "0 or more")
        require(self, bool(self.seeds) and all(0 <= seed < 2**63 for seed in self.seeds), "seeds", "at least one, 0..2^63-1")
        require(self, self.script.is_file(), "script", "the file to run")


class Clock:
    """What the scripts use of `torch.cuda.Event`."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        return 1e3 * (end.seconds - self.seconds)  # milliseconds


@dataclass
class Host:
    """What a script is given in place of what is replaced, and what it told while it ran."""

    seeds: tuple[int, ...]
    own_epochs: float  # that it would train
    epochs: float  # that it trains
    on_cpu: bool
    dtype: torch.dtype  # in place of half precision
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the table of the run that goes on
    done: list[dict[str, Any]] = field(default_factory=list)  # `described` of each run
    event = Clock

    def runs(self) -> Iterator[int]:
        self.done.clear()  # the warm-up's
        for number, seed in enumerate(self.seeds):
            torch.manual_seed(seed)
            yield number

    def steps(self, epochs: float, loader: Any, run: Any) -> int:
        """Steps in place of so many of the script's epochs."""
        share = epochs / self.own_epochs
        if self.on_cpu and run == "warmup":
            return ceil(share * WARM_UP)
        return ceil(share * self.epochs * len(loader))

    def listen(self, tell: Callable[[dict[str, Any], bool], None]) -> Callable[[dict[str, Any], bool], None]:
        def listening(variables: dict[str, Any], is_final_entry: bool) -> None:
            self.rows.append({name: variables[name] for name in ("time_seconds", "val_acc")})
            if is_final_entry:
                self.done.append(described(self.rows, variables))
                self.rows.clear()
            tell(variables, is_final_entry)

        return listening


def main() -> None:
    """Replace, run, state."""
    options = parse_arguments(Options, PROGRAM)
    device = choose_device(options.device)
    text, own_epochs = adapted(options.script, on_cpu=device.type == "cpu")
    dtype = choose_precision("auto", device) or torch.float32
    host = Host(options.seeds, own_epochs, options.epochs or own_epochs, device.type == "cpu", dtype)
    with working_folder(options, device) as folder, torch._dynamo.config.patch(disable=not options.compile):
        copy = folder / options.script.name
        copy.write_text(text, encoding="utf-8", errors="surrogateescape")
        sys.argv = [str(copy)]  # which it reads to keep its own code
        runpy.run_path(str(copy), init_globals={"host": host}, run_name="__main__")
    print(json.dumps(statement([run | {"seed": seed} for seed, run in zip(host.seeds, host.done, strict=True)])))


def adapted(script: Path, *, on_cpu: bool) -> tuple[str, float]:
    """The script's text with everything replaced, and its own epochs. Raises InputError for a script of another form."""
    text = script.read_text(encoding="utf-8", errors="surrogateescape")
    epochs = max(map(float, re.findall(EPOCHS, text)), default=0.0)
    for what, pattern, replacement in (*EVERYWHERE, *(ON_CPU if on_cpu else ())):
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        if not found:
            raise InputError(f"{script} has no {what} to replace ({pattern}): is it airbench94_muon.py or cifar10_speedrun.py?")
    for pattern, replacement in ALSO_ON_CPU if on_cpu else ():
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    if on_cpu and (left := LEFT_OVER.search(text)):
        raise InputError(f"{script} also needs a GPU for {left[0].strip()!r}, which {PROGRAM} does not know how to replace")
    return text, epochs


@contextmanager
def working_folder(options: Options, device: torch.device) -> Iterator[Path]:
    """The current folder where bench/outside.py put the data there, else a temporary one with them."""
    if "FASTCIFAR_IMAGES" in os.environ:
        yield Path.cwd()
        return
    data = load_splits(
        options.data, torch.device("cpu"), limit_train=options.limit_train, limit_test=options.limit_test, val_fraction=0.0,
        seed=0, verify=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        offer_data(Path(folder), data)
        del data
        yield Path(folder)


def described(rows: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """A run by its rows, the last being that of the views, and the variables then, in fields of `Run` in bench/results.py."""
    epochs = rows[:-1] or rows
    loader, test = last["train_loader"], last["test_loader"].images
    images = last["total_train_steps"] * loader.batch_size / len(epochs)  # an epoch
    tops = [*(row["val_acc"] for row in epochs[:-1]), last["tta_val_acc"]]
    tops = [round(top1 * len(test)) / len(test) for top1 in tops]  # of float32, which has no 0.905
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        last["model"].forward(test[:1])  # `forward`: not as it is compiled
    return {
        "batch_size": loader.batch_size, "images_per_epoch": round(images), "test_images": len(test),
        "train_seconds": [end - start for start, end in pairwise([0.0, *(row["time_seconds"] for row in epochs)])],
        "epoch_top1": tops, "top1": tops[-1],
        "epoch_flops": [3.0 * counter.get_total_flops() * images] * len(epochs),
    }  # fmt: skip


def statement(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the last line says: bench/outside.py's protocol."""
    rates = [run["images_per_epoch"] * len(run["train_seconds"]) / sum(run["train_seconds"]) for run in runs]
    return {"images_per_second": rates, "top1": fmean(run["top1"] for run in runs), "runs": runs}


if __name__ == "__main__":
    run_command(main)
