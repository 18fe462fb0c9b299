"""Trainings on a Ray cluster: `OnRay` gives each to a worker, which sends its run folder back as it grows.

The driver keeps what a worker sent last; a training whose worker was lost goes on from there on another one. Ray comes with the
extra `cluster`; nothing else of fastcifar imports it.
"""

import hashlib
import logging
import os
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fastcifar import __version__, files
from fastcifar.errors import InputError, shortened
from fastcifar.launch import FAILED, Event, Job, events_of, latest
from fastcifar.versions import installed

SYNC_SECONDS = 5.0  # at least between two times that a run folder travels
POLL_SECONDS = 0.2  # between two looks into the mailbox
LISTENING_SECONDS = 10.0  # to wait for a cluster's port to answer
ATTEMPTS = 5  # workers that a training may lose
HEAD = {"node:__internal_head__": 0.001}  # Ray's name for the head node as a resource
# In the order in which they are written: a state is never there before the metrics that belong to it.
ORDER = ("config.json", "metrics.jsonl", "best.pt", "last.pt", "summary.json")
BETONS = ("train.beton", "train.json", "test.beton", "test.json")


@dataclass(frozen=True)
class Letter:
    """What a worker tells of a training."""

    name: str  # of the job
    attempt: int
    line: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # of the run folder, those that changed


class Mailbox:
    """Where workers put letters until the driver takes them; an actor on the head node."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []

    def put(self, letter: Letter) -> None:
        """Leave a letter."""
        self._letters.append(letter)

    def take(self) -> list[Letter]:
        """All letters since the last time."""
        letters, self._letters = self._letters, []
        return letters


class OnRay:
    """Trains on a Ray cluster.

    on: "" for a Ray of this machine's own, "auto" or an address for a cluster that exists. data: folder of the betons, which
    travel once to each node. cores: of a CPU for each run, 0 = all of this machine's. per_gpu: runs that share a GPU; they are
    given GPUs where the cluster has some. Raises InputError for a cluster that cannot be reached or has other versions.
    """

    def __init__(self, on: str, data: Path, *, cores: int = 0, per_gpu: int = 1) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing of ours tells anyone anything
        os.environ.setdefault("RAY_worker_niceness", "0")  # of a Ray of our own; its 15 starves beside anything
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong we say ourselves, in a line
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        _require_listener(on)
        # "local", since without it Ray looks for the cluster that was last started here, be it long dead.
        here: dict[str, Any] = {"address": on} if on else {"address": "local", "include_dashboard": False}
        try:
            ray.init(**here, log_to_driver=False, logging_level=logging.ERROR, namespace="fastcifar")
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
            told = shortened(_first_line(error), 120)
            raise InputError(f"no Ray cluster at {on or 'this machine'} ({told}): check --on and RAY_AUTH_TOKEN") from None
        self.threads = cores or os.cpu_count() or 1
        self._gpus = 1 / per_gpu if ray.cluster_resources().get("GPU") else 0.0
        self._require_room()
        self._require_alike()
        self._mailbox: Any = ray.remote(num_cpus=0, resources=HEAD)(Mailbox).remote()
        self._betons = {name: ray.put((data / name).read_bytes()) for name in BETONS}
        manifests = b"".join((data / name).read_bytes() for name in BETONS if name.endswith(".json"))
        self._digest = hashlib.sha256(manifests).hexdigest()[:24]  # of the betons too: their sha256 is in there

    def events(self, jobs: deque[Job]) -> Iterator[Event]:
        """Train all `jobs`, also those that are appended meanwhile; tell what happens to them."""
        running: dict[Any, Job] = {}
        attempts: Counter[str] = Counter()
        while jobs or running:
            while jobs:
                job = jobs.popleft()
                running[self._start(job, attempts[job.name])] = job
            ended, _ = ray.wait(list(running), num_returns=len(running), timeout=POLL_SECONDS)
            by_name = {job.name: job for job in running.values()}
            for letter in ray.get(self._mailbox.take.remote()):
                if letter.name in by_name and letter.attempt == attempts[letter.name]:
                    job = by_name[letter.name]
                    _receive(job.path, letter.files)
                    yield _logged(Event(job, letter.line))
            for reference in ended:
                job = running.pop(reference)
                yield from self._end(reference, job, jobs, attempts)

    def close(self) -> None:
        """End what still runs, and leave the cluster."""
        ray.shutdown()

    def _start(self, job: Job, attempt: int) -> Any:
        task = ray.remote(_train).options(
            num_cpus=self.threads if not self._gpus else min(self.threads, 1), num_gpus=self._gpus, max_retries=0, name=job.name
        )  # fmt: skip
        return task.remote(
            Job(Path(), job.name, job.flags, job.stop_after), attempt, _contents(job.path, {}), self._betons, self._digest,
            self.threads, self._mailbox,
        )  # fmt: skip

    def _end(self, reference: Any, job: Job, jobs: deque[Job], attempts: Counter[str]) -> Iterator[Event]:
        try:
            yield _logged(Event(job, ended=True, error=ray.get(reference)))
        except RayTaskError as error:  # our own code failed there
            yield _logged(Event(job, ended=True, error=shortened(_first_line(error.cause), 300)))
        except RayError as error:  # the worker is gone
            attempts[job.name] += 1
            if attempts[job.name] > ATTEMPTS:
                told = f"{ATTEMPTS + 1} workers were lost: {shortened(_first_line(error), 200)}"
                yield _logged(Event(job, ended=True, error=told))
            else:
                yield _logged(Event(job, "its worker was lost; it goes on elsewhere"))
                jobs.append(job)

    def _require_room(self) -> None:
        """Raise InputError where no node could ever take a run."""
        most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if not self._gpus and most < self.threads:
            ray.shutdown()
            raise InputError(
                f"no node has {self.threads} cores for a run, the largest has {most:g}: give --cores {int(most)} or less"
            )

    def _require_alike(self) -> None:
        """Raise InputError naming a node whose versions are not the driver's."""
        here, task = _versions(), ray.remote(num_cpus=0)(_versions)
        for node in [node for node in ray.nodes() if node["Alive"]]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                found = ray.get(task.options(scheduling_strategy=there, max_retries=0).remote(), timeout=120)
            except RayError as error:
                found = {"fastcifar": shortened(_first_line(error), 120)}
            if found != here:
                ray.shutdown()
                told = ", ".join(
                    f"{name} {found.get(name)}, here {here.get(name)}" for name in here if found.get(name) != here[name]
                )
                raise InputError(f"node {node['NodeManagerHostname']} has {told}: install the same there, nothing was started")


