"""Believable benchmark results drawn from a seed: nine variants, optimizations, baselines, an ablation, a failed run."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.results import Ablation, Arm, Comparison, Results, Run, Timing, Variant
from fastcifar.command import Command
from fastcifar.run_folder import METRIC_KEYS, RunFolder

# arch: report, parameters, flops (forward and backward), images per second, accuracy it ends at, claim
ARCHS: dict[str, tuple[str, int, int, float, float, str]] = {
    "dropout_resnet24": ("A", 1_177_130, 470_000_000, 640, 0.640, "94.47 % validation, 84.161 % Kaggle"),
    "resnet42": ("B", 4_907_445, 1_299_000_000, 265, 0.596, "93.08 % test"),
    "light_resnet18": ("C", 2_810_154, 834_000_000, 395, 0.655, "93.12 % validation"),
    "light_resnet18_v2_40": ("C", 4_389_170, 1_300_000_000, 310, 0.662, "94.35 % validation"),
    "light_resnet18_v2_45": ("C", 4_999_535, 1_480_000_000, 248, 0.668, "94.88 % validation"),
    "robust_resnet64": ("C", 3_799_978, 3_351_000_000, 88, 0.570, "96.93 % validation with flip TTA, 87.7 % Kaggle"),
    "se_resnet18": ("D", 2_818_090, 834_000_000, 388, 0.706, "85.574 % Kaggle"),
    "mish_se_resnet18": ("E", 4_569_642, 1_407_000_000, 240, 0.689, "93 % test, 82.417 % Kaggle"),
    "resnet18": ("-", 11_173_962, 3_329_000_000, 131, 0.725, "95-96 % test"),
}
ENVIRONMENT: dict[str, Any] = {
    "hardware": "AMD EPYC (Zen 4, family 25 model 17), 2 threads",
    "versions": {"fastcifar": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.4.6"},
    "commit": "37642600e98e",
    "command": "python bench/run.py --quick --out bench/results/cpu",
    "cores": 2,
    "load": {"at the start": 0.4, "before the speeds": 0.5},
}
DATA: dict[str, Any] = {
    "name": "CIFAR-10 (JPEG round trip)",
    "official": False,
    "synthetic": False,
    "sha256": {"train": "ab" * 32, "test": "cd" * 32},
}


def make_results(*, seeds: int = 2, epochs: int = 12, images: int = 10_000, seed: int = 0, **changes: Any) -> Results:
    """Whole results; `changes` replace fields (`runs=[]`, `baselines=None`...)."""
    rng = random.Random(seed)
    variants = [
        Variant(arch, report, parameters, flops, claim, roofline_images_per_second=1.6 * rate)
        for arch, (report, parameters, flops, rate, _, claim) in ARCHS.items()
    ]
    runs = [
        make_run(arch, number, rate, top1, epochs=epochs, images=images, rng=rng)
        for arch, (_, _, _, rate, top1, _) in ARCHS.items()
        for number in range(seeds)
    ]
    runs.append(Run("resnet42-seed9", error="OutOfMemoryError: tried to allocate 2.00 GiB"))
    ablation, arms = make_ablation(rng)
    results = Results(
        environment=ENVIRONMENT, data=DATA, settings={"quick": True, "epochs": epochs, "seeds": list(range(seeds))},
        variants=variants, runs=[*runs, *arms], ablations=[ablation],
        speeds=in_turns({arch: row[3] for arch, row in ARCHS.items()}, rng, images=512, rounds=12),
        optimizations=in_turns(
            {"eager fp32 NCHW": 131.0, "resident data": 138.0, "channels_last": 176.0, "bf16": 388.0, "torch.compile": 387.0},
            rng, Timing("captured", "whole step captured", error="not applicable: needs a GPU"), arch="se_resnet18",
        ),
        baselines=in_turns(
            {"fastcifar": 385.0, "ordinary loop": 128.0, "FFCV": 250.0}, rng,
            Timing("airbench", "airbench", error="ModuleNotFoundError: No module named 'airbench'", in_turns=False),
            Timing("script", "script", "its own clock", [50.0], in_turns=False), arch="se_resnet18",
        ),
    )  # fmt: skip
    return replace(results, **changes)


def make_run(
    arch: str, seed: int, rate: float, top1: float, *, epochs: int, images: int, rng: random.Random, **changes: Any
) -> Run:
    """A finished run whose accuracy rises towards `top1` and whose first epoch is slower."""
    end = top1 + rng.gauss(0, 0.004)
    shares = [(1 - math.exp(-(n + 1) / (0.3 * epochs))) / (1 - math.exp(-1 / 0.3)) for n in range(epochs)]
    tops = [round(0.1 + (end - 0.1) * share + rng.gauss(0, 0.006), 4) for share in shares]
    run = Run(
        f"{arch}-seed{seed}", arch, seed, 256, images, 10_000,
        [images / (rate * rng.gauss(1, 0.012)) + (4.0 if n == 0 else 0.0) for n in range(epochs)],
        [images / rate / 18] * epochs, tops, top1=tops[-1], flip_top1=tops[-1] + 0.006, best_top1=max(tops),
        first_step_seconds=4.6 + rng.random() / 5, compile_seconds=0.7, peak_memory_bytes=int(900e6 + 3e8 * rng.random()),
    )  # fmt: skip
    return replace(run, **changes)


def in_turns(rates: dict[str, float], rng: random.Random, *others: Timing, rounds: int = 12, **settings: Any) -> Comparison:
    """Timings under a drift that all share; `others` as they are."""
    drift = [rng.uniform(0.9, 1.05) for _ in range(rounds)]
    made = [Timing(name, name, "", [rate * d * rng.gauss(1, 0.015) for d in drift]) for name, rate in rates.items()]
    return Comparison(settings | {"rounds": rounds}, [*made, *others])


def make_ablation(rng: random.Random) -> tuple[Ablation, list[Run]]:
    """Report D's five models over five seeds; one run of one arm failed."""
    arms = [("full recipe", "", 0.0), ("without mixup and cutout", "--mixup-alpha 0 --cutout 0", 0.021),
            ("without colour jitter", "--brightness 0", -0.001), ("without grayscale", "--grayscale 0", 0.004),
            ("without squeeze-excitation", "--no-squeeze-excitation", -0.012)]  # fmt: skip
    bases = [0.62 + rng.gauss(0, 0.004) for _ in range(5)]
    made, runs = [], []
    for number, (name, flags, gain) in enumerate(arms):
        names = [f"report_d/{number}-seed{seed}" for seed in range(5)]
        made.append(Arm(name, flags, runs=names))
        for seed, (path, base) in enumerate(zip(names, bases, strict=True)):
            top1 = base + gain + rng.gauss(0, 0.003)
            run = make_run("se_resnet18", seed, 388, top1, epochs=6, images=10_000, rng=rng, name=path)
            run = replace(run, top1=top1, epoch_top1=[*run.epoch_top1[:-1], top1])
            runs.append(Run(path, error="killed") if (number, seed) == (3, 4) else run)
    return Ablation("report_d", "Report D: five models", "se_resnet18", 6, [0, 1, 2, 3, 4], made), runs


