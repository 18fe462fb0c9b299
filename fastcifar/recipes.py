"""Every choice that changes accuracy, as plain data, and `RECIPES`, the table of the reports' trainings.

A row named like an architecture is the training that gave its report's figure, read from the authors' own notebook; a report
whose text describes another training has that as `NAME_text`. Any field can be overridden on the command line, and the comments
below are its help.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from tyro.conf import OmitArgPrefixes

from fastcifar.ahead import DATA
from fastcifar.augmentation import Augmentation
from fastcifar.compiling import CompileMode
from fastcifar.errors import InputError, require, unknown
from fastcifar.evaluate import ALIKE, TTA
from fastcifar.models.layers import Kernels, StochasticDepthMode, require_known
from fastcifar.optimization import Factors, LossReduction, OptimizerKind, Schedule
from fastcifar.phases import Phase, Phases

LoggerName = Literal["tensorboard", "wandb", "mlflow"]  # each also the module that it needs


@dataclass(frozen=True)
class Recipe:
    """What changes accuracy."""

    epochs: int = 200  # passes over the training set
    batch_size: int = 128  # images per optimizer step
    optimizer: OptimizerKind = "sgd"  # sgd and nesterov with momentum; adam; adamw, whose decay is decoupled; muon
    momentum: float = 0.9  # SGD's momentum, Adam's first beta, 0 to below 1
    weight_decay: float = 5e-4  # added to the gradient times the weight; adamw: subtracted, times the learning rate
    decay_norm_and_bias: bool = True  # also decay batch norm and biases, as the reports do
    # what is differentiated: the batch's mean loss, or its sum, with gradients batch_size times as large; the mean is reported
    loss_reduction: LossReduction = "mean"
    label_noise: float = 0.0  # share of the training labels replaced by another class's, drawn for each image, 0 to below 1
    label_smoothing: float = 0.0  # share of the target spread over all classes, 0 to below 1
    block_dropout: float = 0.0  # probability inside residual blocks, 0 to below 1
    head_dropout: float = 0.0  # probability before the classifier, 0 to below 1
    stochastic_depth: float = 0.0  # probability p of dropping the last block's branch; earlier ones are dropped less often
    # sample: drawn for each image, the kept rescaled, block l of L with p l / L; batch: drawn once, not rescaled, block i of n
    # in stage s of S with p s/S i/n (report C)
    stochastic_depth_mode: StochasticDepthMode = "sample"
    squeeze_excitation: bool = True  # where the architecture has it; off for ablations
    # how much smaller the stem makes an image: 1, 2 (its convolution steps by two) or 4 (max pooling follows); 0: by the
    # shorter side, 1 below 64 pixels, 2 from 64, 4 from 128 on
    stem_stride: int = 0
    ema_decay: float = 0.0  # per step, of averaged weights used in evaluation, 0 = off, e.g. 0.999
    # epoch of schedule_epochs from which evaluation uses the mean of the weights after every step since, 0 = off
    average_from: float = 0.0
    clip_gradient_norm: float = 0.0  # largest norm of all gradients together, 0 = off
    clip_gradient_value: float = 0.0  # largest magnitude of a gradient's element, 0 = off; before the norm is taken
    eval_tta: TTA = "none"  # test-time augmentation of the evaluations between epochs, on which best.pt is chosen
    centre_weight: float = ALIKE  # flip_translate: weight of the two views in place together, 0..1; 1/3: all six count alike
    held_out: float = 0.0  # share of the training images on which best.pt is chosen and which are not trained on, 0 to below 1
    # what images are divided by, R G B in 0..1, after CIFAR-10's mean is subtracted; None: CIFAR-10's own deviation. A report's
    # values hold for CIFAR-10's classes: other data is normalised by its own statistics unless you give others here.
    std: tuple[float, float, float] | None = None
    factors: OmitArgPrefixes[Factors] = field(default_factory=Factors)
    schedule: OmitArgPrefixes[Schedule] = field(default_factory=Schedule)
    phases: OmitArgPrefixes[Phases] = field(default_factory=Phases)
    augmentation: OmitArgPrefixes[Augmentation] = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        require(self, isinstance(self.epochs, int) and self.epochs >= 1, "epochs", "a whole number, at least 1")
        require(
            self, isinstance(self.batch_size, int) and self.batch_size >= 2, "batch_size", "at least 2 (batch norm needs two)"
        )
        require(
            self,
            self.optimizer in get_args(OptimizerKind),
            "optimizer",
            f"one of {', '.join(get_args(OptimizerKind))}",
        )
        for name in (
            "momentum",
            "label_noise",
            "label_smoothing",
            "block_dropout",
            "head_dropout",
            "stochastic_depth",
            "ema_decay",
            "held_out",
        ):
            require(self, 0 <= getattr(self, name) < 1, name, "0 to below 1")
        require(self, self.eval_tta in get_args(TTA), "eval_tta", f"one of {', '.join(get_args(TTA))}")
        require(self, 0 <= self.centre_weight <= 1, "centre_weight", "0..1")
        moves = self.eval_tta == "flip_translate"
        require(self, moves or self.centre_weight == ALIKE, "centre_weight", "left out unless eval_tta is flip_translate")
        reductions = get_args(LossReduction)
        require(self, self.loss_reduction in reductions, "loss_reduction", f"one of {', '.join(reductions)}")
        require(self, self.optimizer != "nesterov" or self.momentum > 0, "momentum", "above 0 for nesterov")
        require(self, self.weight_decay >= 0, "weight_decay", "0 or more")
        for name in ("clip_gradient_norm", "clip_gradient_value"):
            require(self, getattr(self, name) >= 0, name, "0 or more")
        require(self, self.stem_stride in (0, 1, 2, 4), "stem_stride", "0, 1, 2 or 4")
        modes = get_args(StochasticDepthMode)
        require(self, self.stochastic_depth_mode in modes, "stochastic_depth_mode", f"one of {', '.join(modes)}")
        require(self, self.std is None or all(0 < x < math.inf for x in self.std), "std", "above 0 in every channel")
        end = self.schedule.schedule_epochs
        require(self, 0 <= self.average_from < end, "average_from", f"0 to below schedule_epochs ({end})")
        require(self, not (self.average_from and self.ema_decay), "average_from", "0 beside an ema_decay")
        require(self.phases, self.phases.frozen_from <= end, "frozen_from", f"at most schedule_epochs ({end})")
        alone = self.factors.vector_momentum is None or self.schedule.min_momentum is None
        require(self.factors, alone, "vector_momentum", "left out beside min_momentum")
        require(self.phases, all(x < end for x in self.phases.size_epochs), "size_epochs", f"below schedule_epochs ({end})")

    def phase(self, epoch: int) -> Phase:
        """The phase of epoch `epoch` (from 0)."""
        return self.phases.at(epoch, self.epochs / self.schedule.schedule_epochs)


@dataclass(frozen=True)
class RunOptions:
    """What does not change accuracy: where things are and how they run. (Precision and seed change the last digits.)"""

    data: Path = DATA  # folder with train.beton and test.beton
    out: Path | None = None  # run folder to make; default: runs/ARCH-seedN
    seed: int = 0  # of weights, order, augmentation, dropout, label noise and held-out images, 0..2^63-1
    init_seed: int | None = None  # of the first weights; default: seed
    order_seed: int | None = None  # of each epoch's order of the images; default: seed
    augmentation_seed: int | None = None  # of augmentation and mixing; default: seed
    resume: Path | None = None  # run folder of an interrupted run: go on exactly where it stood
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 autocast where the device computes in it
    # how a step runs, where the five options below leave it open. auto: what was or is measured fastest on this machine, where
    # the run is long enough to pay for it; default: CUDA compiles, a CPU does not; a name, as compiled or triton; or a file: a
    # plan that fastcifar.tune wrote, or the config.json of a run. docs/plans.md
    plan: str = "auto"
    plan_seconds: float | None = None  # longest time to measure plans in; default: 5 % of what the run may take, at most 60
    # auto: the plan's (its default: Numba's passes on a CPU, PyTorch's operations on CUDA); torch: PyTorch's operations; numba:
    # our passes, on a CPU; triton: our fused kernels, with CUDA; fusable: the kernels' formulas as operations for --compile to
    # fuse; or a form for each kind of operation: augment, squeeze_excite, residual_tail/shortcut+se+mish and its like, '*' for
    # the rest
    kernels: Kernels = "auto"
    compile: Annotated[bool | None, tyro.conf.arg(metavar="or --no-compile")] = None  # torch.compile the step; None: the plan's
    # of --compile; tuned: fuse longer chains and recompute more, which moves fewer bytes on some networks and more on others;
    # combo: kernels that do not wait for one another share a launch. docs/step-cost.md has what each does to each network
    compile_mode: CompileMode | None = None
    capture: Literal["auto", "off"] = "auto"  # auto: CUDA replays the whole step as one graph where the recipe allows it
    threads: int = 0  # of a CPU; 0: the plan's, which by default is PyTorch's number or OMP_NUM_THREADS
    deterministic: bool = True  # only algorithms that give the same bits every time
    train_indices: Path | None = None  # .npy or text file with the numbers in their source (from 0) of the images to train on
    limit_train: int = 0  # use only the first so many training images, 0 = all
    limit_test: int = 0  # use only the first so many test images, 0 = all
    sync_bn: bool = False  # torchrun: batch norm by the whole batch, not each process's part; uncompiled, its own operations
    stream: bool = False  # leave the training images on the disk: for sets larger than the memory; the same pixels
    val_fraction: float = 0.0  # share of the training set held out to choose best.pt; 0: as the recipe says (held_out)
    stop_after: int = 0  # train only the first so many epochs of the whole schedule, 0 = all; --resume goes on
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    eval_batch_size: int = 500  # images per evaluation batch
    max_parameters: int = 5_000_000  # refuse larger models; 0 = no limit
    # after each evaluation: loss and margin of every training image, as it is, in the run folder's margins/epoch-NNNN.npy
    record_margins: bool = False
    skip_nonfinite: bool = False  # leave out and count updates whose loss or gradients are not finite; off: stop
    profile: int = 0  # steps to trace, from the fourth on, into the run folder's trace.json, with a table by stage; 0 = off
    verify: bool = True  # check the data's sha256 before training
    plots: bool = True  # draw the PNGs at the end
    # what else shows each epoch's figures; wandb and mlflow need the extra `loggers`; nothing after it: none. docs/guide.md
    log: tuple[LoggerName, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        for name in ("seed", "init_seed", "order_seed", "augmentation_seed"):
            require(self, 0 <= (getattr(self, name) or 0) < 2**63, name, "0..2^63-1")
        require(self, not (self.train_indices and self.limit_train), "limit_train", "0 beside --train-indices")
        for name in ("limit_train", "limit_test", "max_parameters", "stop_after", "profile", "threads"):
            require(self, getattr(self, name) >= 0, name, "0 or more")
        require(self, 0 <= self.val_fraction < 1, "val_fraction", "0 to below 1")
        require_known(self.kernels)
        forms = self.kernels.values() if isinstance(self.kernels, dict) else [self.kernels]
        compiles = torch.cuda.is_available() if self.compile is None else self.compile
        require(self, compiles or self.compile_mode in (None, "default"), "compile_mode", "default without --compile")
        require(self, not (self.sync_bn and self.compile), "compile", "off with --sync-bn")
        require(self, compiles or "fusable" not in forms, "kernels", "auto, torch or triton without --compile")
        require(self, self.plan_seconds is None or self.plan_seconds >= 0, "plan_seconds", "0 or more")
        for name in ("eval_every", "eval_batch_size"):
            require(self, getattr(self, name) >= 1, name, "at least 1")

    def seed_of(self, what: Literal["init", "order", "augmentation"]) -> int:
        """The seed of one part of the run's randomness."""
        own: int | None = getattr(self, f"{what}_seed")
        return self.seed if own is None else own


