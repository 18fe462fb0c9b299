"""`augment`'s backends: Numba, PyTorch and Triton show NumPy's pixels to the bit; what does not fit never reaches a loop."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastcifar.augmentation import Augmentation, augment, draw
from fastcifar.dataset import ResidentSet
from kernels import philox as keyed
from kernels.augment import FLIPS, _augment, augment_fused
from kernels.augment.reference import augment_numpy

N, SEED, EPOCH = 40, 2**62 + 12345, 5
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8))
DATA = ResidentSet(IMAGES, torch.arange(N) % 10, torch.arange(N) * 97 + 2**31)  # sample numbers that need all 32 bits
ORDER = torch.from_numpy(np.random.default_rng(1).permutation(N))
SETTINGS = [
    Augmentation(),
    Augmentation(crop_padding=0, flip="off"),
    Augmentation(crop_mode="reflect", flip="alternating", cutout=8),
    Augmentation(crop_padding=31, cutout=32),
    Augmentation(crop_padding=31, crop_mode="reflect", cutout=1),
]
BACKENDS = {"torch": 20, "numba": 20, "triton": 4}  # images of a batch: the interpreter is slow


def run(backend, settings=SETTINGS[2], positions=ORDER[:4], epoch=EPOCH, **options):
    drawn = draw(settings, DATA.index, SEED, epoch)
    return augment(settings, DATA, positions, drawn, MEAN, STD, backend=backend, **options)


def plain(settings=SETTINGS[2], positions=ORDER[:4], epoch=EPOCH):
    batch, labels = augment_numpy(
        *(x.numpy() for x in (DATA.images, DATA.labels, DATA.index, positions)), epoch, SEED, padding=settings.crop_padding,
        reflect=settings.crop_mode == "reflect", flip=settings.flip, cutout=settings.cutout, mean=MEAN.numpy(), std=STD.numpy(),
    )  # fmt: skip
    return torch.from_numpy(batch), torch.from_numpy(labels)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_numpy(settings, backend):
    for epoch in (0, 5) if backend != "triton" else (5,):
        positions = ORDER[-BACKENDS[backend] :]
        expected, labels = plain(settings, positions, epoch)
        batch, own_labels = run(backend, settings, positions, epoch)
        assert torch.equal(batch, expected)
        assert torch.equal(own_labels, labels)
        assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("backend", "dtype"),  # Triton's interpreter truncates to bfloat16
    [*((each, dtype) for each in ("torch", "numba") for dtype in (torch.float16, torch.bfloat16)), ("triton", torch.float16)],
)
def test_two_byte_floats_are_the_float32_values_rounded(backend, dtype):
    batch, _ = run(backend, dtype=dtype)
    assert torch.equal(batch, plain()[0].to(dtype))
    assert batch.dtype == dtype


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_every_value_of_the_output_is_written(monkeypatch, backend):
    empty = torch.empty

    def poisoned(*size, **kind):
        x = empty(*size, **kind)
        return x.fill_(float("nan") if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    batch, labels = run(backend, Augmentation(crop_padding=31, cutout=5), ORDER[:2])
    assert batch.isfinite().all()
    assert (labels >= 0).all()


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_an_earlier_batch_can_be_overwritten(backend):
    old, _ = run(backend, positions=ORDER[20:24])
    new, _ = run(backend, reuse=old)
    assert new.data_ptr() == old.data_ptr()
    assert torch.equal(new, plain()[0])
    assert torch.equal(run(backend, positions=ORDER[:3], reuse=old)[0], plain()[0][:3])  # of another size: left alone
    assert torch.equal(old, plain()[0])
    for wrong in (old.contiguous(), old.double(), old[:, :2], torch.zeros(4)):
        with pytest.raises(ValueError, match=r"reuse, as NHWC, must be contiguous \[4, 32, 32, 3\] float32 on cpu, got"):
            run(backend, reuse=wrong)


def test_numbas_philox_is_philox():
    from kernels.augment.numba import philox, u64

    top = 2**32 - 1
    for seed, sample, *others in ((0, 0, 0, 0, 0), (2**64 - 1, top, top, top, top), (12345 << 32, 7, 9, 2, 5)):
        expected = keyed.philox(seed, np.array([sample], dtype=np.int64), *others)
        assert [int(word) for word in philox(*map(u64, (seed, sample, *others)))] == [int(w[0]) for w in expected]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operator_shows_numpys_pixels_and_keeps_the_compilers_contract(backend):
    keys = torch.tensor(3), torch.tensor(EPOCH), torch.tensor(SEED)
    given = DATA.images, DATA.labels, DATA.index, ORDER, *keys, MEAN, STD
    out = torch.empty(2, 32, 32, 3).permute(0, 3, 1, 2), torch.empty(2, dtype=torch.int64)
    sizes = 4, True, FLIPS.index("alternating"), 8
    _augment(*given, *out, *sizes, backend)
    assert all(map(torch.equal, out, plain(positions=ORDER[3:5])))
    torch.library.opcheck(_augment, (*given, *out, *sizes, backend))


def test_the_operator_compiles_into_one_graph_with_the_cursor_as_input():
    def step(cursor):
        batch, labels = augment_fused(
            DATA.images, DATA.labels, DATA.index, ORDER, cursor, torch.tensor(EPOCH), torch.tensor(SEED), MEAN, STD,
            batch_size=2, padding=4, reflect=False, flip="random", cutout=8, dtype=torch.float32,
        )  # fmt: skip
        return 2 * batch, labels

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(torch.tensor(4)), step(torch.tensor(4))))


NOISY = Augmentation(random_erasing=1.0, erasing_value="noise", policy="rand_augment")
DRAWN = draw(NOISY, DATA.index, 0, 0)
BAD = {
    r"images must be contiguous \[40, 32, 32, 3\] uint8 on cpu, got \[40, 64, 64, 3\]": {
        "images": torch.zeros(N, 64, 64, 3, dtype=torch.uint8)
    },
    r"images must be .*, got \[40, 16, 16, 3\]": {"images": torch.zeros(N, 16, 16, 3, dtype=torch.uint8)},
    r"images must be .*, got \[40, 32, 32, 3\] float32": {"images": IMAGES.float()},
    r"images must be .*, strides": {"images": IMAGES.transpose(1, 2)},
    r"images must be .*, got \[\] uint8": {"images": torch.tensor(3, dtype=torch.uint8)},
    r"labels must be contiguous \[40\] int64 on cpu, got \[3\]": {"labels": DATA.labels[:3]},
    r"index must be .*, got \[40\] int32": {"index": DATA.index.int()},
    r"positions must be .*, got \[40\] int32": {"positions": ORDER.int()},
    r"positions must be .*, got \[2, 20\]": {"positions": ORDER.view(2, 20)},
    r"positions must be 0..39, got 5..1000": {"positions": torch.tensor([5, 1000])},
    r"positions must be 0..39, got -1..3": {"positions": torch.tensor([3, -1])},
    r"mean must be .*, got \[3\] float64": {"mean": MEAN.double()},
    r"std must be .*, got \[\]": {"std": STD[0]},
    "dtype one of .*float64": {"dtype": torch.float64},
    "backend must be one of torch, numba, triton .*'cuda'": {"backend": "cuda"},
    "parameters of all 40 images, got those of 39": {"drawn": DRAWN.at(torch.arange(39))},
    "erasing_value is noise, and it has no noise_seed": {"drawn": replace(DRAWN, noise_seed=None, quantiles=None)},
    r"erased must be \[40, 4\] int64, got \[39, 4\]": {"drawn": replace(DRAWN, erased=DRAWN.erased[1:])},
    r"magnitudes must be \[40, 2\] float32, got \[40, 1\]": {"drawn": replace(DRAWN, magnitudes=DRAWN.magnitudes[:, :1])},
    "operations and magnitudes go together": {"drawn": replace(DRAWN, magnitudes=None)},
    r"quantiles must be \[65536\]": {"drawn": replace(DRAWN, quantiles=DRAWN.quantiles[1:])},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_what_does_not_fit_is_named(message, backend):
    given = {"settings": NOISY, "positions": ORDER, "drawn": DRAWN, "mean": MEAN, "std": STD, "backend": backend}
    fields = {name: value for name, value in BAD[message].items() if hasattr(DATA, name)}
    given |= {"data": replace(DATA, **fields)} | {name: value for name, value in BAD[message].items() if name not in fields}
    with pytest.raises(ValueError, match=message):
        augment(**given)


def test_triton_is_refused_where_it_cannot_serve(monkeypatch):
    with pytest.raises(ValueError, match="triton knows crop, flip and cutout only"):
        run("triton", NOISY)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors \(or TRITON_INTERPRET=1\), got \[40, 32, 32, 3\] uint8 on cpu"):
        run("triton")


@pytest.mark.slow
def test_the_compiled_kernel_rounds_every_product():
    """level - 255 mean as one fused multiply-add would be another pixel than NumPy's; the interpreter cannot show it."""
    code = (
        "import torch; from kernels.inspect import ROWS, compile_launch, recorded\n"
        "row = next(row for row in ROWS if row.operation.__name__ == 'augment')\n"
        "print('fma' in compile_launch(recorded(row, torch.float32)[0]).asm['ptx'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert process.stdout.split() == ["False"]
