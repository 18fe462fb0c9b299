"""Train a network by a recipe into a complete run folder.

python -m fastcifar.train --arch se_resnet18 --epochs 200
python -m fastcifar.train --resume runs/se_resnet18-seed0
torchrun --nproc-per-node 8 -m fastcifar.train --arch se_resnet18
"""

import errno
import math
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import psutil
import torch
from rich.console import Console
from torch import Tensor

from fastcifar import margins
from fastcifar.command import Command, load_data, parse_command
from fastcifar.dataset import Splits
from fastcifar.device import (
    choose_device,
    choose_precision,
    device_name,
    generator_states,
    require_kernels,
    set_generators,
    set_up_process,
)
from fastcifar.distributed import ALONE, LostRankError, World, joined
from fastcifar.errors import InputError, Stopped, is_broken_pipe, run_command
from fastcifar.evaluate import Evaluator
from fastcifar.loggers import Loggers
from fastcifar.measuring import Meter, compile_seconds
from fastcifar.models import require_size, suited_stride
from fastcifar.models.resnet import PixelClassifier
from fastcifar.models.summary import training_flops
from fastcifar.optimization import epoch_mean_weights, epoch_momenta, epoch_rates
from fastcifar.plan import choose
from fastcifar.profiling import profiled
from fastcifar.recipes import Recipe, RunOptions
from fastcifar.reporting import TrainingProgress, announce, report_end, summarise
from fastcifar.run_folder import Metrics, RunFolder, environment_facts
from fastcifar.saving import EpochWriter
from fastcifar.signals import StopRequest
from fastcifar.state import (
    EpochState,
    TrainingState,
    build_state,
    build_step,
    restore,
    snapshot,
)
from fastcifar.step import TrainStep
from kernels.philox import Purpose, philox

RATES_PER_EPOCH = 20  # points of the learning rate kept in an epoch's metrics


def main() -> None:
    """Parse the command line and train, together with the other processes where torchrun started some."""
    with joined() as world:
        train_as(world, sys.argv[1:])


