"""What training moves: weights, average, optimizer, epoch, best so far; how it is built, saved and restored."""

import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcifar.capture import cuda_graph
from fastcifar.checkpoint import Checkpoint, load_checkpoint, require_fits
from fastcifar.dataset import ResidentSet, Splits
from fastcifar.device import choose_precision, generator_states
from fastcifar.distributed import ALONE, World
from fastcifar.epoch_tables import EpochTally
from fastcifar.errors import InputError
from fastcifar.evaluate import TTA, Evaluation, Evaluator
from fastcifar.models import (
    architecture,
    build_model,
    count_parameters,
    place,
    require_budget,
    require_size,
    suited_stride,
    whitening,
)
from fastcifar.models.layers import synchronise
from fastcifar.models.resnet import PixelClassifier, ResNet
from fastcifar.optimization import build_optimizer, load_optimizer
from fastcifar.phases import freezable
from fastcifar.plan import settled
from fastcifar.recipes import Recipe, RunOptions
from fastcifar.run_folder import Metrics, RunFolder
from fastcifar.step import AveragedModel, StepSettings, TrainStep


@dataclass
class EpochState:
    """How far an epoch has come."""

    tally: EpochTally
    step: int = 0  # steps done
    seconds: float = 0.0  # spent on it by earlier processes
    generators: dict[str, Tensor] = field(default_factory=dict)  # PyTorch's, after the last step; empty: seed them

    @classmethod
    def begin(cls, steps: int, device: torch.device) -> "EpochState":
        """An epoch of `steps` steps, none of them done."""
        return cls(EpochTally.begin(steps, device))

    @property
    def steps(self) -> int:
        return len(self.tally.losses)

    def save(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "step": self.step,
            "losses": self.tally.losses.cpu(),
            "hits": self.tally.hits.cpu(),
            "seconds": self.seconds,
            "generators": self.generators,
        }

    @classmethod
    def load(cls, values: dict[str, Any], steps: int, device: torch.device) -> "EpochState":
        """The inverse of `save` for an epoch of `steps` steps. Raises KeyError, TypeError, ValueError or AttributeError."""
        losses, hits = values["losses"].to(device, torch.float32), values["hits"].to(device, torch.float64)
        step, seconds = int(values["step"]), float(values["seconds"])
        generators = {name: state.cpu() for name, state in values["generators"].items()}
        if losses.shape != (steps,) or hits.shape != () or not 0 < step <= steps:
            raise ValueError(f"step {step} of {steps}")
        kinds = ({name: (x.shape, x.dtype) for name, x in states.items()} for states in (generators, generator_states(device)))
        if operator.ne(*kinds):
            raise ValueError("generators of another device")
        return cls(EpochTally(losses, hits), step, seconds, generators)


