"""What training moves: weights, average, optimizer, epoch, best so far; how it is built, saved and restored."""

from dataclasses import dataclass

import torch

from fastcifar.dataset import ResidentSet, Splits
from fastcifar.device import choose_precision
from fastcifar.errors import InputError
from fastcifar.evaluate import TTA, Evaluation, evaluate
from fastcifar.models import build_model, count_parameters, place, require_budget
from fastcifar.models.resnet import PixelClassifier, ResNet
from fastcifar.optimization import build_optimizer
from fastcifar.recipes import Recipe, RunOptions
from fastcifar.run_folder import Checkpoint, Metrics, RunFolder, load_checkpoint, require_fits
from fastcifar.step import AveragedModel, StepSettings, TrainStep


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

    @property
    def evaluated(self) -> ResNet:
        """The weights that count: the averaged ones where there are any."""
        return self.average.model if self.average is not None else self.model

    def measure(
        self, data: Splits, split: ResidentSet, batch_size: int, dtype: torch.dtype | None, tta: TTA = "none"
    ) -> Evaluation:
        """Evaluate the weights that count on a split; waits for the device once."""
        return evaluate(
            PixelClassifier(self.evaluated, data.mean, data.std), split, batch_size=batch_size, tta=tta, autocast_dtype=dtype
        )


def build_state(arch: str, recipe: Recipe, run: RunOptions, data: Splits, device: torch.device) -> TrainingState:
    """Build model, average and optimizer; the weights depend on the seed alone. Raises InputError over the budget."""
    torch.manual_seed(run.seed)
    model = build_model(
        arch,
        data.classes,
        block_dropout=recipe.block_dropout,
        head_dropout=recipe.head_dropout,
        stochastic_depth=recipe.stochastic_depth,
        stochastic_depth_mode=recipe.stochastic_depth_mode,
        squeeze_excitation=recipe.squeeze_excitation,
        kernels=run.kernels,
    )
    require_budget(arch, count_parameters(model), run.max_parameters)
    model = place(model, device)
    optimizer = build_optimizer(
        model,
        recipe.optimizer,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        decay_norm_and_bias=recipe.decay_norm_and_bias,
    )
    return TrainingState(arch, model, AveragedModel(model, recipe.ema_decay) if recipe.ema_decay else None, optimizer)


def build_step(
    state: TrainingState, recipe: Recipe, run: RunOptions, data: Splits, kind: type[TrainStep] = TrainStep
) -> TrainStep:
    """Build the step that trains `state` on `data`, of class `kind`: what training runs is what the benchmarks time."""
    settings = StepSettings(
        label_smoothing=recipe.label_smoothing,
        clip_gradient_norm=recipe.clip_gradient_norm,
        clip_gradient_value=recipe.clip_gradient_value,
        seed=run.seed,
        autocast_dtype=choose_precision(run.precision, data.mean.device),
        compile=run.compile,
        kernels=run.kernels,
    )
    return kind(state.model, state.optimizer, data.train, recipe.augmentation, data.mean, data.std, settings, state.average)


def snapshot(state: TrainingState, recipe: Recipe, data: Splits) -> Checkpoint:
    """Everything a resume or a prediction needs."""
    return Checkpoint(
        arch=state.arch,
        squeeze_excitation=recipe.squeeze_excitation,
        class_names=data.manifest.class_names,
        mean=data.mean.tolist(),
        std=data.std.tolist(),
        data_name=data.manifest.name,
        data_sha256=list(data.sha256),
        epoch=state.epoch,
        model=state.model.state_dict(),
        average=state.average.model.state_dict() if state.average is not None else None,
        optimizer=state.optimizer.state_dict(),
        best_accuracy=state.best_accuracy,
        best_epoch=state.best_epoch,
    )


def restore(state: TrainingState, folder: RunFolder, data: Splits, device: torch.device) -> list[Metrics]:
    """Bring `state` to the last finished epoch; return the metrics up to there. Without a checkpoint that is the beginning."""
    if not folder.last.exists():
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
        state.optimizer.load_state_dict(checkpoint.optimizer)
        if state.average is not None and checkpoint.average is not None:
            state.average.model.load_state_dict(checkpoint.average)
    except (RuntimeError, ValueError, KeyError):
        raise InputError(f"{folder.last} does not fit the run's config.json: start again in another folder") from None
    state.epoch, state.best_accuracy, state.best_epoch = checkpoint.epoch, checkpoint.best_accuracy, checkpoint.best_epoch
    rows = [row for row in folder.read_metrics() if row["epoch"] <= checkpoint.epoch]
    if len(rows) != checkpoint.epoch:
        raise InputError(
            f"{folder.path}: metrics.jsonl has {len(rows)} epochs and last.pt {checkpoint.epoch}: start again in another folder"
        )
    return rows
