"""One run in many processes: the shares are one process's batches, the sums its gradients; a rank that dies costs an epoch."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from fastcifar import distributed
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import load_data, parse_command
from fastcifar.distributed import ALONE, LostRankError, World
from fastcifar.errors import InputError, Stopped
from fastcifar.evaluate import Evaluator
from fastcifar.models import ARCHITECTURES
from fastcifar.models.sync_norm import SyncNorm
from fastcifar.optimization import build_optimizer
from fastcifar.plan import settled
from fastcifar.recipes import RunOptions
from fastcifar.run_folder import RunFolder
from fastcifar.signals import StopRequest
from fastcifar.state import build_state, build_step
from fastcifar.train import train, train_as
from tests.conftest import REPOSITORY, run_cli

CPU = torch.device("cpu")
SIZES = ("--batch-size", "32", "--limit-train", "96", "--limit-test", "21", "--eval-batch-size", "8")


@dataclass(frozen=True)
class ThreadsWorld(World):
    """A world whose ranks are threads of this process."""

    board: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def add(self, tensors):
        self.board[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(60)
        for place, tensor in enumerate(tensors):
            tensor.copy_(sum(self.board[rank][place] for rank in range(self.size)))
        self.barrier.wait(60)


def worlds_of(size):
    """Those of all ranks."""
    first = ThreadsWorld(size=size, barrier=threading.Barrier(size))
    return [replace(first, rank=rank) for rank in range(size)]


def in_threads(function, values):
    """[function(value) of each rank's value]."""
    with ThreadPoolExecutor(len(values)) as threads:
        return list(threads.map(function, values))


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)


@pytest.fixture
def prepared(betons):
    """Gives (state, step, data, command) of a rank of `world`."""

    @cache
    def loaded(recipe, *arguments):
        options = ("--arch", "narrow", "--recipe", recipe, "--data", str(betons), "--held-out", "0", "--precision", "fp32")
        command = parse_command([*options, *SIZES, *arguments])
        return command, load_data(command, CPU)

    def prepare(world, *arguments, linear=False):
        command, data = loaded(*arguments)
        state = build_state(command.arch, command.settings, command.run, data, CPU, world)
        if linear:  # without statistics of the batch
            state.model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
            torch.manual_seed(0)
            nn.init.normal_(state.model[1].weight, std=0.01)
            rule = {"momentum": 0.9, "weight_decay": 0.0, "decay_norm_and_bias": True}
            state.optimizer = build_optimizer(state.model, "sgd", **rule)
        return state, build_step(state, command.settings, command.run, data), data, command

    return prepare


SHARED = {
    "policy, noise, mixup and CutMix": ("light_resnet18_v2_45",),
    "streamed, mixup": ("se_resnet18", "--stream"),
    "PyTorch's operations": ("se_resnet18", "--kernels", "torch"),
    "resized, never mixed": ("resnet18", "--sizes", "24"),
}