PLANNED = ("compile", "compile_mode", "kernels", "capture", "threads")  # the options that a plan has


def given(run: RunOptions) -> dict[str, Any]:
    """What a run says itself of the options that a plan has; the others it leaves open."""
    return {name: getattr(run, name) for name in PLANNED if getattr(run, name) != getattr(RunOptions, name)}


@dataclass(frozen=True)
class Reported:
    """A recipe with its source and what that source claims."""

    source: str
    claim: str  # "" where the source claims no figure for it
    recipe: Recipe


# Standard deviations that images are divided by, as the reports' notebooks have them; all subtract the same mean.
_STD_A = (0.247, 0.243, 0.261)
_STD_B = (0.2023, 0.1994, 0.2010)
_STD_C = (0.2470, 0.2435, 0.2616)
_STD_D = (0.35, 0.35, 0.35)

_SOURCE_A = "report A (NYU 2025, 'Enhancing CIFAR-10 Performance With Modified ResNet')"
_SOURCE_C = "report C (NYU 2024, 'Deep Learning - Project 1')"
_SOURCE_E = "report E (NYU, 'Parameter-Efficient Modified ResNet Architecture')"

# Where the published log of report A's run falls is where its rate fell: after epochs 90 and 180. The text says otherwise.
_RECIPE_A = Recipe(
    epochs=200,
    batch_size=128,
    weight_decay=3e-4,
    block_dropout=0.17,
    std=_STD_A,
    schedule=Schedule(
        "multi_step", schedule_step="epoch", schedule_epochs=200, peak_lr=0.09, milestones=(90, 180), lr_factor=0.1
    ),
)


