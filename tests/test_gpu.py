"""What only a CUDA device can show: the same pixels as the CPU, exact resume, the compiled and the captured step. Run by
`make gpu-check`."""

import io
import os
import signal

import pytest
import torch
from rich.console import Console

from fastcifar.augmentation import Augmentation, augment, draw
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, epoch_order, load_resident
from fastcifar.errors import Stopped
from fastcifar.recipes import RECIPES
from fastcifar.run_folder import RunFolder
from fastcifar.step import TrainStep
from fastcifar.train import train
from kernels.augment import augment_fused

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(betons, out, *arguments, console=None):
    options = ["--data", str(betons), "--out", str(out), "--batch-size", "50", "--no-plots", "--device", "cuda", *arguments]
    return train(parse_command(options), console or Console(quiet=True))


def assert_same_training(*folders):
    for path in ("last", "best"):
        one, other = (load_checkpoint(getattr(folder, path), CPU) for folder in folders)
        for part in ("model", "average"):
            tensors, others = getattr(one, part) or {}, getattr(other, part) or {}
            assert tensors.keys() == others.keys()
            for key in tensors:
                assert torch.equal(tensors[key], others[key]), (path, part, key)
        states, others = one.optimizer["state"], other.optimizer["state"]
        assert states.keys() == others.keys()
        for number in states:
            for key, value in states[number].items():
                assert torch.equal(value, others[number][key]), (path, number, key)
    rows = [[(row["train_loss"], row["train_accuracy"], row["eval_loss"]) for row in f.read_metrics()] for f in folders]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", ["dropout_resnet24", "se_resnet18", "robust_resnet64"])
def test_augmentation_shows_the_cpus_pixels(betons, name):
    settings = RECIPES[name].recipe.augmentation
    batches = {}
    for device in (CPU, CUDA):
        data, _ = load_resident(betons / "train.beton", device)
        mean, std = (torch.tensor(values, device=device) for values in (CIFAR10_MEAN, CIFAR10_STD))
        order = epoch_order(data.index, 0, 1)
        batches[device] = (
            order.cpu(),
            augment(settings, data, order, draw(settings, data.index, 0, 1), mean, std)[0].cpu(),
        )
    assert torch.equal(batches[CPU][0], batches[CUDA][0])
    levels = (batches[CPU][1] - batches[CUDA][1]).abs() * 255 * torch.tensor(CIFAR10_STD)[:, None, None]
    assert (levels < 1.5).float().mean() >= 0.999  # sums are rounded in another order: one level in a thousand pixels
    if not settings.recolours:
        assert torch.equal(batches[CPU][1], batches[CUDA][1])