def write_run(
    path: Path,
    command: Command,
    losses: list[float],
    facts: dict[str, Any],
    accuracy: float | None = 0.25,
    summary: bool = True,
) -> None:
    """A made-up run folder as training leaves it, an epoch of a second for each of `losses`."""
    folder, blank = RunFolder(path), dict.fromkeys(METRIC_KEYS)
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "config.json").exists():
        folder.write_config(command.arch, command.recipe_name, command.settings, command.run, facts)
    known = {"data_name": "my JPEGs", "eval_accuracy": accuracy, "eval_seconds": 0.1, "eval_split": "test"}
    known |= {"train_seconds": 1.0, "images_per_second": 64.0, "first_step_seconds": 3.0, "train_accuracy": 0.2}
    known |= {"learning_rates": [0.1]}
    folder.write_metrics([blank | known | {"epoch": at, "train_loss": loss} for at, loss in enumerate(losses, start=1)])
    if summary:
        manifests = [command.run.data / f"{split}.json" for split in ("train", "test")]
        folder.write_summary({
            "final": {"images": 20, "top1": accuracy or 0.25, "confusion": [[5, 15], [0, 0]]}, "class_names": ["a", "b"],
            "final_flip_tta_top1": 0.3, "best_accuracy": 0.25, "first_step_seconds": 3.0,
            "compile_seconds": 1.5, "peak_memory_bytes": 10**9, "energy_joules": None, "train_images": 50_000,
            "data_sha256": [json.loads(path.read_text())["sha256"] for path in manifests if path.exists()],
        })  # fmt: skip
