"""Other people's training scripts, each run in a process of its own: the docstring of `run_script` is the protocol."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.baselines import LOOPS, Task
from bench.results import Run, Timing, check_run, from_json
from fastcifar.dataset import ResidentSet, Splits
from fastcifar.errors import InputError, shortened


def outside_scripts(named: Iterable[str]) -> dict[str, list[str]]:
    """{name: path and arguments} of `NAME=PATH ARGUMENTS`. Raises InputError for anything else, or a script that is not there.

    Files among the arguments are made absolute: a script runs in a folder of its own.
    """
    scripts: dict[str, list[str]] = {}
    for argument in named:
        name, _, command = argument.partition("=")
        path, *_ = words = [command] if Path(command).is_file() else command.split() or [""]
        if not path or not re.fullmatch(r"[\w.+-]+", name):  # the name is also its logs'
            raise InputError(f"an outside script is given as NAME=PATH, e.g. airbench=/src/airbench94.py, got {argument!r}")
        if not Path(path).is_file():
            raise InputError(f"outside script {name}: {path} is not a file: name the script to run")
        if name in (*LOOPS, *scripts):
            raise InputError(f"outside script {name}: that name is taken: choose another")
        scripts[name] = [str(Path(word).resolve()) if Path(word).exists() else word for word in words]
    return scripts


def run_script(
    name: str, command: list[str], task: Task, *, epochs: int, logs: Path, target: float = 0.0, hours: float = 2.0
) -> Timing:
    """Run an outside script in a process and a temporary folder of its own; what it states on its last line is its rate.

    It is run by this Python, with the arguments given and these variables

        FASTCIFAR_DATA         folder with train.beton and test.beton
        FASTCIFAR_EPOCHS       epochs it is asked to train
        FASTCIFAR_IMAGES       training images of an epoch
        FASTCIFAR_TARGET       test accuracy (0..1) to which it may state its seconds; empty where none was chosen
        FASTCIFAR_BATCH_SIZE, FASTCIFAR_ARCH, FASTCIFAR_DEVICE (cpu or cuda)

    and in the folder it runs in

        cifar10/{train,test}.pt    a dict of images (uint8 [N, 32, 32, 3]), labels (int64) and classes, where cifar10-airbench's
                                   scripts look before they download
        cifar-10-batches-py/       the same images as torchvision's CIFAR10(".", download=False) reads them. It accepts only the
                                   md5 of the official files, which a beton cannot give back, so switch that check off first:
                                   for file in CIFAR10.train_list + CIFAR10.test_list: file[1] = None
                                   CIFAR10.meta["md5"] = None

    The last line on its standard output must be a JSON object with "images_per_second" (a number, or a list of repetitions), or
    with "images" (trained on, in all) and "seconds" (of that training); "top1" (test accuracy, 0..1), "seconds_to_accuracy" and
    "runs" (a list of objects with fields of `Run` in bench/results.py: the curves of its trainings) are kept where they are
    given. Without such a line it has no rate: how long its process ran proves nothing. NAME.stdout.log and NAME.stderr.log in
    the results keep what it printed. A script that fails leaves one line, one that takes more than `hours` is ended with
    its workers, and the others go on. It is not timed in turns with the other loops.
    """
    timing = Timing(name, name, f"{' '.join(command)}, by its own clock", in_turns=False)
    logs.mkdir(parents=True, exist_ok=True)
    out, err = logs / f"{name}.stdout.log", logs / f"{name}.stderr.log"
    told = {
        "DATA": task.folder.resolve(), "EPOCHS": epochs, "IMAGES": len(task.data.train),
        "TARGET": f"{target:g}" if target else "", "BATCH_SIZE": task.recipe.batch_size, "ARCH": task.arch,
        "DEVICE": task.device.type,
    }  # fmt: skip
    variables = {f"FASTCIFAR_{name}": str(value) for name, value in told.items()}
    with tempfile.TemporaryDirectory() as folder, out.open("wb") as stdout, err.open("wb") as stderr:
        offer_data(Path(folder), task.data)
        with subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=os.environ | variables, stdin=subprocess.DEVNULL, stdout=stdout,
            stderr=stderr, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                process.wait(timeout=3600 * hours)
            except BaseException as stopped:  # too late, or Ctrl-C, which a session of its own does not hear
                with suppress(ProcessLookupError):  # it had just ended
                    os.killpg(process.pid, signal.SIGKILL)  # with the workers it started
                if isinstance(stopped, subprocess.TimeoutExpired):
                    return replace(timing, error=f"not done after {hours:g} hours: give it more with --baseline-hours")
                raise
    if process.returncode:
        said = _last_line(err) or _last_line(out) or "no output"
        return replace(timing, error=f"exit code {process.returncode}: {said}"[:240])
    try:
        return replace(timing, **read_statement(name, _last_line(out)))
    except (ValueError, InputError) as error:
        return replace(timing, error=f"no rate: {error}")


def read_statement(name: str, line: str) -> dict[str, Any]:
    """The fields of `Timing` that a script's last line states.

    Raises ValueError where it is no evidence of a rate, InputError for runs that are none.
    """

    def number(what: str, value: Any, most: float = math.inf) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 < value <= most):
            limit = "" if most == math.inf else f", at most {most:g}"
            raise ValueError(f"{what} must be a number above 0{limit}, got {value!r}")
        return float(value)

    try:
        stated = json.loads(line)
    except (ValueError, RecursionError):
        stated = None
    match stated:
        case {"images_per_second": [_, *_] as repeated}:
            rates = [number("images_per_second", rate) for rate in repeated]
        case {"images_per_second": rate}:
            rates = [number("images_per_second", rate)]
        case {"images": images, "seconds": seconds}:
            rates = [number("images", images) / number("seconds", seconds)]
        case _:
            wanted = 'a JSON object with "images_per_second", or "images" and "seconds"'
            raise ValueError(f"its last line must be {wanted}, got {line[:80]!r}")
    limits = {"top1": 1.0, "seconds_to_accuracy": math.inf}
    given = {what: number(what, stated[what], most) for what, most in limits.items() if stated.get(what) is not None}
    runs = [read_stated_run(name, stated_run) for stated_run in stated.get("runs") or []]
    return {"images_per_second": rates, "runs": runs, **given}


def read_stated_run(name: str, stated: Any) -> Run:
    """One of the runs of the script `name`. Raises InputError, or ValueError, for what is none."""
    if not isinstance(stated, dict):
        raise ValueError(f"runs must be objects, got {shortened(repr(stated))}")
    run = from_json(Run, stated | {"name": f"{name}-seed{stated.get('seed')}", "arch": name}, "runs")
    check_run(run, "runs")
    return run


def _last_line(path: Path) -> str:
    """The last line that is not blank; only the end of a long log is read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 100_000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def offer_data(folder: Path, data: Splits) -> None:
    """Write both splits into `folder` in the two layouts that `run_script` names."""
    classes = data.manifest.class_names
    (folder / "cifar10").mkdir()
    batches = folder / "cifar-10-batches-py"
    batches.mkdir()
    for split, chosen, files in (
        ("train", data.train, [f"data_batch_{number}" for number in range(1, 6)]),
        ("test", data.test, ["test_batch"]),
    ):
        assert isinstance(chosen, ResidentSet)
        images, labels = chosen.images.cpu(), chosen.labels.cpu()
        torch.save({"images": images, "labels": labels, "classes": classes}, folder / "cifar10" / f"{split}.pt")
        planes = images.permute(0, 3, 1, 2).reshape(-1, 3072).numpy()
        for file, part in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
            names = [f"{split}_{number:05d}.png" for number in part]
            batch = {"batch_label": file, "labels": labels[part].tolist(), "data": planes[part], "filenames": names}
            (batches / file).write_bytes(pickle.dumps(batch, protocol=2))
    meta = {"num_cases_per_batch": len(data.train) // 5, "label_names": classes, "num_vis": 3072}
    (batches / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