def train_as(world: World, arguments: list[str]) -> None:
    """Train as one of `world`; what goes wrong says how to go on."""
    command = parse_command(arguments)
    path = run_path(command)
    config = path / "config.json"
    if world.restarts and command.run.resume is None and config.exists():
        command = parse_command([*arguments, "--resume", str(path)])
    launcher = "python" if world.size == 1 else "torchrun ..."
    go_on = f"go on with: {launcher} -m fastcifar.train --resume {shlex.quote(str(path))}"
    try:
        train(command, Console(soft_wrap=True, highlight=False, markup=False), world)
    except KeyboardInterrupt as end:
        said = [str(part) for part in (*end.args, go_on if config.exists() else "nothing was saved") if part]
        raise Stopped(getattr(end, "number", signal.SIGINT), "; ".join(said)) from None
    except (BrokenPipeError, SystemExit) as end:
        if not is_broken_pipe(end):
            raise
        raise Stopped(signal.SIGPIPE, f"nobody reads the output any more; {go_on}") from None
    except LostRankError as error:
        raise InputError(f"{world.lost(error)}; {go_on if config.exists() else 'nothing was saved'}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and config.exists():
            raise InputError(f"{error.filename or path}: {error.strerror}; free some space, then {go_on}") from None
        raise


def train(command: Command, console: Console, world: World = ALONE) -> RunFolder:
    """Train to the end, or go on from where the run stood; return the complete run folder.

    world: the processes that train it together, of which the first writes. Raises InputError, LostRankError, and Stopped when a
    signal ended it, with the state saved inside the epoch.
    """
    with Loggers(console.print) as loggers:  # around all else, for it may wait for a server
        return _train(command, console, world, loggers)


def _train(command: Command, console: Console, world: World, loggers: Loggers) -> RunFolder:
    recipe, run = command.settings, command.run
    device = choose_device(run.device)
    world.take(device)
    set_up_process(device, deterministic=run.deterministic)
    dtype = choose_precision(run.precision, device)
    data = load_data(command, device)
    world.require_divides(recipe.batch_size, len(data.train))
    steps = steps_per_epoch(data, recipe.batch_size)
    images = steps * recipe.batch_size
    require_size(command.arch, recipe.phases.smallest(data.train.size), suited_stride(data.train.size, recipe.stem_stride))
    choice = choose(command, images, device, console.print, size=data.train.size, measures=world.size == 1)
    require_kernels(choice.run.kernels, device)
    state = build_state(command.arch, recipe, choice.run, data, device, world)
    folder, rows = RunFolder(run_path(command)), []
    facts = environment_facts(device)  # at the start: what is running, whatever is edited meanwhile
    if world.size > 1:
        parts = {"command line": command, "device": device.type, "versions": facts["versions"], "data": data.sha256}
        world.require_alike(parts | {"start": state.digest()})
    with folder.held(new=run.resume is None) if world.leads else nullcontext(), StopRequest(world) as stop:
        if choice.seconds:
            from fastcifar import tune  # here, since most runs measure nothing

            with stop.at_once():
                choice = tune.measured(command, choice, data, device, console)
            state = build_state(command.arch, recipe, choice.run, data, device)
        run, command = choice.run, replace(command, run=choice.run)
        if run.threads:
            torch.set_num_threads(run.threads)
        facts |= {"hardware": device_name(device), "processes": world.size}
        if run.resume is not None:
            rows = restore(state, folder, data, steps, device)
            if world.size > 1:
                world.require_alike({"state in its run folder": state.digest()})
        elif world.leads:
            folder.write_config(command.arch, command.recipe_name, recipe, run, facts | {"plan": choice.record})
        announce(console, command, data, state, folder, dtype)

        last = last_epoch(recipe, run, state.epoch)
        available, kind = (last - state.epoch) * steps, TrainStep
        if run.profile and world.leads:
            kind = profiled(TrainStep, run.profile, folder.path / "trace.json", console, available=available)
        train_step = build_step(state, recipe, run, data, kind, say=console.print)
        evaluator = state.evaluator(data, recipe, run, say=console.print)
        meter = Meter(device)
        loggers.open(run.log if world.leads else (), folder.path)
        with (
            EpochWriter(folder, device, background=device.type == "cuda") as writer,
            TrainingProgress(console, recipe.epochs, state.epoch, steps * recipe.batch_size) as progress,
        ):
            while state.epoch < last:
                try:
                    record = train_epoch(train_step, data, recipe, state, steps, progress, meter, stop)
                    if record["epoch"] % run.eval_every == 0 or record["epoch"] == recipe.epochs:  # wherever this stops
                        record |= select_best(state, evaluator, data.select_name, stop)
                        if run.record_margins and world.leads:
                            record_margins(folder, state, data, run, dtype, stop)
                except Stopped as end:
                    writer.flush()
                    state.share_statistics()
                    raise Stopped(end.number, save_within(folder, state, recipe, data)) from None
                state.epoch, state.within = state.epoch + 1, None
                record |= {"best_accuracy": state.best_accuracy if state.best_epoch else None, "eval_split": data.select_name}
                rows.append(record)
                if world.leads:
                    loggers.log(record)  # first: a resume logs it again, which TensorBoard and wandb show once
                    writer.save(rows, snapshot(state, recipe, data))
                progress.epoch(record, seconds_left=(last - state.epoch) * median(map(epoch_seconds, rows)))
                stop.check()

        with stop.at_once():  # a resume does this again
            summary = summarise(command, data, state, rows, dtype) | facts
            if world.leads:
                folder.write_summary(summary)
            if run.plots and world.leads:
                from fastcifar import plots  # here, since matplotlib takes a second to import and training does not need it

                plots.draw([plots.read_run(folder)], folder.path)
    report_end(console, summary, folder)
    return folder


def save_within(folder: RunFolder, state: TrainingState, recipe: Recipe, data: Splits) -> str:
    """Save a run that is stopped inside an epoch; return what to tell the user."""
    within = state.within
    if within is None or not within.step:
        return ""
    if state.world.leads:
        folder.save_within(snapshot(state, recipe, data))
    return f"saved in epoch {state.epoch + 1} after step {within.step:,} of {within.steps:,}"


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
    train_step: TrainStep,
    data: Splits,
    recipe: Recipe,
    state: TrainingState,
    steps: int,
    progress: TrainingProgress,
    meter: Meter,
    stop: StopRequest,
) -> Metrics:
    """Train the epoch after `state.epoch`, or the rest of it; return its record.

    Raises InputError, with nothing saved, when the loss is not finite; Stopped after a step, with `state.within` up to it.
    """
    device, seed, batch_size, epoch = data.mean.device, train_step.settings.seed, recipe.batch_size, state.epoch
    meter.start()
    began = time.perf_counter()
    rates = epoch_rates(recipe.schedule, epoch, steps, recipe.epochs)
    momenta = epoch_momenta(recipe.schedule, recipe.momentum, epoch, steps, recipe.epochs)
    mean_weights = epoch_mean_weights(recipe.schedule, recipe.average_from, epoch, steps, recipe.epochs)
    is_whole = state.within is None and state.world.size == 1
    within = state.within = state.within or EpochState.begin(steps, device)
    first, seconds_before, progress_done = within.step, within.seconds, epoch / recipe.epochs
    phase = recipe.phase(epoch)
    tally = within.tally = train_step.begin(
        epoch, rates, phase=phase, progress=progress_done, momenta=momenta, mean_weights=mean_weights,
        tally=within.tally, first=first,
    )  # fmt: skip
    if within.generators and state.world.leads:  # a checkpoint has the first rank's
        set_generators(within.generators, device)
    else:
        seed_torch(seed, epoch, state.world.rank)
    # Looking at a loss is free on a CPU; a GPU is asked at the end.
    stops_at_nonfinite = device.type == "cpu" and not train_step.settings.skip_nonfinite
    first_step_at, first_step, steps_began = time.time(), 0.0, time.perf_counter()
    for step in range(first, steps):
        train_step()
        progress.advance(batch_size)
        if step == first:
            if device.type == "cuda":
                torch.cuda.synchronize()  # host sync, once an epoch: the first step counts when done, not when launched
            first_step_at, first_step = time.time(), time.perf_counter() - steps_began
        if stops_at_nonfinite and not math.isfinite(tally.losses[step]):
            break
        within.step, within.seconds = step + 1, seconds_before + time.perf_counter() - began
        if stop.came():
            within.generators = generator_states(device)
            stop.check()
    within.generators = generator_states(device)  # for a stop during evaluation
    state.share_statistics()
    losses, hits, (weights_are_finite,) = tally.read(all_finite(state.tensors))  # host sync: the epoch ends here
    all_steps = time.perf_counter() - steps_began
    finite = require_finite(losses, rates, epoch, train_step.settings.skip_nonfinite)
    require_finite_weights(bool(weights_are_finite), rates[-1], epoch)
    seconds = within.seconds = seconds_before + time.perf_counter() - began
    return {
        "epoch": epoch + 1,
        "data_name": data.manifest.name,
        "train_loss": sum(finite) / len(finite),
        "train_accuracy": hits / (len(finite) * batch_size),  # on augmented images; both labels count by their shares
        "eval_loss": None,
        "eval_accuracy": None,
        "eval_seconds": None,
        "skipped_steps": steps - len(finite),
        "loss_spikes": count_spikes(finite, data.classes),
        "learning_rates": spaced(rates, RATES_PER_EPOCH),
        "images_per_second": steps * batch_size / seconds,
        "train_seconds": seconds,
        "flops": training_flops(state.arch, phase.of(data.train.size), state.model.stem_stride) * steps * batch_size,
        "first_step_seconds": first_step_at - psutil.Process().create_time(),  # since the process began
        "compile_seconds": compile_seconds(first_step, all_steps, steps - first),
    } | (meter.stop() if is_whole else meter.stop() | {"energy_joules": None})  # what the other parts used is not known


