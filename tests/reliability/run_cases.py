"""Cases for the readers of runs: checkpoints, run folders, plans, and the benchmark's results."""

import io
import json
import math
import os
import random
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.report import build_report, render
from bench.results import read_results
from fastcifar import plan
from fastcifar.checkpoint import Checkpoint, load, sealed, serialised
from fastcifar.command import resumed
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, build_model, place
from fastcifar.models.resnet import PixelClassifier
from fastcifar.plots import read_run
from fastcifar.recipes import RunOptions, reported, to_dict
from fastcifar.run_folder import CONFIG_FORMAT, METRIC_KEYS, RunFolder
from tests.bench_results import make_results
from tests.reliability.data_cases import damaged
from tests.reliability.fuzz import Case

CPU = torch.device("cpu")
NAMES = [f"class {number}" for number in range(10)]
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, -(2**63), 2**64, 10**400, 0.0, 0.5, -0.5, 1e308, math.inf, math.nan, "", "x", "1",
    "resnet42", "\x1b[2J", "$x$", "\ud800", "x" * 5000, [], [1], [None], ["a"] * 3, [[[]]], {}, {"a": 1}, {"": {}},
]  # fmt: skip


NARROW = replace(ARCHITECTURES["light_resnet18"], widths=(2, 2, 2, 2), blocks=(1, 1, 1, 1))


@cache
def honest() -> tuple[Checkpoint, Tensor, Tensor]:
    """A checkpoint of a small network, an image, and the logits it gives for it."""
    ARCHITECTURES.setdefault("narrow", NARROW)
    torch.manual_seed(0)
    model = place(build_model("narrow", 10), CPU).eval()
    mean, std = [0.5, 0.25, 0.5], [0.25, 0.5, 0.25]
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    checkpoint = Checkpoint(
        "narrow", True, NAMES, mean, std, "data", ["ab" * 32, "cd" * 32], 2, dict(model.state_dict()), None, optimizer, 0.5, 2
    )
    image = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
    return checkpoint, image, PixelClassifier(model, torch.tensor(mean), torch.tensor(std))(image).detach()


def make_checkpoint(rng: random.Random) -> Case:
    """A checkpoint with damaged bytes, or with wrong values and a hash that fits them."""
    checkpoint, image, logits = honest()
    kind = rng.choice(["honest", "bytes", "fields", "fields", "tensors", "tensors", "pickle", "archive", "old"])
    values: dict[str, Any] = {"format": 2, **vars(checkpoint)}
    if kind == "fields":
        name = rng.choice(list(values))
        if rng.random() < 0.8:
            values[name] = rng.choice(VALUES)
        else:
            del values[name]
    elif kind == "tensors":
        values["model"] = changed_tensors(rng, checkpoint.model)
    elif kind == "old":
        values["format"] = 1
        del values["within"]
    content = serialised(values)
    if kind == "pickle":
        content = rewritten(content, lambda name, part: damaged(rng, part) if name.endswith("data.pkl") else part)
    elif kind == "archive":
        target = rng.choice(["data.pkl", "version", "byteorder", "data/0", "data/3"])
        options = [damaged(rng, b"little" * 3), b"", bytes(1 << 20)]
        content = rewritten(
            content, lambda name, part: rng.choice(options) if name.endswith(target) else part, rng.random() < 0.3
        )
    content = content if kind == "old" else sealed(content)
    if kind == "bytes":
        content = damaged(rng, content)
    same = content == sealed(serialised({"format": 2, **vars(checkpoint)})) or kind == "old"

    def read(folder: Path) -> None:
        model = load(folder / "last.pt")
        assert kind != "bytes" or same, "changed bytes were read"
        result = model(image)
        assert result.shape == (1, len(model.class_names))
        if same:
            assert torch.equal(result, logits)

    return Case(f"checkpoint: {kind}", {"last.pt": content}, read)


def changed_tensors(rng: random.Random, state: dict[str, Tensor]) -> dict[str, Any]:
    """A state_dict of which one entry is wrong, or honestly another number."""
    name = rng.choice(list(state))
    tensor = state[name]
    with_one = tensor.clone().double()
    with_one.flatten()[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, -math.inf, 0.25])
    options: list[Callable[[], Any]] = [
        lambda: with_one.to(tensor.dtype) if tensor.is_floating_point() else tensor + 1,
        lambda: tensor.double(),
        lambda: tensor.half(),
        lambda: tensor.flatten()[:-1],
        lambda: torch.zeros(1).expand(1 << rng.choice([10, 30, 45])),
        lambda: torch.zeros(0),
        lambda: torch.zeros(2, 2).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: tensor[None],
        lambda: "x",
        lambda: torch.complex(torch.ones(2), torch.ones(2)),
    ]
    result: dict[str, Any] = dict(state)
    match rng.choice(["change", "change", "change", "delete", "add", "rename"]):
        case "change":
            result[name] = rng.choice(options)()
        case "delete":
            del result[name]
        case "add":
            result["extra"] = torch.zeros(3)
        case "rename":
            result[name + "x"] = result.pop(name)
    return result