def _recipe_c(**changes: Any) -> Recipe:
    """Report C's training: every batch mixed, by MixUp or CutMix with equal chances; cosine without warm-up."""
    recipe = Recipe(
        epochs=300,
        batch_size=128,
        optimizer="nesterov",
        weight_decay=5e-4,
        label_smoothing=0.1,
        std=_STD_C,
        schedule=Schedule("cosine", schedule_step="epoch", schedule_epochs=300, peak_lr=0.1),
        augmentation=Augmentation(mixup_alpha=1.0, cutmix_alpha=1.0, policy="rand_augment"),
    )
    return replace(recipe, **changes)


_DROP_C: dict[str, Any] = {"stochastic_depth": 0.1, "stochastic_depth_mode": "batch"}

# Report E's text: no augmentation but the crop; the notebook's loader of that batch size flips too and has this deviation.
_TEXT_E = Recipe(
    epochs=200,
    batch_size=512,
    weight_decay=1e-3,
    label_smoothing=0.1,
    head_dropout=0.5,
    std=_STD_B,
    schedule=Schedule("cosine", schedule_step="epoch", schedule_epochs=200, peak_lr=0.05),
)

# airbench94_muon's training, whose rates are for the sum of a batch's losses; but biases and head have the filters' momentum
# (there 0.85), and the bias of the stem stops at its rate then (there 0).
_MUON_LR = 0.24
_AIRBENCH = Recipe(
    epochs=8,
    batch_size=2000,
    optimizer="muon",
    momentum=0.6,
    weight_decay=0.004 / _MUON_LR,
    loss_reduction="sum",
    label_smoothing=0.2,
    std=_STD_C,
    factors=Factors(head_lr_factor=0.67 / _MUON_LR, vector_lr_factor=0.053 / _MUON_LR, scale_decay=True),
    schedule=Schedule("linear", schedule_epochs=8, peak_lr=_MUON_LR),
    phases=Phases(frozen=("stem.0.bias",), frozen_from=3),
    augmentation=Augmentation(crop_padding=2, crop_mode="reflect", flip="alternating"),
)


