"""Trains as another commit of this repository does, when told to: bench/against.py starts it with that commit's folder first on
its path, so `fastcifar` and `bench` are that commit's here.

Each line of stdin is answered by a line of JSON: `ARCH` builds that architecture's training by its own recipe and warms it up,
an empty line trains a fixed number of batches once more. {"seconds": ...}, or {"error": ...} and the next line is read.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastcifar.dataset import load_splits
from fastcifar.device import choose_device, set_up_process
from fastcifar.recipes import RunOptions, reported


def build(arch: str, folder: Path, steps: int, batch_size: int) -> Callable[[], object]:
    """A call that trains `steps` batches as the commit's own training does."""
    device, recipe = choose_device("auto"), reported(arch).recipe
    recipe = replace(recipe, batch_size=batch_size or recipe.batch_size)
    data = load_splits(folder, device, limit_train=0, limit_test=0, val_fraction=0.0, seed=0, verify=False)
    try:
        from bench.baselines import Task, fastcifar_loop
    except ImportError:  # version 0.1
        return _build_01(arch, recipe, data, folder, steps)
    return fastcifar_loop(Task(arch, recipe, data, folder, steps), RunOptions(data=folder, max_parameters=0))


def _build_01(arch: str, recipe: Any, data: Any, folder: Path, steps: int) -> Callable[[], object]:
    from bench import levers, loops  # type: ignore[attr-defined]  # that version's

    names = levers.default_levers(arch, data.mean.device)
    call: Callable[[], object] = loops.ours(loops.Task(arch, recipe, data, folder, steps), names)
    return call


def main() -> None:
    """Answer until stdin ends."""
    folder, steps, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    set_up_process(choose_device("auto"), deterministic=True)
    call: Callable[[], object] = lambda: None  # noqa: E731
    for line in map(str.strip, sys.stdin):
        try:
            if line:
                call = build(line, folder, steps, batch_size)
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - started}
        except Exception as error:  # whatever it is, the other side names it
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
