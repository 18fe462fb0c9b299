"""Where an epoch's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow. A row of LOGGERS is a logger.

Each is imported only where `--log` names it. Those that talk to a server do so in a thread: training waits for no network.
"""

import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
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
# Seconds in which all servers together have to take the last figures: of a run that ended, of one that did not.
PATIENCE, HASTE = 60.0, 5.0
Values = dict[str, float]  # of an epoch, by curve


class Logger(Protocol):
    """What shows a run's curves."""

    def log(self, epoch: int, values: Values) -> None:
        """Add an epoch, from 1 on."""

    def close(self, end: str) -> None:
        """The run ended; one of EXIT_CODES."""


class TensorBoard:
    """Events in the run folder; opened by the first epoch, so that TensorBoard's import delays no first step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def log(self, epoch: int, values: Values) -> None:
        """Add an epoch; what an interrupted run wrote for it and later ones is purged."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._put_before_now()
            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
        for tag, value in values.items():
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

    def log(self, epoch: int, values: Values) -> None:
        """Add an epoch; one that an interrupted run has sent already is ignored."""
        self._run.log(values, step=epoch)

    def close(self, end: str) -> None:
        """Send the rest."""
        self._run.finish(exit_code=EXIT_CODES[end])


class MLflow:
    """A run of MLflow, in mlflow.db beside the run folder unless MLFLOW_TRACKING_URI says otherwise."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        import mlflow

        self._mlflow, self._is_local = mlflow, "MLFLOW_TRACKING_URI" not in os.environ
        if self._is_local:
            mlflow.set_tracking_uri(f"sqlite:///{folder.resolve().parent / 'mlflow.db'}")
        try:
            self._start(folder)
        except Exception:
            self._forget()
            raise

    def _start(self, folder: Path) -> None:
        before = known_id(folder, "mlflow")
        run = self._mlflow.start_run(run_id=before, run_name=None if before else folder.resolve().name)
        if before is None:
            self._mlflow.log_params(flat(config_of(folder)))
            keep_id(folder, "mlflow", run.info.run_id)

    def log(self, epoch: int, values: Values) -> None:
        """Add an epoch."""
        self._mlflow.log_metrics(values, step=epoch)

    def close(self, end: str) -> None:
        """Say how the run ended."""
        try:
            self._mlflow.end_run(end)
        finally:
            self._forget()

    def _forget(self) -> None:
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
        self._epochs: SimpleQueue[tuple[int, Values] | None] = SimpleQueue()  # None: the run ended
        self._end, self._is_left = "", False
        self._thread = Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def _work(self) -> None:
        logger: Logger | None = None
        try:
            logger = self._kind(self._folder)
            while (epoch := self._epochs.get()) is not None:
                logger.log(*epoch)
            logger.close(self._end)
        except Exception as error:  # of a network, a server, a disk: training does not depend on them
            if not self._is_left:
                why = " ".join(shortened(error, 300).split()) or type(error).__name__
                self._say(f"{self._name} logs no more, training goes on: {why}")
            if logger is not None:
                with suppress(Exception):
                    logger.close("FAILED")

    def log(self, epoch: int, values: Values) -> None:
        """Take an epoch to be logged."""
        self._epochs.put((epoch, values))

    def close(self, end: str) -> None:
        """Take the end; `wait` waits for it."""
        self._end = end
        self._epochs.put(None)

    def wait(self, until: float) -> None:
        """Wait for what is not logged yet, but not beyond a time of the monotonic clock, nor beyond Ctrl-C."""
        with suppress(KeyboardInterrupt):
            self._thread.join(min(1.0, max(0.0, until - time.monotonic())))
            if self._thread.is_alive() and (seconds := until - time.monotonic()) > 0:
                self._say(f"waiting for {self._name}, {seconds:.0f} seconds at most (Ctrl-C: no longer)")
                self._thread.join(seconds)
        self._is_left = self._thread.is_alive()
        if self._is_left:
            self._say(f"{self._name} has not taken everything: not waited for any longer")


# Makes the logger of a run folder; the function is told in a line what the user should know. TensorBoard writes an epoch before
# the checkpoint is written, so it is no thread's.
LOGGERS: dict[LoggerName, Callable[[Path, Callable[[str], object]], Logger]] = {
    "tensorboard": lambda folder, say: TensorBoard(folder),
    "wandb": partial(InThread, Wandb, "wandb"),
    "mlflow": partial(InThread, MLflow, "mlflow"),
}


class Loggers:
    """Those of a run; use as a context manager, whose end they take as the run's. say: told what the user should know."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say
        self._loggers: list[Logger] = []

    def open(self, names: tuple[LoggerName, ...], folder: Path) -> None:
        """Begin to log the run in `folder`, whose config.json is written."""
        self._loggers = [LOGGERS[name](folder, self._say) for name in dict.fromkeys(names)]

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):  # a second Ctrl-C: nothing is waited for
            return
        end = "FINISHED" if error is None else "KILLED" if isinstance(error, Stopped) else "FAILED"
        with ExitStack() as every:  # also when one fails, as TensorBoard does on a full disk
            every.callback(self._wait, PATIENCE if error is None else HASTE)  # the last of all
            for logger in self._loggers:
                every.callback(logger.close, end)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for logger in self._loggers:
            if isinstance(logger, InThread):
                logger.wait(until)

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