def _growing(epochs: int, small: int) -> Recipe:
    """What came of the trials in docs/speedrun.md: smaller batches, and images of 24 pixels in the first `small` epochs."""
    return replace(
        _AIRBENCH,
        epochs=epochs,
        batch_size=1000,
        weight_decay=0.002 / _MUON_LR,
        schedule=replace(_AIRBENCH.schedule, schedule_epochs=epochs),
        phases=replace(_AIRBENCH.phases, sizes=(24, 32), size_epochs=(small,)),
    )


RECIPES: dict[str, Reported] = {
    "dropout_resnet24": Reported(
        f"{_SOURCE_A}, its notebook", "94.47 % test at the last epoch, 94.61 % best; 84.161 % Kaggle", _RECIPE_A
    ),
    "dropout_resnet24_text": Reported(
        f"{_SOURCE_A}, its text, whose rate falls after epochs 80, 120, 150 and 180",
        "",
        replace(_RECIPE_A, schedule=replace(_RECIPE_A.schedule, milestones=(80, 120, 150, 180))),
    ),
    "resnet42": Reported(
        source="report B (NYU 2023, 'Running Modified ResNet Model on CIFAR-10 Dataset'), its notebook",
        claim="93.08 % test; 91.4 % on 5,000 held-out images",
        recipe=Recipe(
            epochs=150,
            batch_size=400,
            optimizer="adam",
            momentum=0.95,
            weight_decay=1e-4,
            head_dropout=0.2,
            clip_gradient_value=0.1,
            held_out=0.1,
            std=_STD_B,
            # PyTorch's OneCycleLR: 30 % of the steps rise from 1/25 of the peak, the rest fall to 1/250,000 of it.
            schedule=Schedule(
                "one_cycle",
                schedule_epochs=150,
                peak_lr=1e-2,
                initial_lr=4e-4,
                final_lr=4e-8,
                warmup_epochs=45,
                min_momentum=0.85,
            ),
            augmentation=Augmentation(crop_mode="reflect"),
        ),
    ),
    "light_resnet18": Reported(
        f"{_SOURCE_C}, its notebook",
        "93.12 % in the report; 94.98 % at the last epoch of its notebook's log, 95.12 % best, on 5,000 held-out images",
        _recipe_c(**_DROP_C, held_out=0.1),
    ),
    "light_resnet18_v2_40": Reported(
        f"{_SOURCE_C}, its notebook",
        "94.35 % in the report; 95.75 % test at the last epoch of its notebook's log, 96.11 % best",
        _recipe_c(**_DROP_C),
    ),
    "light_resnet18_v2_45": Reported(
        f"{_SOURCE_C}, its notebook",
        "94.88 % in the report",
        _recipe_c(
            **_DROP_C,
            augmentation=Augmentation(
                mixup_alpha=1.0,
                cutmix_alpha=1.0,
                policy="auto_augment",
                random_erasing=0.5,
                erasing_area_max=0.1,
                erasing_value="noise",
            ),
        ),
    ),
    "robust_resnet64": Reported(
        f"{_SOURCE_C}, its notebook",
        "96.93 % test best, 96.86 % at the last epoch, without test-time augmentation; 87.7 % Kaggle with horizontal flip",
        _recipe_c(block_dropout=0.1),
    ),
    "se_resnet18": Reported(
        source="report D (NYU 2025, 'ResNet-Based Image Classification for CIFAR-10'), its notebook",
        claim="95.41 % test at the last epoch, 95.63 % best; 85.574 % Kaggle",
        recipe=Recipe(
            epochs=250,
            batch_size=128,
            weight_decay=5e-4,
            label_smoothing=0.08,
            head_dropout=0.2,
            std=_STD_D,
            schedule=Schedule(
                "warmup_cosine", schedule_step="epoch", schedule_epochs=250, peak_lr=0.1, final_lr=0.001, warmup_epochs=15
            ),
            augmentation=Augmentation(
                brightness=0.2,
                contrast=0.2,
                saturation=0.2,
                hue=0.05,
                jitter_before_crop=True,
                cutout=16,
                mixup_alpha=0.4,
                mixup_alpha_end=0.0,
                mixup_alpha_floor=0.1,
            ),
        ),
    ),
    "mish_se_resnet18": Reported(
        source=f"{_SOURCE_E}, its notebook",
        claim="93 % test, 82.417 % Kaggle in the report; 90.77 % test in its notebook's log",
        recipe=replace(
            _TEXT_E,
            epochs=100,
            batch_size=256,
            std=_STD_C,
            schedule=Schedule(
                "cosine_restarts", schedule_step="epoch", schedule_epochs=100, peak_lr=0.05, restart_epochs=10, restart_growth=2
            ),
            augmentation=Augmentation(policy="auto_augment_imagenet", random_erasing=0.5, erasing_value="black"),
        ),
    ),
    "mish_se_resnet18_text": Reported(f"{_SOURCE_E}, its text", "93 % test, 82.417 % Kaggle", _TEXT_E),
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
    "speed94_half": Reported("this project's own", "", _growing(7, small=4)),  # three minutes on two CPU cores
    "speed94": Reported("this project's own", "", _growing(9, small=6)),  # 0.76 of airbench94_muon's arithmetic
    "speed95": Reported("this project's own", "", _growing(15, small=10)),  # 0.68 of airbench95's arithmetic
    "speed96": Reported("this project's own, not tried yet", "", replace(_AIRBENCH, epochs=38)),
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
        kinds: dict[str, type[Any]] = {"schedule": Schedule, "augmentation": Augmentation, "factors": Factors, "phases": Phases}
        values = {"factors": {}, "phases": {}} | values  # which older runs have not
        parts = {name: kind(**_tuples(values[name])) for name, kind in kinds.items()}
        return Recipe(**(_tuples(values) | parts))
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"not a recipe of this version ({error}): train again") from None


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def run_options_from_dict(values: dict[str, Any]) -> RunOptions:
    """The inverse of `to_dict` for run options. Raises InputError when fields are unknown or out of range."""
    paths = {key: Path(values[key]) for key in ("data", "out", "resume", "train_indices") if values.get(key) is not None}
    unknown_fields = set(values) - {entry.name for entry in fields(RunOptions)}
    if unknown_fields:
        raise InputError(f"not run options of this version ({', '.join(sorted(unknown_fields))}): train again")
    return RunOptions(**{**_tuples(values), **paths})