def _require_listener(on: str) -> None:
    """Raise InputError where nothing listens at `on`, HOST:PORT or ray://HOST:PORT: Ray itself asks for two minutes."""
    host, _, port = on.rpartition("://")[2].rpartition(":")
    if on in ("", "auto"):
        return
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--on takes auto, none, HOST:PORT or ray://HOST:PORT, got {shortened(on)}")
    try:
        socket.create_connection((host, int(port)), timeout=LISTENING_SECONDS).close()
    except OSError as error:
        raise InputError(f"no Ray cluster at {on} ({error.strerror or error}): check --on, nothing was started") from None


def _train(
    job: Job, attempt: int, folder: dict[str, bytes], betons: dict[str, Any], digest: str, threads: int, mailbox: Any
) -> str:
    """A worker's part: train `job` in a folder of its own, `folder` being what it has already; return why it failed, or ""."""
    with tempfile.TemporaryDirectory(prefix="fastcifar-run-") as place:
        data = _placed(betons, digest)
        here = replace(job, runs=Path(place), flags=latest([*job.flags, "--data", str(data)]))
        here.path.mkdir(parents=True)
        for name, content in folder.items():
            (here.path / name).write_bytes(content)
        sent: dict[str, tuple[int, int]] = {}
        _contents(here.path, sent)
        last = time.monotonic()
        for event in events_of(here, threads):
            due = event.ended or time.monotonic() - last > SYNC_SECONDS
            last = time.monotonic() if due else last
            letter = Letter(job.name, attempt, event.line, _contents(here.path, sent) if due else {})
            ray.get(mailbox.put.remote(letter))
        return event.error


def _placed(betons: dict[str, Any], digest: str) -> Path:
    """The node's own copy of the betons, written by whoever needs it first."""
    folder = Path(tempfile.gettempdir()) / f"fastcifar-{os.getuid()}-{digest}"
    for name, reference in betons.items():
        if not (folder / name).exists():
            files.write_bytes(folder / name, ray.get(reference))
    return folder


def _contents(path: Path, sent: dict[str, tuple[int, int]]) -> dict[str, bytes]:
    """{name: content} of a run folder's files that are not as they were `sent`, which is brought up to date."""
    changed: dict[str, bytes] = {}
    there = {file.name: file for file in path.glob("*") if file.is_file() and not file.name.endswith(files.PARTIAL)}
    # Read in the opposite order of writing: what is read later may be newer, never older.
    for name in sorted(there, key=_rank, reverse=True):
        with suppress(FileNotFoundError):
            state = there[name].stat()
            if sent.get(name) != (state.st_mtime_ns, state.st_size):
                sent[name] = (state.st_mtime_ns, state.st_size)
                changed[name] = there[name].read_bytes()
    return changed


def _receive(path: Path, content: dict[str, bytes]) -> None:
    for name in sorted(content, key=_rank):
        files.write_bytes(path / Path(name).name, content[name])


def _logged(event: Event) -> Event:
    """Keep what a training printed elsewhere where one that runs here has it."""
    line = FAILED + event.error if event.error else event.line
    if line:
        log = event.job.path.with_name(f"{event.job.name.rpartition('/')[2]}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return event


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _versions() -> dict[str, str | None]:
    return {"fastcifar": __version__, **installed("torch", "triton", "numba")}


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
