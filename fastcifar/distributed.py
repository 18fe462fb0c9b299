"""One run in many processes, as torchrun starts them: which of them this one is, and what they tell one another.

Every process (rank) trains on its share of each batch. One collective a step sums gradients, loss and hits; all else is
computed alike everywhere, so ranks agree on every decision without asking. NCCL between GPUs, gloo between CPUs.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastcifar.errors import InputError, Stopped, shortened

TIMEOUT = timedelta(minutes=10)  # for a rank that hangs; one that died closes its connections, which is noticed at once
PATIENCE = 2.0  # seconds in which another rank may say why all of them end
STARTED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets beside RANK


class LostRankError(Exception):
    """Another process of the run does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is; by default the only one.

    What asks or tells the others must be called by all ranks, in the same order; it raises LostRankError where one is gone.
    """

    rank: int = 0
    local_rank: int = 0  # on its machine: the number of its GPU
    size: int = 1
    restarts: int = 0  # by torchrun's --max-restarts

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "World":
        """The world that torchrun describes; without RANK, this process alone. Raises InputError."""
        if "RANK" not in environment:
            return cls()
        if missing := [name for name in STARTED if name not in environment]:
            raise InputError(f"RANK is set without {', '.join(missing)}: start by torchrun, or unset RANK")
        names = {"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "", "TORCHELASTIC_RESTART_COUNT": "0"}
        try:
            world = cls(*(int(environment.get(name, default)) for name, default in names.items()))
        except ValueError:
            world = cls(size=0)
        if not 0 <= world.rank < world.size:
            told = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
            raise InputError(f"no place among processes: {told}: start by torchrun, or unset RANK")
        return world

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, batches: Tensor, *, successor: bool) -> Tensor:
        """This rank's columns of batches [steps, B]: B / size of them, and with `successor` the one after its last."""
        if self.size == 1:
            return batches
        count = batches.shape[1] // self.size
        return batches.roll(-self.rank * count, 1)[:, : count + successor]

    def require_divides(self, batch_size: int, images: int) -> None:
        """Raise InputError unless every rank has two images of each batch at least, and as many as any other."""
        if self.size > images:
            raise InputError(f"{self.size} processes are more than the {images:,} training images: lower --nproc-per-node")
        if self.size > 1 and (batch_size % self.size or batch_size < 2 * self.size):
            raise InputError(
                f"batch_size must be a multiple of the {self.size} processes, two images each at least, got {batch_size}"
            )

    def take(self, device: torch.device) -> None:
        """Make this rank's GPU the current one. Raises InputError when its machine has fewer."""
        if self.size == 1 or device.type != "cuda":
            return
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"rank {self.rank} needs GPU {self.local_rank} of its machine, which has {torch.cuda.device_count()}: "
                "lower --nproc-per-node, or use --device cpu"
            )
        torch.cuda.set_device(self.local_rank)

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the sums over all ranks of tensors of one dtype, in place, by one collective."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with _noticing_loss():
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers; between hosts, whatever the GPUs do."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        with _noticing_loss():
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers)

    def require_alike(self, values: dict[str, Any]) -> None:
        """Raise InputError on every rank where one has another value than the first, naming both."""
        everyones: list[dict[str, Any]] = [{}] * self.size
        with _noticing_loss():
            dist.all_gather_object(everyones, values)
        for rank, its in enumerate(everyones):
            for name, first in everyones[0].items():
                if its[name] != first:
                    both = f"{shortened(its[name])}, and rank 0 {shortened(first)}"
                    raise InputError(f"rank {rank} has another {name}: {both}: make them the same")

    def lost(self, error: LostRankError) -> str:
        """Whom the others miss; "" where another rank says why the run ends."""
        store, here, end = _store(), socket.gethostname(), time.monotonic() + PATIENCE
        with suppress(RuntimeError):  # the store's machine is the one that is gone
            store.set(f"noticed on {here}", "")
            places = [store.get(f"process {rank}").decode().rsplit(maxsplit=1) for rank in range(self.size)]
            while time.monotonic() < end:
                if store.check(["said"]):
                    return ""
                for rank, (host, process) in enumerate(places):
                    if host == here and _has_ended(int(process)):
                        return f"rank {rank} of {self.size} is gone (process {process} on {host}; killed, or out of memory?)"
                time.sleep(0.05)
            silent = [f"{rank} on {host}" for rank, (host, _) in enumerate(places) if not store.check([f"noticed on {host}"])]
            if silent:
                return f"no answer from rank {', '.join(silent)}"
        return f"the {self.size} processes lost touch ({error})"

    def speaks(self) -> bool:
        """Whether this rank tells the user why all of them end: rank 0 if it has something to tell, else the first other."""
        store = _store()
        if self.rank:
            with suppress(RuntimeError):  # nothing was said in time
                store.wait(["said"], timedelta(seconds=PATIENCE))
        with suppress(RuntimeError):
            return bool(store.add("said", 1) == 1)
        return True  # the store is gone, and nobody can be asked

    def connect(self) -> None:
        """Meet the other ranks. Raises InputError."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
            store = PrefixStore(f"attempt {self.restarts}", store)  # torchrun may keep one store for all
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            address, why = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", shortened(error, 200)
            raise InputError(f"rank {self.rank} finds no others at {address} ({why}): check MASTER_ADDR") from None
        _store().set(f"process {self.rank}", f"{socket.gethostname()} {os.getpid()}")


ALONE = World()


@contextmanager
def joined() -> Iterator[World]:
    """Within this block the processes of the run are connected; what ends all of them is told by one.

    Output of other ranks than the first is dropped. Raises InputError when the environment or the connection is wrong.
    """
    world = World.of(os.environ)
    if world.size == 1:
        yield world
        return
    if world.rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    world.connect()
    try:
        yield world
    except SystemExit:
        raise
    except BaseException as error:
        if not world.speaks():
            raise SystemExit(128 + error.number if isinstance(error, Stopped) else 2) from None
        if isinstance(error, InputError) and world.rank:
            raise InputError(f"rank {world.rank}: {error}") from None
        raise
    dist.destroy_process_group()


def _store() -> Any:
    """What torchrun keeps for all ranks, alive or not."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(shortened(error, 200)) from error


def _has_ended(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
