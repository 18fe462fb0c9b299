"""The name of an architecture enters, its report's recipe leaves: every choice that changes accuracy, as plain data.

`RECIPES` is the one table; each row says which report it is from and what that report claims. "Not stated" marks our choices.
Any field can be overridden on the command line, and the comments below are its help.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tyro.conf import OmitArgPrefixes

from fastcifar import optimizers
from fastcifar.augmentation import Augmentation
from fastcifar.errors import InputError, require, unknown
from fastcifar.schedules import Schedule


@dataclass(frozen=True)
class Recipe:
    """What changes accuracy."""

    epochs: int = 200  # passes over the training set
    batch_size: int = 128  # images per optimizer step
    optimizer: optimizers.Kind = "sgd"  # sgd and nesterov with momentum; adamw with decoupled decay
    momentum: float = 0.9  # SGD's momentum, AdamW's first beta, 0 to below 1
    weight_decay: float = 5e-4  # per step, times the learning rate
    decay_norm_and_bias: bool = True  # also decay batch norm and biases, as the reports do
    label_smoothing: float = 0.0  # share of the target spread over all classes, 0 to below 1
    block_dropout: float = 0.0  # probability inside residual blocks, 0 to below 1
    head_dropout: float = 0.0  # probability before the classifier, 0 to below 1
    stochastic_depth: float = 0.0  # probability p of dropping the last block's branch; block l of L drops with p l / L
    squeeze_excitation: bool = True  # where the architecture has it; off for ablations
    ema_decay: float = 0.0  # per step, of averaged weights used in evaluation, 0 = off, e.g. 0.999
    clip_gradient_norm: float = 0.0  # largest norm of all gradients together, 0 = off
    schedule: OmitArgPrefixes[Schedule] = field(default_factory=Schedule)
    augmentation: OmitArgPrefixes[Augmentation] = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        require(self, isinstance(self.epochs, int) and self.epochs >= 1, "epochs", "a whole number, at least 1")
        require(
            self, isinstance(self.batch_size, int) and self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two)"
        )
        require(
            self,
            self.optimizer in get_args(optimizers.Kind),
            "optimizer",
            f"one of {', '.join(get_args(optimizers.Kind))}",
        )
        for name in ("momentum", "label_smoothing", "block_dropout", "head_dropout", "stochastic_depth", "ema_decay"):
            require(self, 0 <= getattr(self, name) < 1, name, "0 to below 1")
        require(self, self.optimizer != "nesterov" or self.momentum > 0, "momentum", "above 0 for nesterov")
        require(self, self.weight_decay >= 0, "weight_decay", "0 or more")
        require(self, self.clip_gradient_norm >= 0, "clip_gradient_norm", "0 or more")


@dataclass(frozen=True)
class RunOptions:
    """What does not change accuracy: where things are and how they run. (Precision and seed change the last digits.)"""

    data: Path = Path("data/beton")  # folder with train.beton and test.beton
    out: Path | None = None  # run folder to make; default: runs/ARCH-seedN
    seed: int = 0  # of weights, order, augmentation and dropout, 0..2^63-1
    resume: Path | None = None  # run folder of an interrupted run: go on exactly where it stood
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    kernels: Literal["auto", "triton", "torch"] = "auto"  # auto: what is measured fastest on this device (a CPU: Numba)
    compile: bool = field(default_factory=torch.cuda.is_available)  # torch.compile the step; on by default with CUDA
    deterministic: bool = True  # only algorithms that give the same bits every time
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all
    stream: bool = False  # leave the training images on the disk: for sets larger than the memory; the same pixels
    val_fraction: float = (
        0.0  # share of the training set held out to choose best.pt; 0: choose on the test set, as the reports do
    )
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    eval_batch_size: int = 500  # images per evaluation batch
    max_parameters: int = 5_000_000  # refuse larger models; 0 = no limit
    verify: bool = True  # check the data's sha256 before training
    plots: bool = True  # draw the PNGs at the end

    def __post_init__(self) -> None:
        require(self, 0 <= self.seed < 2**63, "seed", "0..2^63-1")
        for name in ("limit_train", "limit_test", "max_parameters"):
            require(self, getattr(self, name) >= 0, name, "0 or more")
        require(self, 0 <= self.val_fraction < 1, "val_fraction", "0 to below 1")
        for name in ("eval_every", "eval_batch_size"):
            require(self, getattr(self, name) >= 1, name, "at least 1")


@dataclass(frozen=True)
class Reported:
    """A recipe with its source and what that source claims."""

    source: str
    claim: str
    recipe: Recipe


_SOURCE_C = "report C (NYU 2024, 'Deep Learning - Project 1')"

# Report C: Nesterov SGD, warm-up (5 epochs: not stated) then cosine to 0, MixUp or CutMix on half the batches (alpha 1, equally
# likely: not stated). Strengths of jitter, rotation, erasing and RandAugment are not stated: torchvision's customary ones.
_AUGMENTATION_C = Augmentation(
    mixup_alpha=1.0,
    cutmix_alpha=1.0,
    mix_probability=0.5,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.05,
    rotation=15.0,
    policy="rand_augment",
    random_erasing=0.25,
)


def _recipe_c(*, block_dropout: float = 0.0, stochastic_depth: float = 0.0) -> Recipe:
    return Recipe(
        epochs=300,
        optimizer="nesterov",
        weight_decay=5e-4,
        label_smoothing=0.1,
        block_dropout=block_dropout,
        stochastic_depth=stochastic_depth,
        schedule=Schedule("warmup_cosine", schedule_epochs=300, peak_lr=0.1, warmup_epochs=5),
        augmentation=_AUGMENTATION_C,
    )


RECIPES: dict[str, Reported] = {
    "dropout_resnet24": Reported(
        source="report A (NYU 2025, 'Enhancing CIFAR-10 Performance With Modified ResNet')",
        claim="94.47 % validation, 84.161 % Kaggle",
        recipe=Recipe(
            epochs=200,
            batch_size=128,  # not stated
            weight_decay=3e-4,
            block_dropout=0.1,  # not stated
            schedule=Schedule("multi_step", schedule_epochs=200, peak_lr=0.09, milestones=(80, 120, 150, 180), lr_factor=0.1),
        ),
    ),
    "resnet42": Reported(
        source="report B (NYU 2023, 'Running Modified ResNet Model on CIFAR-10 Dataset')",
        claim="93.08 % test",
        recipe=Recipe(
            epochs=150,
            batch_size=128,  # not stated
            optimizer="adamw",  # the report says Adam with weight decay
            weight_decay=1e-4,
            head_dropout=0.1,  # not stated
            # Shape: PyTorch's defaults (30 % rise from 1/25, fall to 1/250,000) with a constant beta; the report names none.
            schedule=Schedule("one_cycle", schedule_epochs=150, peak_lr=1e-2, initial_lr=4e-4, final_lr=4e-8, warmup_epochs=45),
        ),
    ),
    "light_resnet18": Reported(_SOURCE_C, "93.12 % validation", _recipe_c(stochastic_depth=0.1)),
    "light_resnet18_v2_40": Reported(_SOURCE_C, "94.35 % validation", _recipe_c(stochastic_depth=0.1)),
    "light_resnet18_v2_45": Reported(_SOURCE_C, "94.88 % validation", _recipe_c(stochastic_depth=0.1)),
    "robust_resnet64": Reported(_SOURCE_C, "96.93 % validation with flip TTA, 87.7 % Kaggle", _recipe_c(block_dropout=0.1)),
    "se_resnet18": Reported(
        source="report D (NYU 2025, 'ResNet-Based Image Classification for CIFAR-10')",
        claim="85.574 % Kaggle",
        recipe=Recipe(
            epochs=250,
            weight_decay=5e-4,
            label_smoothing=0.08,
            head_dropout=0.2,
            schedule=Schedule("warmup_cosine", schedule_epochs=250, peak_lr=0.1, final_lr=0.001, warmup_epochs=15),
            augmentation=Augmentation(
                cutout=16, mixup_alpha=0.4, mixup_alpha_end=0.1, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05
            ),
        ),
    ),
    "mish_se_resnet18": Reported(
        source="report E (NYU, 'Parameter-Efficient Modified ResNet Architecture')",
        claim="93 % test, 82.417 % Kaggle",
        recipe=Recipe(
            epochs=200,
            batch_size=512,
            weight_decay=1e-3,
            label_smoothing=0.1,
            head_dropout=0.5,
            schedule=Schedule("cosine", schedule_epochs=200, peak_lr=0.05),
        ),
    ),
    "resnet18": Reported(
        source="the field's baseline (not one of the reports)",
        claim="95-96 % test",
        recipe=Recipe(
            epochs=200,
            optimizer="nesterov",
            weight_decay=5e-4,
            schedule=Schedule("cosine", schedule_epochs=200, peak_lr=0.1),
        ),
    ),
}


def reported(name: str) -> Reported:
    """Return a row by name. Raises InputError with the nearest name when there is none."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def to_dict(settings: Recipe | RunOptions) -> dict[str, Any]:
    """Plain JSON values; paths become strings."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """The inverse of `to_dict` for a recipe. Raises InputError when fields are unknown or out of range."""
    try:
        schedule = Schedule(**{**values["schedule"], "milestones": tuple(values["schedule"]["milestones"])})
        return Recipe(**{**values, "schedule": schedule, "augmentation": Augmentation(**values["augmentation"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"not a recipe of this version ({error}): train again") from None


def run_options_from_dict(values: dict[str, Any]) -> RunOptions:
    """The inverse of `to_dict` for run options. Raises InputError when fields are unknown or out of range."""
    paths = {key: Path(values[key]) for key in ("data", "out", "resume") if values.get(key) is not None}
    unknown_fields = set(values) - {entry.name for entry in fields(RunOptions)}
    if unknown_fields:
        raise InputError(f"not run options of this version ({', '.join(sorted(unknown_fields))}): train again")
    return RunOptions(**{**values, **paths})
