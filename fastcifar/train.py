"""Train a network by a recipe into a complete run folder.

python -m fastcifar.train --arch se_resnet18 --epochs 200
python -m fastcifar.train --resume runs/se_resnet18-seed0
"""

import math
import sys
import time
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console

from fastcifar.command import Command, parse_command
from fastcifar.dataset import Splits, epoch_order, load_splits
from fastcifar.device import choose_device, choose_precision, require_kernels, set_up_process
from fastcifar.errors import InputError, run_command
from fastcifar.measuring import Meter, compile_seconds
from fastcifar.optimization import epoch_momenta, epoch_rates
from fastcifar.recipes import Recipe, RunOptions, reported
from fastcifar.reporting import Curves, TrainingProgress, announce, report_end, summarise
from fastcifar.run_folder import Metrics, RunFolder, environment_facts
from fastcifar.state import TrainingState, build_state, build_step, restore, snapshot
from fastcifar.step import EpochTally, TrainStep
from kernels.philox import Purpose, philox

RATES_PER_EPOCH = 20  # points of the learning rate kept in an epoch's metrics


def main() -> None:
    """Parse the command line and train."""
    command = parse_command(sys.argv[1:])
    try:
        train(command, Console(soft_wrap=True, highlight=False, markup=False))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on with: python -m fastcifar.train --resume {run_path(command)}") from None


def train(command: Command, console: Console) -> RunFolder:
    """Train to the end, or go on from where the run stood; return the complete run folder. Raises InputError."""
    recipe, run = command.settings, command.run
    device = choose_device(run.device)
    require_kernels(run.kernels, device)
    set_up_process(device, deterministic=run.deterministic)
    dtype = choose_precision(run.precision, device)
    data = load_splits(
        run.data,
        device,
        limit_train=run.limit_train,
        limit_test=run.limit_test,
        val_fraction=recipe.held_out or run.val_fraction,
        seed=run.seed,
        verify=run.verify,
        stream=run.stream,
        std=recipe.std,
        std_everywhere=recipe.std != reported(command.recipe_name).recipe.std,
    )
    steps = steps_per_epoch(data, recipe.batch_size)
    state = build_state(command.arch, recipe, run, data, device)
    folder, rows = RunFolder(run_path(command)), []
    facts = environment_facts(device)  # at the start: what is running, whatever is edited meanwhile
    if run.resume is not None:
        rows = restore(state, folder, data, device)
    else:
        folder.create()
        folder.write_config(command.arch, command.recipe_name, recipe, run, facts)
    announce(console, command, data, state, folder, dtype)

    train_step = build_step(state, recipe, run, data)
    curves, meter = Curves(folder.path), Meter(device)
    last = last_epoch(recipe, run, state.epoch)
    with TrainingProgress(console, recipe.epochs, state.epoch, steps * recipe.batch_size) as progress:
        while state.epoch < last:
            meter.start()
            record = train_epoch(train_step, data, recipe, state.epoch, steps, progress) | meter.stop()
            state.epoch += 1
            if state.epoch % run.eval_every == 0 or state.epoch == recipe.epochs:  # wherever this command stops
                record |= select_best(state, data, run.eval_batch_size, dtype)
            record |= {"best_accuracy": state.best_accuracy if state.best_epoch else None, "eval_split": data.select_name}
            rows.append(record)
            folder.save_epoch(rows, snapshot(state, recipe, data))
            curves.log(record)
            progress.epoch(record, seconds_left=(last - state.epoch) * median(map(epoch_seconds, rows)))

    curves.close()

    summary = summarise(command, data, state, rows, dtype) | facts
    folder.write_summary(summary)
    if run.plots:
        from fastcifar import plots  # here, since matplotlib takes a second to import and training does not need it

        plots.draw([plots.read_run(folder)], folder.path)
    report_end(console, summary, folder)
    return folder


def last_epoch(recipe: Recipe, run: RunOptions, done: int) -> int:
    """The epoch after which this command stops. Raises InputError where that is past."""
    if run.stop_after and run.stop_after < done:
        raise InputError(
            f"the run already has {done} epochs, more than --stop-after {run.stop_after}: raise it, or leave it out"
        )
    return run.stop_after or recipe.epochs


def run_path(command: Command) -> Path:
    """Where the run's folder is."""
    return command.run.resume or command.run.out or Path("runs") / f"{command.arch}-seed{command.run.seed}"


def steps_per_epoch(data: Splits, batch_size: int) -> int:
    """Whole batches in an epoch; the few images left over differ from epoch to epoch. Raises InputError when there is none."""
    if batch_size > len(data.train):
        raise InputError(
            f"batch_size {batch_size:,} is larger than the training set of {len(data.train):,} images: lower --batch-size"
        )
    return len(data.train) // batch_size