@dataclass
class TrainingState:
    """What changes from epoch to epoch."""

    arch: str
    model: ResNet
    average: AveragedModel[ResNet] | None
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # completed
    best_accuracy: float = -1.0
    best_epoch: int = 0
    within: EpochState | None = None  # the epoch after `epoch`, where it has begun
    world: World = ALONE  # the processes that train it

    @property
    def evaluated(self) -> ResNet:
        """The weights that count: the averaged ones where there are any."""
        return self.average.model if self.average is not None else self.model

    @property
    def tensors(self) -> list[Tensor]:
        """All weights and statistics that are floating point, of the average too."""
        models = [self.model] if self.average is None else [self.model, self.average.model]
        return [tensor for model in models for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Give every rank the mean of the ranks' running statistics.

        They are linear in those of the batches, so it does not matter how often; rank 0's alone would rest on fewer images.
        """
        if self.world.size > 1:
            statistics = [tensor for tensor in self.tensors if not isinstance(tensor, nn.Parameter)]
            torch._foreach_div_(statistics, self.world.size)
            self.world.add(statistics)

    def digest(self) -> str:
        """A hash of where training stands and of all weights."""
        values = b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in self.tensors)
        where = f"epoch {self.epoch}, step {self.within.step if self.within else 0}"
        return f"{where}, weights {hashlib.sha256(values).hexdigest()[:12]}"

    def measure(
        self, data: Splits, split: ResidentSet, batch_size: int, dtype: torch.dtype | None, tta: TTA = "none"
    ) -> Evaluation:
        """Evaluate the weights that count on a split; waits for the device once."""
        model = self._classifier(data)
        return Evaluator(model, split, batch_size=batch_size, tta=tta, autocast_dtype=dtype, world=self.world)()

    def evaluator(self, data: Splits, recipe: Recipe, run: RunOptions, say: Callable[[str], object] = print) -> Evaluator:
        """What measures the weights that count, as they are when it is called, on the split that best.pt is chosen on."""
        device = data.mean.device
        return Evaluator(
            self._classifier(data),
            data.select,
            batch_size=run.eval_batch_size,
            tta=recipe.eval_tta,
            centre_weight=recipe.centre_weight,
            autocast_dtype=choose_precision(run.precision, device),
            record=cuda_graph if captures(run, device) else None,
            say=say,
            world=self.world,
        )

    def _classifier(self, data: Splits) -> PixelClassifier:
        return PixelClassifier(self.evaluated, data.mean, data.std)


def build_state(
    arch: str, recipe: Recipe, run: RunOptions, data: Splits, device: torch.device, world: World = ALONE
) -> TrainingState:
    """Build model, average and optimizer; the weights depend on the seed alone, but a whitening stem on the images.

    world: the processes that train it. Raises InputError over the budget.
    """
    torch.manual_seed(run.seed_of("init"))
    size = data.train.size
    recipe.augmentation.require_fits(size)
    stem_stride = suited_stride(size, recipe.stem_stride)
    require_size(arch, recipe.phases.smallest(size), stem_stride)
    model = build_model(
        arch,
        data.classes,
        block_dropout=recipe.block_dropout,
        head_dropout=recipe.head_dropout,
        stochastic_depth=recipe.stochastic_depth,
        stochastic_depth_mode=recipe.stochastic_depth_mode,
        squeeze_excitation=recipe.squeeze_excitation,
        stem_stride=stem_stride,
        kernels=run.kernels,
    )
    require_budget(arch, count_parameters(model), run.max_parameters)
    freezable(model, recipe.phases.frozen)  # before anything is written
    model = place(model, device)
    if run.sync_bn:
        synchronise(model, world)
    if architecture(arch).stem == "whitening":
        first = data.train.fetch(torch.arange(min(len(data.train), whitening.IMAGES), device=device))
        model.stem[0].get_parameter("weight").data.copy_(whitening.whitening_filters(first.images, data.mean, data.std))
    optimizer = build_optimizer(
        model,
        recipe.optimizer,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay_norm_and_bias=recipe.decay_norm_and_bias,
        factors=recipe.factors,
    )
    average = AveragedModel(model, recipe.ema_decay) if recipe.ema_decay or recipe.average_from else None
    return TrainingState(arch, model, average, optimizer, world=world)


def build_step(
    state: TrainingState,
    recipe: Recipe,
    run: RunOptions,
    data: Splits,
    kind: type[TrainStep] = TrainStep,
    say: Callable[[str], object] = print,
) -> TrainStep:
    """Build the step that trains `state` on `data`, of class `kind`: what training runs is what the benchmarks time.

    say: told why the step cannot be captured, where that was wanted.
    """
    run = settled(run, data.mean.device)
    assert run.compile is not None
    assert run.compile_mode is not None
    settings = StepSettings(
        batch_size=recipe.batch_size,
        loss_reduction=recipe.loss_reduction,
        frozen=recipe.phases.frozen,
        label_smoothing=recipe.label_smoothing,
        clip_gradient_norm=recipe.clip_gradient_norm,
        clip_gradient_value=recipe.clip_gradient_value,
        seed=run.seed,
        order_seed=run.seed_of("order"),
        augmentation_seed=run.seed_of("augmentation"),
        autocast_dtype=choose_precision(run.precision, data.mean.device),
        compile=run.compile,
        compile_mode=run.compile_mode,
        kernels=run.kernels,
        table_momentum=data.mean.is_cuda and moves_by_table(recipe),
        skip_nonfinite=run.skip_nonfinite,
    )
    record = None
    if captures(run, data.mean.device):
        if why := obstacle(recipe, state.world):
            say(f"the step is not captured, and so slower: {why}")
        else:
            record = cuda_graph
    return kind(
        state.model, state.optimizer, data.train, recipe.augmentation, data.mean, data.std, settings,
        state.average, record, say, state.world,
    )  # fmt: skip


def captures(run: RunOptions, device: torch.device) -> bool:
    """Whether a run is to replay its steps as CUDA graphs."""
    return run.capture == "auto" and device.type == "cuda"


def moves_by_table(recipe: Recipe) -> bool:
    """Whether the momentum moves, and in an optimizer whose steps can read it from a table."""
    return recipe.schedule.min_momentum is not None and recipe.momentum > 0 and recipe.optimizer in ("sgd", "adam")


def obstacle(recipe: Recipe, world: World) -> str:
    """Why a training step cannot be captured, by the name of the setting; empty: it can."""
    if world.size > 1:
        return f"{world.size} processes sum its gradients"
    if recipe.schedule.min_momentum is not None and not moves_by_table(recipe):
        return f"min_momentum moves a momentum that {recipe.optimizer} takes as a number"
    return ""


def snapshot(state: TrainingState, recipe: Recipe, data: Splits) -> Checkpoint:
    """Everything a resume or a prediction needs."""
    mean, std = data.statistics
    return Checkpoint(
        arch=state.arch,
        squeeze_excitation=recipe.squeeze_excitation,
        class_names=data.manifest.class_names,
        mean=mean,
        std=std,
        data_name=data.manifest.name,
        data_sha256=list(data.sha256),
        epoch=state.epoch,
        model=state.model.state_dict(),
        average=state.average.model.state_dict() if state.average is not None else None,
        optimizer=state.optimizer.state_dict(),
        best_accuracy=state.best_accuracy,
        best_epoch=state.best_epoch,
        within=None if state.within is None else state.within.save(),
        size=list(data.train.size),
        stem_stride=state.model.stem_stride,
    )


def restore(state: TrainingState, folder: RunFolder, data: Splits, steps: int, device: torch.device) -> list[Metrics]:
    """Bring `state` to where last.pt stands; return the metrics of the epochs before. Without one that is the beginning.

    steps: of an epoch. Raises InputError when the folder's files do not fit each other, the data or its config.
    """
    again = "start again in another folder"
    if not folder.last.exists():
        if (folder.path / "metrics.jsonl").exists() and len(folder.read_metrics()) > 1:  # one: killed before the first last.pt
            raise InputError(f"{folder.last} is missing, though the run has epochs: put it back, or {again}")
        return []
    checkpoint = load_checkpoint(folder.last, device, arch=state.arch)
    if checkpoint.data_sha256 != list(data.sha256):
        raise InputError(
            f"{folder.path} was trained on other files of {checkpoint.data_name} than those given ({data.manifest.name}): "
            "name the folder of the run's own data with --data"
        )
    try:
        require_fits(folder.last, checkpoint, state.model)
        state.model.load_state_dict(checkpoint.model)
        load_optimizer(state.optimizer, checkpoint.optimizer)
        if state.average is not None:
            state.average.model.load_state_dict(checkpoint.average or {})
        if checkpoint.within is not None:
            state.within = EpochState.load(checkpoint.within, steps, device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{folder.last} does not fit the run's config.json: {again}") from None
    state.epoch, state.best_accuracy, state.best_epoch = checkpoint.epoch, checkpoint.best_accuracy, checkpoint.best_epoch
    rows = [row for row in folder.read_metrics() if row["epoch"] <= checkpoint.epoch] if checkpoint.epoch else []
    if [row["epoch"] for row in rows] != list(range(1, checkpoint.epoch + 1)):
        raise InputError(f"{folder.path}: metrics.jsonl has {len(rows)} epochs and last.pt {checkpoint.epoch}: {again}")
    return rows