def test_every_field_works_on_the_device(betons):
    data, _ = load_resident(betons / "train.beton", CUDA)
    mean, std = (torch.tensor(values, device=CUDA) for values in (CIFAR10_MEAN, CIFAR10_STD))
    for policy in ("auto_augment", "trivial_augment"):
        settings = Augmentation(crop_mode="reflect", flip="alternating", grayscale=0.5, policy=policy, random_erasing=0.5)
        x, _ = augment(settings, data, data.index, draw(settings, data.index, 0, 0), mean, std)
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        Augmentation(), Augmentation(crop_mode="reflect", flip="alternating", cutout=8),
        Augmentation(crop_padding=31, cutout=32),
    ],
)  # fmt: skip
def test_the_fused_augmentation_shows_the_cpus_pixels_which_are_numpys(betons, dtype, settings):
    batches = []
    for device, backend in ((CPU, "numba"), (CUDA, "triton")):
        data, _ = load_resident(betons / "train.beton", device)
        mean, std = (torch.tensor(values, device=device) for values in (CIFAR10_MEAN, CIFAR10_STD))
        positions, drawn = epoch_order(data.index, 0, 1)[7:157], draw(settings, data.index, 2**62 + 5, 3)
        batches.append(augment(settings, data, positions, drawn, mean, std, backend=backend, dtype=dtype))
    (expected, own), (batch, labels) = batches
    assert torch.equal(batch.cpu(), expected)
    assert torch.equal(labels.cpu(), own)
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_captured_augmentation_replays_with_the_cursor_and_epoch_of_the_moment(betons):
    data, _ = load_resident(betons / "train.beton", CUDA)
    mean, std = (torch.tensor(values, device=CUDA) for values in (CIFAR10_MEAN, CIFAR10_STD))
    order = epoch_order(data.index, 0, 0)
    cursor, epoch, seed = (torch.zeros((), dtype=torch.int64, device=CUDA) for _ in range(3))

    def batch(*keys):
        cursor, epoch = (torch.as_tensor(key, device=CUDA) for key in keys)
        return augment_fused(
            data.images, data.labels, data.index, order, cursor, epoch, seed, mean, std,
            batch_size=50, padding=4, reflect=False, flip="random", cutout=8, dtype=torch.bfloat16,
        )  # fmt: skip

    batch(cursor, epoch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        images, labels = batch(cursor, epoch)
        cursor.add_(50)
    for number in range(4):
        graph.replay()
        expected, own = batch(50 * number, 0)
        assert torch.equal(images, expected)
        assert torch.equal(labels, own)
    cursor.zero_()
    epoch.fill_(9)
    graph.replay()
    assert torch.equal(images, batch(0, 9)[0])


@pytest.mark.parametrize("arch", ["dropout_resnet24", "mish_se_resnet18"])
def test_training_with_the_fused_augmentation_sees_pytorchs_pixels(betons, tmp_path, arch):
    losses = []
    for kernels in ("torch", "triton"):
        folder = run(betons, tmp_path / kernels, "--arch", arch, "--epochs", "1", "--no-compile", "--kernels", kernels)
        losses.append(folder.read_metrics()[0]["train_loss"])
    assert abs(losses[0] - losses[1]) < 0.05


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_the_same_seed_and_a_resume_give_the_same_bits(betons, tmp_path, monkeypatch, compiled):
    first, second = (run(betons, tmp_path / name, "--epochs", "3", compiled) for name in ("a", "b"))
    original = RunFolder.save_epoch

    def interrupted(self, rows, checkpoint):
        if len(rows) == 2:
            raise KeyboardInterrupt
        original(self, rows, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(betons, tmp_path / "c", "--epochs", "3", compiled)
    third = train(parse_command(["--resume", str(tmp_path / "c")]), Console(quiet=True))
    weights = [load_checkpoint(folder.last, CPU).model for folder in (first, second, third)]
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key]), key
        assert torch.equal(weights[0][key], weights[2][key]), key


CAPTURED = {
    "SGD, mixing, dropout and jitter": ("--arch", "se_resnet18"),
    "AdamW, average and stochastic depth": (
        "--arch", "light_resnet18", "--held-out", "0", "--policy", "none", "--optimizer", "adamw", "--peak-lr", "0.01",
        "--ema-decay", "0.9", "--clip-gradient-norm", "1",
    ),
    "one-cycle, Adam": ("--arch", "resnet42", "--held-out", "0"),
    "streamed": ("--arch", "se_resnet18", "--stream", "--skip-nonfinite"),
}  # fmt: skip


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("recipe", CAPTURED)
def test_a_captured_training_gives_the_plain_ones_bits(betons, tmp_path, recipe, compiled):
    console = Console(file=io.StringIO(), width=200, record=True)
    options = (*CAPTURED[recipe], "--epochs", "3", "--eval-batch-size", "20", compiled)
    folders = [run(betons, tmp_path / name, "--capture", name, *options, console=console) for name in ("auto", "off")]
    assert "not captured" not in console.export_text()
    assert_same_training(*folders)


@pytest.mark.parametrize("resumed_as", ["auto", "off"])
def test_a_captured_training_stopped_inside_an_epoch_goes_on_with_the_same_bits(betons, tmp_path, monkeypatch, resumed_as):
    recipe, original = (*CAPTURED["AdamW, average and stochastic depth"], "--no-compile", "--epochs", "3"), TrainStep.__call__
    whole = run(betons, tmp_path / "whole", *recipe)

    calls = []

    def signalled(step):
        original(step)
        calls.append(step.number)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        with pytest.raises(Stopped, match="saved in epoch 2 after step 3 of 4"):
            run(betons, tmp_path / "cut", *recipe)
    assert_same_training(whole, train(parse_command(["--resume", str(tmp_path / "cut"), "--capture", resumed_as]), Console()))


def test_nothing_waits_between_the_first_step_of_an_epoch_and_its_end(betons, tmp_path, monkeypatch):
    """From the second epoch on, when all constants are on the device."""
    guarded = []

    def without_waiting(name):
        original = getattr(TrainStep, name)

        def call(step, *arguments, **keywords):
            if step._step.replay is not None:
                torch.cuda.set_sync_debug_mode("error")
                guarded.append(name)
            try:
                return original(step, *arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(TrainStep, name, call)

    without_waiting("begin")
    without_waiting("__call__")
    run(betons, tmp_path / "run", "--epochs", "3", "--no-compile")
    assert guarded.count("begin") == 2
    assert guarded.count("__call__") == 3 * 4 - 1
