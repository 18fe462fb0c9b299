"""Where an epoch's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. A row of LOGGERS is a logger.

Each is imported only where `--log` names it. Those that talk to a server do so in a thread: training waits for no network.
"""

import os
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol

from fastcifar.errors import InputError, Stopped, shortened
from fastcifar.files import read_json, write_bytes
from fastcifar.recipes import LoggerName
from fastcifar.run_folder import NOT_A_RUN, Metrics

EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "KILLED": 255}  # how a run ends: MLflow's word, and wandb's number
PATIENCE = 60.0  # seconds in which a server has to take the last figures
Curves = dict[str, float]


class Logger(Protocol):
    """What shows a run's curves."""

    def log(self, epoch: int, curves: Curves) -> None:
        """Add an epoch, from 1 on."""

    def close(self, end: str) -> None:
        """The run ended; one of EXIT_CODES."""


class TensorBoard:
    """Events in the run folder; opened by the first epoch, so that TensorBoard's import delays no first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def log(self, epoch: int, curves: Curves) -> None:
        """Add an epoch; what an interrupted run wrote for it and later ones is purged."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._put_before_now()
            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
        for tag, value in curves.items():
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def _put_before_now(self) -> None:
        """Rename event files of a clock since set back: TensorBoard reads them in the order of the times in their names."""
        earlier = sorted(self.folder.glob("events.out.tfevents.*"))
        for age, file in enumerate(reversed(earlier), start=1):
            stamp, *rest = file.name.removeprefix("events.out.tfevents.").split(".")
            if stamp.isdecimal() and int(stamp) > (latest := int(time.time()) - age):
                file.rename(file.with_name(".".join(["events.out.tfevents", f"{latest:010d}", *rest])))

    def close(self, end: str) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """A run of Weights & Biases, which keeps its files in the run folder unless WANDB_DIR says otherwise."""

    def __init__(self, folder: Path) -> None:
        import wandb

        places = {"dir": str(folder), "name": folder.resolve().name}
        own = {key: value for key, value in places.items() if f"WANDB_{key.upper()}" not in os.environ}
        quiet = {} if "WANDB_CONSOLE" in os.environ else {"console": "off"}  # the progress bar is not to be recorded
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):  # in a thread nobody can be asked
            raise InputError("no API key: run `wandb login` once, or set WANDB_MODE=offline")
        self._run = wandb.init(
            id=known_id(folder, "wandb"), resume="allow", config=config_of(folder), settings=wandb.Settings(**quiet), **own
        )
        keep_id(folder, "wandb", self._run.id)

    def log(self, epoch: int, curves: Curves) -> None:
        """Add an epoch; one that an interrupted run has sent already is ignored."""
        self._run.log(curves, step=epoch)

    def close(self, end: str) -> None:
        """Send the rest."""
        self._run.finish(exit_code=EXIT_CODES[end])


class MLflow:
    """A run of MLflow, in mlflow.db beside the run folder unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, folder: Path) -> None:
        import mlflow

        self._mlflow, self._is_local = mlflow, "MLFLOW_TRACKING_URI" not in os.environ
        if self._is_local:
            mlflow.set_tracking_uri(f"sqlite:///{folder.resolve().parent / 'mlflow.db'}")
        before = known_id(folder, "mlflow")
        run = mlflow.start_run(run_id=before, run_name=None if before else folder.resolve().name)
        if before is None:
            mlflow.log_params(flat(config_of(folder)))
            keep_id(folder, "mlflow", run.info.run_id)

    def log(self, epoch: int, curves: Curves) -> None:
        """Add an epoch."""
        self._mlflow.log_metrics(curves, step=epoch)

    def close(self, end: str) -> None:
        """Say how the run ended."""
        self._mlflow.end_run(end)
        if self._is_local:
            self._mlflow.set_tracking_uri(None)  # MLflow keeps it in the environment, where the next run would find it


def config_of(folder: Path) -> dict[str, Any]:
    """What config.json says of the run in `folder`."""
    return dict(read_json(folder / "config.json", remedy=NOT_A_RUN))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under names with dots, of the characters that MLflow allows."""
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + re.sub(r"[^\w./ -]", "_", key)
        pairs |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return pairs


def known_id(folder: Path, name: LoggerName) -> str | None:
    """What a service calls the run in `folder`; None before it has called it anything."""
    path = folder / f"{name}.id"
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def keep_id(folder: Path, name: LoggerName, run_id: str) -> None:
    """Keep it for a resume, which goes on with the same run."""
    write_bytes(folder / f"{name}.id", f"{run_id}\n".encode())


class InThread:
    """A logger in a thread of its own, opened there. When it fails, a line says so, and nothing more is logged."""

    def __init__(self, kind: Callable[[Path], Logger], name: LoggerName, folder: Path, say: Callable[[str], object]) -> None:
        self._kind, self._name, self._folder, self._say = kind, name, folder, say
        self._calls: SimpleQueue[tuple[Any, ...]] = SimpleQueue()
        self._thread = Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def _work(self) -> None:
        try:
            logger = self._kind(self._folder)
            while len(call := self._calls.get()) > 1:
                logger.log(*call)
            logger.close(*call)
        except Exception as error:  # of a network, a server, a disk: training does not depend on them
            why = " ".join(shortened(error, 300).split()) or type(error).__name__
            self._say(f"{self._name} logs no more, training goes on: {why}")

    def log(self, epoch: int, curves: Curves) -> None:
        """Take an epoch to be logged."""
        self._calls.put((epoch, curves))

    def close(self, end: str) -> None:
        """Wait for what is not logged yet, but not for ever."""
        self._calls.put((end,))
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"{self._name} has not taken everything within {PATIENCE:.0f} seconds: not waited for any longer")


# Makes the logger of a run folder; the function is told in a line what the user should know. TensorBoard writes an epoch before
# the checkpoint is written, so it is no thread's.
LOGGERS: dict[LoggerName, Callable[[Path, Callable[[str], object]], Logger]] = {
    "tensorboard": lambda folder, say: TensorBoard(folder),
    "wandb": partial(InThread, Wandb, "wandb"),
    "mlflow": partial(InThread, MLflow, "mlflow"),
}


class Loggers:
    """Those of a run, by name; use as a context manager, whose end they take as the run's."""

    def __init__(self, names: tuple[LoggerName, ...], folder: Path, say: Callable[[str], object]) -> None:
        self._loggers = [LOGGERS[name](folder, say) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):  # at once
            return
        end = "FINISHED" if error is None else "KILLED" if isinstance(error, Stopped) else "FAILED"
        for logger in self._loggers:
            logger.close(end)

    def log(self, record: Metrics) -> None:
        """Add an epoch's record."""
        curves = {
            "loss/train": record["train_loss"],
            "loss/eval": record["eval_loss"],
            "accuracy/train": record["train_accuracy"],
            "accuracy/eval": record["eval_accuracy"],
            "accuracy/best": record["best_accuracy"],
            "speed/images_per_second": record["images_per_second"],
            "learning_rate": record["learning_rates"][-1],
        }
        measured = {tag: value for tag, value in curves.items() if value is not None}
        for logger in self._loggers:
            logger.log(record["epoch"], measured)