def rewritten(content: bytes, change: Callable[[str, bytes], bytes], compress: bool = False) -> bytes:
    """The archive with its entries changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            new.writestr(entry.filename, change(entry.filename, old.read(entry)), kind)
    return buffer.getvalue()


def changed_json(rng: random.Random, values: Any) -> Any:
    """A copy with one to three entries anywhere in it replaced, removed or added."""
    values = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        place: Any = values
        while isinstance(place, dict | list) and place:
            keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = rng.choice(keys)
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        else:
            continue
        match rng.choice(["set", "set", "set", "delete", "add"]):
            case "set":
                place[key] = deepcopy(rng.choice(VALUES))
            case "delete":
                del place[key]
            case "add" if isinstance(place, dict):
                place[rng.choice(["extra", "", "\x1b[2J", "format"])] = deepcopy(rng.choice(VALUES))
            case "add":
                place.append(deepcopy(rng.choice(VALUES)))
    return values


def as_text(rng: random.Random, values: Any) -> bytes:
    """JSON, its bytes damaged one time in five."""
    content = json.dumps(values, indent=rng.choice([None, 2])).encode()
    return damaged(rng, content) if rng.random() < 0.2 else content


@cache
def honest_folder() -> dict[str, Any]:
    """config.json, the rows of metrics.jsonl and summary.json of a finished run of three epochs."""
    recipe, run = reported("se_resnet18").recipe, RunOptions(out=Path("run"))
    config = {"format": CONFIG_FORMAT, "arch": "se_resnet18", "recipe_name": "se_resnet18"}
    config |= {"recipe": to_dict(recipe), "run": to_dict(run), "hardware": "CPU", "versions": {"torch": "2.11"}}
    row: dict[str, Any] = dict.fromkeys(METRIC_KEYS, 0.5) | {
        "data_name": "data",
        "eval_split": "test",
        "learning_rates": [0.1, 0.2],
    }
    confusion = [[1] * 10 for _ in range(10)]
    summary = {"final": {"images": 100, "top1": 0.1, "confusion": confusion}, "class_names": NAMES, "data": "data"}
    return {"config.json": config, "rows": [row | {"epoch": epoch} for epoch in (1, 2, 3)], "summary.json": summary}


def make_run_folder(rng: random.Random) -> Case:
    """A run's folder of which one file is changed; it is read as plots and a resume read it."""
    folder = dict(honest_folder())
    target = rng.choice(["nothing", "config.json", "config.json", "rows", "rows", "summary.json", "missing"])
    if target in folder:
        folder[target] = changed_json(rng, folder[target])
    rows = folder["rows"] if isinstance(folder["rows"], list) else [folder["rows"]]
    files = {
        "run/config.json": as_text(rng, folder["config.json"])
        if target == "config.json"
        else json.dumps(folder["config.json"]).encode(),
        "run/metrics.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows),
        "run/summary.json": as_text(rng, folder["summary.json"])
        if target == "summary.json"
        else json.dumps(folder["summary.json"]).encode(),
    }
    if target == "rows" and rng.random() < 0.3:
        files["run/metrics.jsonl"] = damaged(rng, files["run/metrics.jsonl"])
    if target == "missing":
        del files[rng.choice(list(files))]

    def read(path: Path) -> None:
        command = resumed(path / "run")
        run = read_run(RunFolder(path / "run"))
        assert [row["epoch"] for row in run.rows] == list(range(1, len(run.rows) + 1))
        assert target != "nothing" or (command.arch, len(run.rows)) == ("se_resnet18", 3)

    return Case(f"run folder: {target}", files, read)


def make_results_file(rng: random.Random) -> Case:
    """A results.json with changes; both reports are made of whatever is read."""
    kind = rng.choice(["honest", "values", "values", "values", "values"])
    values = asdict(honest_results())
    content = json.dumps(values).encode() if kind == "honest" else as_text(rng, changed_json(rng, values))

    def read(folder: Path) -> None:
        _, results = read_results(folder / "results.json")
        page = render(build_report(results), "report.md")
        assert "\x1b" not in page
        assert kind != "honest" or asdict(results) == values

    return Case(f"results: {kind}", {"results.json": content}, read)


@cache
def honest_results() -> Any:
    return make_results(seeds=1, epochs=2)


@cache
def honest_plan() -> plan.Record:
    """What is kept of a measured plan."""
    record = plan.record_of("torch", "measured", plan.Plan(kernels={"*": "torch", "augment": "numba"}, threads=1), CPU)
    return record | {"key": {"arch": "se_resnet18", "threads": 2}, "timings": [{"plan": "torch", "ms": 1.5}]}


def make_plan(rng: random.Random) -> Case:
    """A plan in a file or in the cache, honest or changed. A file is refused in a line; a cache is ignored with one."""
    record, kind = honest_plan(), rng.choice(["record", "plans", "config", "cache", "cache"])
    honest = rng.random() < 0.2
    key = plan._digest(record["key"])
    whole: dict[str, Any] = {
        "record": record,
        "plans": {"plans": {"se_resnet18": record, "resnet42": record}},
        "config": {"format": CONFIG_FORMAT, "run": {}, "plan": record},
        "cache": {"format": plan.FORMAT, "plans": {key: record, "another": None}},
    }
    content = json.dumps(whole[kind]).encode() if honest else as_text(rng, changed_json(rng, whole[kind]))

    def read(folder: Path) -> None:
        said: list[str] = []
        if kind == "cache":
            with patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
                found = plan.read_cached(record["key"], said.append)
            assert found is not None or said or not honest
        else:
            found = plan.read_plan(folder / "fastcifar/plans.json", "se_resnet18", CPU)
        if found is not None:
            run = plan.decided(RunOptions(), found, CPU).run
            assert not honest or (found == record and run.kernels == record["plan"]["kernels"])
        elif said:
            raise InputError(said[0])  # which the user is told in the same way

    return Case(f"plan: {kind}{' as it was' if honest else ''}", {"fastcifar/plans.json": content}, read)


TARGETS: dict[str, Callable[[random.Random], Case]] = {
    "checkpoint": make_checkpoint,
    "run_folder": make_run_folder,
    "plan": make_plan,
    "results": make_results_file,
}
