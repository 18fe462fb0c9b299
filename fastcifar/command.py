"""The command line of training: architecture, recipe and options, the complete description of a run."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from fastcifar.ahead import option
from fastcifar.arguments import parse_arguments
from fastcifar.dataset import Splits, load_splits
from fastcifar.errors import InputError, require_installed
from fastcifar.models import architecture
from fastcifar.recipes import Recipe, RunOptions, reported
from fastcifar.run_folder import RunFolder

DEFAULT_ARCH = "se_resnet18"
PROGRAM = "python -m fastcifar.train"
# Whether it was given at all counts, which tyro's own switches do not tell.
SWITCHES = {"--compile": ["--compile", "True"], "--no-compile": ["--compile", "False"]}


@dataclass(frozen=True)
class Command:
    """Train a residual network on CIFAR by its report's recipe; every field of the recipe can be overridden.

    The defaults shown are those of the recipe that --arch (or --recipe) names.
    """

    arch: str = DEFAULT_ARCH  # architecture; `python -m fastcifar.models` lists them
    recipe: str | None = None  # recipe to train by, an arch's name or NAME_text; default: the arch's own
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=lambda: reported(DEFAULT_ARCH).recipe)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)
    config: Path | None = (
        None  # config.json of a run to do again, in a folder of its own; what else is given replaces what it says
    )

    def __post_init__(self) -> None:
        if self.settings.held_out and self.run.val_fraction:
            raise InputError(
                f"val_fraction {self.run.val_fraction} beside a recipe that holds out {self.settings.held_out} of the training "
                "images itself: leave --val-fraction out, or set --held-out instead"
            )
        if self.run.stop_after > self.settings.epochs:
            raise InputError(
                f"stop_after {self.run.stop_after} is beyond the {self.settings.epochs} epochs of the schedule: "
                "lower --stop-after"
            )

    @property
    def recipe_name(self) -> str:
        """The row of the table of recipes this run began from."""
        return self.recipe or self.arch


def parse_command(arguments: list[str]) -> Command:
    """Return the command: defaults from the arch's recipe, or from the run folder to go on with. Raises InputError."""
    command = _parsed(arguments)
    require_installed(f"--log {' '.join(command.run.log)}", command.run.log, "loggers")
    return command


def _parsed(arguments: list[str]) -> Command:
    arguments = [part for argument in arguments for part in SWITCHES.get(argument, [argument])]
    resume, config = option(arguments, "resume"), option(arguments, "config")
    if resume is not None and config is not None:
        raise InputError("--resume goes on with a run and --config does one again: choose one of them")
    if resume is not None:
        began = resumed(Path(resume))
        command = parse_arguments(Command, PROGRAM, arguments, default=began)
        _require_same(began, command)
        return command
    if config is not None:
        return parse_arguments(Command, PROGRAM, arguments, default=repeated(Path(config), arguments))
    arch = option(arguments, "arch") or DEFAULT_ARCH
    architecture(arch)
    recipe = option(arguments, "recipe")
    default = Command(arch=arch, settings=reported(recipe or arch).recipe)
    return parse_arguments(Command, PROGRAM, arguments, default=default)


def load_data(command: Command, device: torch.device) -> Splits:
    """The images of a run, on its device. Raises InputError."""
    recipe, run = command.settings, command.run
    return load_splits(
        run.data,
        device,
        limit_train=run.limit_train,
        indices=run.train_indices,
        limit_test=run.limit_test,
        val_fraction=recipe.held_out or run.val_fraction,
        seed=run.seed,
        label_noise=recipe.label_noise,
        verify=run.verify,
        stream=run.stream,
        std=recipe.std,
        std_everywhere=recipe.std != reported(command.recipe_name).recipe.std,
    )


def repeated(config: Path, arguments: list[str]) -> Command:
    """The command of the run whose config.json is named, into another folder."""
    arch, recipe_name, recipe, run = RunFolder(config.parent).read_config(config.name)
    for name, began in (("arch", arch), ("recipe", recipe_name)):
        if option(arguments, name) not in (None, began):
            raise InputError(
                f"{config} is of {name} {began}: leave --{name} out, or leave --config out and start from its recipe"
            )
    return Command(arch, recipe_name, recipe, replace(run, out=None, stop_after=0, profile=0))


def resumed(path: Path) -> Command:
    """The command with which the run in folder `path` began, set to go on."""
    arch, recipe_name, recipe, run = RunFolder(path).read_config()
    return Command(arch, recipe_name, recipe, replace(run, resume=path, stop_after=0, profile=0))


def differences(began: Command, command: Command) -> dict[str, tuple[Any, Any]]:
    """{name: (in the one, in the other)} of all that would make a resumed run another run."""
    # Where the data is and how far to go; what checks, traces, replays or logs steps, and what comes after training.
    free = {
        "data",
        "train_indices",
        "record_margins",
        "resume",
        "stop_after",
        "verify",
        "skip_nonfinite",
        "profile",
        "capture",
        "plots",
        "log",
    }
    pairs = {"arch": (began.arch, command.arch), "recipe": (began.recipe_name, command.recipe_name)}
    for part in ("settings", "run"):
        before, now = vars(getattr(began, part)), vars(getattr(command, part))
        pairs |= {name: (before[name], now[name]) for name in before if name not in free}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _require_same(began: Command, command: Command) -> None:
    """Raise InputError when a resumed run is given anything that would make it another run."""
    changed = differences(began, command)
    if changed:
        raise InputError(f"--resume goes on exactly where the run stood: leave out what changes it ({', '.join(changed)})")