@pytest.mark.parametrize("case", SHARED)
def test_pixels_and_labels_are_one_processs(prepared, monkeypatch, case):
    """Every sample's, in the order of the one process: mixed with the same partner, dropped by the same keys."""
    monkeypatch.setattr(World, "add", lambda *_: None)

    def epoch(world):
        _, step, _, _ = prepared(world, *SHARED[case])
        seen = []

        def loss(images, labels, partners, lam):
            targets = lam * labels + (1 - lam) * partners
            seen.append([images.clone(), targets, *([step._keys.samples] if step._keys else [])])
            return torch.zeros((), requires_grad=True), torch.zeros(())

        step._loss = loss
        step.begin(2, [0.1] * 3)
        for _ in range(3):
            step()
        return seen

    whole = epoch(ALONE)
    for size in (2, 4):
        ranks = [epoch(World(rank, rank, size)) for rank in range(size)]
        for number, batch in enumerate(whole):
            for part, expected in enumerate(batch):
                assert torch.equal(torch.cat([rank[number][part] for rank in ranks]), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_loss_and_hits_are_the_whole_batchs(prepared, reduction):
    def gradients(built):
        state, step, _, _ = built
        tally = step.begin(0, [1e-9] * 3)
        step()
        return [*(parameter.grad for parameter in state.model.parameters()), tally.losses[:1], tally.hits.float()]

    options = ("light_resnet18", "--loss-reduction", reduction)
    whole = gradients(prepared(ALONE, *options, linear=True))
    for rank in in_threads(gradients, [prepared(world, *options, linear=True) for world in worlds_of(2)]):
        for value, expected in zip(rank, whole, strict=True):
            torch.testing.assert_close(value, expected)
    assert (whole[0].norm() > 100) == (reduction == "sum")  # of 8, 32 times as large


@pytest.mark.parametrize("size", [1, 2, 4])
def test_synchronised_batch_norm_is_pytorchs_of_all_batches_together(size):
    torch.manual_seed(0)
    x, dy = (torch.randn(8, 5, 4, 4).to(memory_format=torch.channels_last) * 3 + 7 for _ in range(2))
    weight, bias = torch.randn(5), torch.randn(5)

    def results(normalise, x, dy):
        inputs = [value.clone().requires_grad_() for value in (x, weight, bias)]
        y = normalise(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    y, dx, dweight, dbias = results(lambda x, w, b: F.batch_norm(x, None, None, w, b, True), x, dy)
    xs, dys = x.chunk(size), dy.chunk(size)
    ranks = in_threads(
        lambda world: results(lambda *v: SyncNorm.apply(*v, 1e-5, world)[0], xs[world.rank], dys[world.rank]), worlds_of(size)
    )
    for rank, expected_y, expected_dx in zip(ranks, y.chunk(size), dx.chunk(size), strict=True):
        torch.testing.assert_close(rank[0], expected_y)
        torch.testing.assert_close(rank[1], expected_dx, atol=2e-5, rtol=1e-4)  # a difference of sums of 128 values near 7
    torch.testing.assert_close(sum(rank[2] for rank in ranks), dweight, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(sum(rank[3] for rank in ranks), dbias)


def test_statistics_are_the_mean_of_the_ranks_and_evaluation_counts_every_image_once(prepared):
    """Batch norm's running means are 1 and 3 before; 21 images are 11 and 10."""
    ranks = [prepared(world, "light_resnet18", "--ema-decay", "0.9") for world in worlds_of(2)]

    def share(built):
        state, _, data, command = built
        for name, buffer in [*state.model.named_buffers(), *state.average.model.named_buffers()]:
            if name.endswith("running_mean"):
                buffer.fill_(1 + 2 * state.world.rank)
        state.share_statistics()
        means = [buffer for name, buffer in state.average.model.named_buffers() if name.endswith("running_mean")]
        return means, state.evaluator(data, command.settings, command.run)(), state.digest()

    (means, result, digest), (_, other, other_digest) = in_threads(share, ranks)
    assert {float(value) for mean in means for value in mean} == {2.0}
    assert digest == other_digest
    state, _, data, _ = ranks[0]
    whole = Evaluator(state._classifier(data), data.select, batch_size=8)()
    assert result.confusion == other.confusion == whole.confusion
    assert result.images == 21
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)  # float32 probabilities, in batches of other sizes


ENVIRONMENTS = {
    "RANK is set without WORLD_SIZE, MASTER_PORT": {"RANK": "0", "MASTER_ADDR": "a"},
    "no place among processes: RANK=2, WORLD_SIZE=2": {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
    "no place among processes: RANK=x, WORLD_SIZE=2": {"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
}


@pytest.mark.parametrize("message", ENVIRONMENTS)
def test_an_environment_that_makes_no_sense_is_refused(message):
    with pytest.raises(InputError, match=message):
        World.of(ENVIRONMENTS[message])


def test_torchruns_environment_is_understood():
    told = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert World.of(told) == World(5, 1, 8)
    assert World.of(told | {"TORCHELASTIC_RESTART_COUNT": "2"}) == World(5, 1, 8, 2)
    assert World.of({"WORLD_SIZE": "8"}) == ALONE


UNEVEN = {
    3: "batch_size must be a multiple of the 3 processes, .* got 32",
    32: "of the 32 processes, two images each at least, got 32",
    97: "97 processes are more than the 96 training images",
}


@pytest.mark.parametrize("size", UNEVEN)
def test_shares_that_do_not_come_out_even_are_refused(betons, tmp_path, size):
    command = parse_command(["--data", str(betons), *SIZES, "--out", str(tmp_path / "run")])
    with pytest.raises(InputError, match=UNEVEN[size]):
        train(command, Console(quiet=True), World(size=size))
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="rank 3 needs GPU 3 of its machine, which has 2: lower --nproc-per-node"):
        World(3, 3, 4).take(torch.device("cuda"))


def test_ranks_that_are_not_alike_are_refused(monkeypatch):
    monkeypatch.setattr(
        distributed.dist, "all_gather_object", lambda everyones, value: everyones.__setitem__(slice(None), [value, {"seed": 2}])
    )
    with pytest.raises(InputError, match="rank 1 has another seed: 2, and rank 0 1: make them the same"):
        World(size=2).require_alike({"seed": 1})


def test_a_lost_rank_is_named_and_one_rank_speaks(monkeypatch):
    store = distributed.dist.HashStore()
    monkeypatch.setattr(distributed, "_store", lambda: store)
    monkeypatch.setattr(distributed, "PATIENCE", 0.05)
    ended = subprocess.Popen(["true"])
    ended.wait()
    for rank, process in enumerate((os.getpid(), ended.pid)):
        store.set(f"process {rank}", f"{distributed.socket.gethostname()} {process}")
    closed = LostRankError("connection closed")
    assert World(size=2).lost(closed).startswith(f"rank 1 of 2 is gone (process {ended.pid} on ")
    store.set("process 1", f"another {ended.pid}")
    assert World(size=2).lost(closed) == "no answer from rank 1 on another"
    store.set("noticed on another", "")
    assert World(size=2).lost(closed) == "the 2 processes lost touch (connection closed)"
    assert [World(rank, size=3).speaks() for rank in (1, 0, 2)] == [True, False, False]
    assert World(size=2).lost(closed) == ""


def test_without_the_store_every_rank_speaks(monkeypatch):
    def gone(*_):
        raise RuntimeError("connection reset")

    store = SimpleNamespace(set=gone, wait=gone, add=gone)
    monkeypatch.setattr(distributed, "_store", lambda: store)
    assert World(1, size=2).speaks()
    assert World(1, size=2).lost(LostRankError("reset")) == "the 2 processes lost touch (reset)"


def test_synchronised_batch_norm_is_not_compiled():
    assert not settled(RunOptions(sync_bn=True), torch.device("cuda")).compile
    with pytest.raises(InputError, match="compile must be off with --sync-bn, got True"):
        parse_command(["--sync-bn", "--compile"])


def test_a_collective_that_fails_is_a_lost_rank():
    with pytest.raises(LostRankError, match="closed by peer"), distributed._noticing_loss():
        raise RuntimeError("Connection closed by peer")


def test_all_ranks_stop_after_the_same_step(monkeypatch):
    monkeypatch.setattr(World, "largest", lambda self, number: 15)  # of the other rank
    with StopRequest(World(size=2)) as stop:
        for _ in range(2):  # torchrun's comes after a terminal's own
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            stop.check()
    assert stopped.value.number == 15


def test_torchruns_next_attempt_goes_on_with_the_run(betons, tmp_path):
    arch = ("--arch", "narrow", "--recipe", "resnet18", "--no-plots", "--epochs", "2")
    arguments = [*arch, "--data", str(betons), *SIZES, "--out", str(tmp_path / "run")]
    train_as(World(), [*arguments, "--stop-after", "1"])
    train_as(World(restarts=1), arguments)
    assert RunFolder(tmp_path / "run").read_summary()["epochs_trained"] == 2


# Real processes.

# Two processes sum in another order than one: each step rounds differently by float32's 6e-8, and training multiplies what
# differs, the more the higher its rate. At this rate 18 steps end 5e-7 apart, |a - b| / |a| over all weights and statistics,
# and one process with two threads 4e-7 from itself with one; at 0.01 both are 1e-5 apart. The bound is twenty times that.
BOUND = 1e-5
FLAGS = (
    "--arch", "narrow", "--recipe", "light_resnet18", "--held-out", "0", "--precision", "fp32", "--no-plots", "--epochs", "3",
    "--batch-size", "32", "--limit-train", "192", "--block-dropout", "0.1", "--peak-lr", "0.001", "--sync-bn",
)  # fmt: skip
SCRIPT = "tests/trained_by_torchrun.py"


def torchrun(*arguments, processes=2, **variables):
    """Start `processes` ranks of a command; the finished process of torchrun. variables: of the environment."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | variables
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
    return run_cli(*launcher, *arguments, env=environment)


def weights(folder):
    values = load_checkpoint(Path(folder) / "last.pt", CPU).model.values()
    return torch.cat([value.flatten().double() for value in values])


def apart(one, other):
    """|a - b| / |a| of the weights in two run folders."""
    one, other = weights(one), weights(other)
    return float((one - other).norm() / one.norm())


@pytest.fixture(scope="module")
def whole(betons, tmp_path_factory):
    """The folder of an undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = torchrun(SCRIPT, *FLAGS, "--data", betons, "--out", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 3/3") == 1
    return out


@pytest.mark.slow
def test_two_processes_give_one_processs_weights(betons, tmp_path, whole):
    result = torchrun(SCRIPT, *FLAGS, "--data", betons, "--out", tmp_path / "one", processes=1)
    assert result.returncode == 0, result.stderr
    assert apart(tmp_path / "one", whole) < BOUND
    pairs = zip(*(RunFolder(folder).read_metrics() for folder in (tmp_path / "one", whole)), strict=True)
    for one, two in pairs:
        for name in ("train_loss", "train_accuracy", "eval_loss"):
            assert two[name] == pytest.approx(one[name], rel=BOUND)
    assert RunFolder(whole).read_summary()["processes"] == 2


@pytest.mark.slow
def test_a_killed_rank_is_one_line_and_one_process_goes_on(betons, tmp_path, whole):
    out = tmp_path / "run"
    result = torchrun(SCRIPT, *FLAGS, "--data", betons, "--out", out, AT=f"1 2 3 {signal.SIGKILL:d}")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1 of 2 is gone (process ")
    assert line.endswith(f"go on with: torchrun ... -m fastcifar.train --resume {out}")
    assert load_checkpoint(out / "last.pt", CPU).epoch == 1
    result = torchrun(SCRIPT, "--resume", out, processes=1)
    assert result.returncode == 0, result.stderr
    assert apart(whole, out) < BOUND


@pytest.mark.slow
def test_one_processs_run_goes_on_in_two(betons, tmp_path, whole):
    out = tmp_path / "run"
    assert torchrun(SCRIPT, *FLAGS, "--data", betons, "--out", out, "--stop-after", "1", processes=1).returncode == 0
    result = torchrun(SCRIPT, "--resume", out)
    assert result.returncode == 0, result.stderr
    assert apart(whole, out) < BOUND


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_a_resume_ends_with_the_same_bits(betons, tmp_path, whole):
    out = tmp_path / "run"
    result = torchrun(SCRIPT, *FLAGS, "--data", betons, "--out", out, AT=f"1 2 3 {signal.SIGTERM:d}")
    assert result.returncode != 0
    assert result.stderr.count("interrupted: saved in epoch 2 after step 3 of 6") == 1
    assert torchrun(SCRIPT, "--resume", out).returncode == 0
    assert torch.equal(weights(whole), weights(out))


@pytest.mark.slow
def test_torchruns_restart_ends_with_the_same_bits(betons, tmp_path, whole):
    out = tmp_path / "run"
    restarts = ("--max-restarts", "1", SCRIPT, *FLAGS, "--data", betons, "--out", out)
    result = torchrun(*restarts, AT=f"0 2 3 {signal.SIGKILL:d}")
    assert result.returncode == 0, result.stderr
    assert "rank 0 of 2 is gone" in result.stderr
    assert "going on after epoch 1" in result.stdout
    assert torch.equal(weights(whole), weights(out))


REFUSED = {
    "error: batch_size must be a multiple of the 2 processes, two images each at least, got 31": (SCRIPT, "--batch-size", "31"),
    "error: rank 1 has another command line": (
        "--no-python", "bash", "-c", f'exec {sys.executable} {SCRIPT} "$@" --seed $RANK', "bash",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_said_once_and_nothing_is_written(betons, tmp_path, message):
    result = torchrun(*REFUSED[message], "--data", betons, "--out", tmp_path / "run", PATIENCE="60")
    lines = [line for line in result.stderr.splitlines() if "error: " in line and "torch" not in line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(message)
    assert "exitcode  : 2" in result.stderr
    assert not (tmp_path / "run").exists()
