"""A seed enters, believable benchmark results leave: nine variants, a ladder, peers, an ablation, a failed cell."""

import math
import random
from dataclasses import replace
from typing import Any

from bench.schema import Ablation, Arm, Cell, Epoch, Ladder, Peer, Peers, Results, Rung, Variant

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
    "hardware": "AMD EPYC, 2 threads",
    "versions": {"fastcifar": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.4.6"},
    "commit": "37642600e98e",
    "command": "python bench/run.py --quick --out bench/results/cpu",
    "load": [0.4, 0.3, 0.2],
}
DATA: dict[str, Any] = {
    "name": "CIFAR-10 (JPEG round trip)",
    "official": False,
    "synthetic": False,
    "sha256": {"train": "ab" * 32, "test": "cd" * 32},
}


def make_results(*, seeds: int = 2, epochs: int = 12, images: int = 10_000, seed: int = 0, **changes: Any) -> Results:
    """Whole results; `changes` replace fields (`cells=[]`, `ladder=None`...)."""
    rng = random.Random(seed)
    variants = [
        Variant(arch, report, parameters, flops, 12_000_000, claim, roofline_images_per_second=1.6 * rate)
        for arch, (report, parameters, flops, rate, _, claim) in ARCHS.items()
    ]
    cells = [
        make_cell(arch, number, rate, top1, epochs=epochs, images=images, rng=rng)
        for arch, (_, _, _, rate, top1, _) in ARCHS.items()
        for number in range(seeds)
    ]
    levers = ["channels_last", "bf16"]
    cells.append(Cell("resnet42-seed9-failed", "resnet42", 9, levers, error="OutOfMemoryError: tried to allocate 2.00 GiB"))
    results = Results(
        environment=ENVIRONMENT, data=DATA, settings={"quick": True, "epochs": epochs, "seeds": list(range(seeds))},
        variants=variants, cells=cells, ladder=make_ladder(rng), peers=make_peers(rng), ablations=[make_ablation(rng)],
    )  # fmt: skip
    return replace(results, **changes)


def make_cell(
    arch: str, seed: int, rate: float, top1: float, *, epochs: int, images: int, rng: random.Random, **changes: Any
) -> Cell:
    """A finished cell whose accuracy rises towards `top1` and whose first epoch is slower."""
    rows = []
    end = top1 + rng.gauss(0, 0.004)
    for number in range(epochs):
        seconds = images / (rate * rng.gauss(1, 0.012)) + (4.0 if number == 0 else 0.0)
        share = 1 - math.exp(-(number + 1) / (0.3 * epochs))
        test = 0.1 + (end - 0.1) * share / (1 - math.exp(-1 / 0.3)) + rng.gauss(0, 0.006)
        rows.append(Epoch(seconds, images / rate / 18, 2.3 - 1.6 * share, test - 0.05, 2.3 - 1.5 * share, test))
    cell = Cell(
        f"{arch}-seed{seed}-channels_last+bf16", arch, seed, ["channels_last", "bf16"], rows, 256, images, 10_000,
        final_top1=rows[-1].test_top1, final_flip_top1=rows[-1].test_top1 + 0.006, best_top1=max(r.test_top1 for r in rows),
        first_step_seconds=4.6 + rng.random() / 5, compile_seconds=0.7, peak_memory=int(900e6 + 3e8 * rng.random()),
    )  # fmt: skip
    return replace(cell, **changes)


def make_ladder(rng: random.Random, rounds: int = 12) -> Ladder:
    """Six rungs; the last two show nothing and cannot run."""
    rungs = [
        ("eager fp32 NCHW, DataLoader", 131.0, "torchvision, 2 workers"), ("device-resident data", 138.0, ""),
        ("channels_last", 176.0, ""), ("bf16", 388.0, "autocast"), ("torch.compile", 387.0, "default settings"),
    ]  # fmt: skip
    drift = [rng.uniform(0.9, 1.05) for _ in range(rounds)]
    made = [Rung(name, [rate * d * rng.gauss(1, 0.015) for d in drift], note) for name, rate, note in rungs]
    return Ladder("se_resnet18", 256, [*made, Rung("whole step captured", [], "CUDA graph", "not applicable: needs a GPU")])


def make_peers(rng: random.Random, rounds: int = 12) -> Peers:
    """Ours, two peers, and one that crashed."""
    rates = [
        ("fastcifar", 385.0, ""),
        ("ordinary PyTorch loop", 128.0, "DataLoader, eager, fp32"),
        ("FFCV pipeline", 250.0, ""),
    ]
    drift = [rng.uniform(0.9, 1.05) for _ in range(rounds)]
    made = [Peer(name, [rate * d * rng.gauss(1, 0.02) for d in drift], note) for name, rate, note in rates]
    return Peers("se_resnet18", 256, [*made, Peer("airbench", [], "PATH", "ModuleNotFoundError: No module named 'airbench'")])


def make_ablation(rng: random.Random) -> Ablation:
    """Report D's five models over five seeds; one run of one arm failed."""
    arms = [("full recipe", 0.0), ("without mixup and cutout", 0.021), ("without colour jitter", -0.001),
            ("without grayscale", 0.004), ("without squeeze-excitation", -0.012)]  # fmt: skip
    level = [0.62 + rng.gauss(0, 0.004) for _ in range(5)]
    made = [Arm(name, {}, [base + gain + rng.gauss(0, 0.003) for base in level]) for name, gain in arms]
    made[3] = replace(made[3], top1=[*made[3].top1[:4], None])
    return Ablation("report D", "se_resnet18", 6, 10_000, [0, 1, 2, 3, 4], made)