def count_spikes(losses: list[float], classes: int) -> int:
    """Steps whose loss was worse than chance, ln(classes), and more than twice the epoch's median."""
    return sum(loss > max(math.log(classes), 2 * median(losses)) for loss in losses)


def spaced(values: list[float], count: int) -> list[float]:
    """At most `count` values, evenly spaced from the first on."""
    count = min(count, len(values))
    return [values[position * len(values) // count] for position in range(count)]


def require_finite(losses: list[float], rates: list[float], epoch: int, skip: bool) -> list[float]:
    """Return the finite losses of epoch `epoch` (from 0).

    Raises InputError naming the first step whose loss is NaN or infinite; where steps may be skipped, when all of them were.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if len(finite) < len(losses) and not (skip and finite):
        step = next(step for step, loss in enumerate(losses) if not math.isfinite(loss))
        where = f"epoch {epoch + 1}, step {step + 1} of {len(losses)} (learning rate {rates[step]:.4g})"
        what = "no step of the epoch had a finite loss" if skip else f"the loss became {losses[step]}"
        raise InputError(f"{what} in {where}; {kept(epoch)}: lower --peak-lr, or set --clip-gradient-norm")
    return finite


@torch.no_grad()
def all_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all values are finite: a 0-d tensor, for which nothing waits."""
    return torch.stack(torch._foreach_norm(tensors, ord=math.inf)).isfinite().all()


def require_finite_weights(are_finite: bool, rate: float, epoch: int) -> None:
    """Raise InputError when the epoch's last update, which no loss has seen yet, left a weight or a statistic infinite."""
    if not are_finite:
        where = f"the last step of epoch {epoch + 1} (learning rate {rate:.4g})"
        raise InputError(f"the weights became infinite in {where}; {kept(epoch)}: lower --peak-lr, or set --clip-gradient-norm")


def kept(epoch: int) -> str:
    """What a run stopped in epoch `epoch` (from 0) still has."""
    return f"the checkpoint of epoch {epoch} is kept" if epoch else "no checkpoint was written yet"


def seed_torch(seed: int, epoch: int, rank: int) -> None:
    """Seed PyTorch's generators, which serve dropout and stochastic depth on a GPU, by (seed, epoch, rank)."""
    high, low, _, _ = philox(seed, torch.tensor([rank]), epoch, Purpose.TORCH)
    torch.manual_seed(int(high) << 31 | int(low) >> 1)


def select_best(state: TrainingState, evaluator: Evaluator, split_name: str, stop: StopRequest) -> Metrics:
    """Evaluate the epoch just trained on the selection split, note the best so far in `state`, return the record's part.

    Raises InputError, and Stopped with nothing noted.
    """
    began, epoch = time.perf_counter(), state.epoch + 1
    with stop.at_once():
        result = evaluator()
    if not math.isfinite(result.loss):  # finite weights can still be too large for a forward pass
        raise InputError(
            f"the {split_name} loss became {result.loss} after epoch {epoch}; {kept(state.epoch)}: "
            "lower --peak-lr, or set --clip-gradient-norm"
        )
    if result.top1 > state.best_accuracy:
        state.best_accuracy, state.best_epoch = result.top1, epoch
    return {"eval_loss": result.loss, "eval_accuracy": result.top1, "eval_seconds": time.perf_counter() - began}


def record_margins(
    folder: RunFolder, state: TrainingState, data: Splits, run: RunOptions, dtype: torch.dtype | None, stop: StopRequest
) -> None:
    """Write what the epoch just trained makes of each training image. Raises OSError, and Stopped with nothing written."""
    path = folder.path / "margins" / f"epoch-{state.epoch + 1:04d}.npy"
    with stop.at_once():
        margins.record(path, PixelClassifier(state.evaluated, data.mean, data.std), data.train, run.eval_batch_size, dtype)


def epoch_seconds(record: Metrics) -> float:
    """What an epoch took, evaluation included."""
    return float(record["train_seconds"] + (record["eval_seconds"] or 0.0))


if __name__ == "__main__":
    run_command(main)