def train_epoch(
    train_step: TrainStep, data: Splits, recipe: Recipe, epoch: int, steps: int, progress: TrainingProgress
) -> Metrics:
    """Train epoch `epoch` (from 0); return its record. Raises InputError, with nothing saved, when the loss is not finite."""
    device, seed, batch_size = data.mean.device, train_step.settings.seed, recipe.batch_size
    started = time.perf_counter()
    order = epoch_order(data.train.index, seed, epoch)
    plan = train_step.plan(epoch, steps, progress=epoch / recipe.epochs)
    rates = epoch_rates(recipe.schedule, epoch, steps, recipe.epochs)
    momenta = epoch_momenta(recipe.schedule, recipe.momentum, epoch, steps, recipe.epochs)
    tally = EpochTally(torch.zeros(steps, device=device), torch.zeros((), dtype=torch.float64, device=device))
    seed_torch(seed, epoch)
    train_step.model.train()
    first_step_at, first_step, steps_began = 0.0, 0.0, time.perf_counter()
    for step, positions in enumerate(order[: steps * batch_size].split(batch_size)):
        train_step(positions, step, rates[step], plan, tally, momenta[step])
        progress.advance(batch_size)
        if step == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()  # host sync, once an epoch: the first step counts when done, not when launched
            first_step_at, first_step = time.time(), time.perf_counter() - steps_began
        if device.type == "cpu" and not math.isfinite(tally.losses[step]):  # free here; a GPU is asked at the end
            break
    losses = tally.losses.tolist()  # host sync: the epoch ends here
    all_steps = time.perf_counter() - steps_began
    require_finite(losses, rates, epoch)
    require_finite_weights(train_step, rates[-1], epoch)
    seconds = time.perf_counter() - started
    return {
        "epoch": epoch + 1,
        "data_name": data.manifest.name,
        "train_loss": sum(losses) / steps,
        "train_accuracy": float(tally.hits) / (steps * batch_size),  # on augmented images; both labels count by their shares
        "eval_loss": None,
        "eval_accuracy": None,
        "eval_seconds": None,
        "learning_rates": spaced(rates, RATES_PER_EPOCH),
        "images_per_second": steps * batch_size / seconds,
        "train_seconds": seconds,
        "first_step_seconds": first_step_at - psutil.Process().create_time(),  # since the process began
        "compile_seconds": compile_seconds(first_step, all_steps, steps),
    }


def spaced(values: list[float], count: int) -> list[float]:
    """At most `count` values, evenly spaced from the first on."""
    count = min(count, len(values))
    return [values[position * len(values) // count] for position in range(count)]


def require_finite(losses: list[float], rates: list[float], epoch: int) -> None:
    """Raise InputError naming the first step of epoch `epoch` (from 0) whose loss is NaN or infinite."""
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            where = f"epoch {epoch + 1}, step {step + 1} of {len(losses)} (learning rate {rates[step]:.4g})"
            raise InputError(f"the loss became {loss} in {where}; {kept(epoch)}: lower --peak-lr, or set --clip-gradient-norm")


def require_finite_weights(train_step: TrainStep, rate: float, epoch: int) -> None:
    """Raise InputError when the epoch's last update, which no loss has seen yet, left a weight or a statistic infinite."""
    models = [train_step.model] if train_step.average is None else [train_step.model, train_step.average.model]
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():  # host sync, once an epoch
        where = f"the last step of epoch {epoch + 1} (learning rate {rate:.4g})"
        raise InputError(f"the weights became infinite in {where}; {kept(epoch)}: lower --peak-lr, or set --clip-gradient-norm")


def kept(epoch: int) -> str:
    """What a run stopped in epoch `epoch` (from 0) still has."""
    return f"the checkpoint of epoch {epoch} is kept" if epoch else "no checkpoint was written yet"


def seed_torch(seed: int, epoch: int) -> None:
    """Seed PyTorch's generators, which serve dropout and stochastic depth, by (seed, epoch): a resume restores nothing."""
    high, low, _, _ = philox(seed, torch.zeros(1, dtype=torch.int64), epoch, Purpose.TORCH)
    torch.manual_seed(int(high) << 31 | int(low) >> 1)


def select_best(state: TrainingState, data: Splits, batch_size: int, dtype: torch.dtype | None) -> Metrics:
    """Evaluate on the selection split, note the best so far in `state`, return the record's part. Raises InputError."""
    started = time.perf_counter()
    result = state.measure(data, data.select, batch_size, dtype)
    if not math.isfinite(result.loss):  # finite weights can still be too large for a forward pass
        raise InputError(
            f"the {data.select_name} loss became {result.loss} after epoch {state.epoch}; {kept(state.epoch - 1)}: "
            "lower --peak-lr, or set --clip-gradient-norm"
        )
    if result.top1 > state.best_accuracy:
        state.best_accuracy, state.best_epoch = result.top1, state.epoch
    return {"eval_loss": result.loss, "eval_accuracy": result.top1, "eval_seconds": time.perf_counter() - started}


def epoch_seconds(record: Metrics) -> float:
    """What an epoch took, evaluation included."""
    return float(record["train_seconds"] + (record["eval_seconds"] or 0.0))


if __name__ == "__main__":
    run_command(main)
