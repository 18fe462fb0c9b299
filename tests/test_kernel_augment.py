"""`kernels.augment`: NumPy, PyTorch, Numba and Triton show the same pixels to the bit, for every sample by its own key."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kernels import philox as keyed
from kernels.augment import _augment, augment
from kernels.augment.reference import augment_numpy

N = 40
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), dtype=np.uint8))
LABELS = torch.arange(N) % 10
INDEX = torch.arange(N) * 97 + 2**31  # sample numbers that need all 32 bits
ORDER = torch.from_numpy(np.random.default_rng(1).permutation(N))
SETTINGS = [
    {},
    {"padding": 0, "flip": "off"},
    {"reflect": True, "flip": "alternating", "cutout": 8},
    {"padding": 31, "cutout": 32},
    {"padding": 31, "reflect": True, "cutout": 1},
]


def run(backend, *, cursor=3, epoch=5, seed=2**62 + 12345, batch_size=20, dtype=torch.float32, **settings):
    return augment(
        IMAGES, LABELS, ORDER, cursor, epoch, seed, batch_size=batch_size, mean=MEAN, std=STD, index=INDEX, dtype=dtype,
        backend=backend, **settings,
    )  # fmt: skip


def plain(*, cursor=3, epoch=5, seed=2**62 + 12345, batch_size=20, padding=4, reflect=False, flip="random", cutout=0):
    batch, labels = augment_numpy(
        IMAGES.numpy(), LABELS.numpy(), INDEX.numpy(), ORDER[cursor : cursor + batch_size].numpy(), epoch, seed,
        padding=padding, reflect=reflect, flip=flip, cutout=cutout, mean=MEAN.numpy(), std=STD.numpy(),
    )  # fmt: skip
    return torch.from_numpy(batch), torch.from_numpy(labels)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("epoch", [0, 5])
def test_pytorch_and_numba_equal_numpy(settings, epoch):
    expected, labels = plain(epoch=epoch, **settings)
    for backend in ("torch", "numba"):
        batch, own_labels = run(backend, epoch=epoch, **settings)
        assert torch.equal(batch, expected), backend
        assert torch.equal(own_labels, labels)
        assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_triton_equals_numpy(settings):
    expected, labels = plain(cursor=36, batch_size=4, **settings)
    batch, own_labels = run("triton", cursor=36, batch_size=4, **settings)
    assert torch.equal(batch, expected)
    assert torch.equal(own_labels, labels)
    half, _ = run("triton", cursor=36, batch_size=2, dtype=torch.float16, **settings)
    assert torch.equal(half, expected[:2].half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_byte_floats_are_the_float32_values_rounded(dtype):
    expected, _ = plain(cutout=8)
    for backend in ("torch", "numba"):
        batch, _ = run(backend, cutout=8, dtype=dtype)
        assert batch.dtype == dtype
        assert torch.equal(batch, expected.to(dtype)), backend


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_a_sample_looks_the_same_in_any_batch_and_otherwise_in_another_epoch_or_seed(backend):
    whole, _ = run(backend, cursor=0, batch_size=N)
    parts = [run(backend, cursor=cursor, batch_size=5)[0] for cursor in range(0, N, 5)]
    assert torch.equal(torch.cat(parts), whole)
    for other in (run(backend, cursor=0, batch_size=N, epoch=6)[0], run(backend, cursor=0, batch_size=N, seed=1)[0]):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_every_value_of_the_output_is_written(monkeypatch):
    empty = torch.empty
    poisoned = lambda *size, **kind: empty(*size, **kind).fill_(float("nan") if kind["dtype"].is_floating_point else -1)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poisoned)
    for backend, count in (("numba", 20), ("triton", 2)):
        batch, labels = run(backend, batch_size=count, padding=31, cutout=5)
        assert batch.isfinite().all()
        assert (labels >= 0).all()


@pytest.mark.parametrize("backend", ["torch", "numba", "triton"])
def test_an_earlier_batch_can_be_overwritten(backend):
    old = run(backend, batch_size=3, cutout=8)
    memory = old[0].data_ptr()
    new = run(backend, batch_size=3, cutout=8, cursor=20, out=old)
    expected = run(backend, batch_size=3, cutout=8, cursor=20)
    assert new[0].data_ptr() == memory
    for ours, theirs in zip(new, expected, strict=True):
        assert torch.equal(ours, theirs)
    for batch, labels in (
        (old[0][:2], old[1]),
        (old[0].contiguous(), old[1]),
        (old[0].double(), old[1]),
        (old[0], old[1][:2]),
        (old[0], torch.zeros(6, dtype=torch.int64)[::2]),
    ):
        with pytest.raises(
            ValueError, match=r"out must be \[3, 3, 32, 32\] float32 channels_last on cpu and contiguous \[3\] int64"
        ):
            run(backend, batch_size=3, out=(batch, labels))


def test_numbas_philox_is_philox():
    from kernels.augment.numba import philox, u64

    for seed, sample, epoch, purpose in ((0, 0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1), (12345 << 32, 7, 9, 2)):
        expected = keyed.philox(seed, np.array([sample], dtype=np.int64), epoch, purpose)
        assert [int(word) for word in philox(u64(seed), u64(sample), u64(epoch), u64(purpose))] == [int(w[0]) for w in expected]


def test_the_operator_keeps_the_compilers_contract():
    scalars = torch.tensor(0), torch.tensor(1), torch.tensor(2)
    out = run("numba", batch_size=8)
    torch.library.opcheck(_augment, (IMAGES, LABELS, INDEX, ORDER, *scalars, MEAN, STD, *out, 4, False, 1, 8, "numba"))

    def step(cursor):
        batch, labels = run("numba", cursor=cursor, cutout=8)
        return batch * 2, labels

    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.tensor(4)), step(torch.tensor(4))
    assert torch.equal(compiled[0], eager[0])
    assert torch.equal(compiled[1], eager[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, "images must be contiguous \\[40, 32, 32, 3\\] uint8"),
        ({"images": IMAGES[:, :16]}, "images must be"),
        ({"labels": LABELS[:3]}, "labels must be contiguous \\[40\\] int64 on cpu, got \\[3\\]"),
        ({"permutation": ORDER.int()}, "permutation must be"),
        ({"mean": MEAN.double()}, "mean must be"),
        ({"cursor": 21}, "cursor .* must lie in 0..40"),
        ({"cursor": torch.tensor(21)}, "cursor must be 0..20"),
        ({"cursor": 1.7}, "cursor must be a whole number, 0..2\\^63-1, got 1.7"),
        ({"cursor": torch.tensor([1])}, "cursor must be 0-d int64 on cpu, got \\[1\\] int64"),
        ({"seed": 2**63}, "seed must be a whole number"),
        ({"permutation": ORDER + 1}, "permutation must hold positions 0..39, got 40"),
        ({"permutation": -ORDER}, "permutation must hold positions 0..39, got -"),
        ({"images": torch.tensor(3, dtype=torch.uint8)}, "images must be"),
        ({"cutout": 33}, "cutout must be 0..32 pixels, got 33"),
        ({"padding": -1}, "padding must be 0..31 pixels, got -1"),
        ({"flip": "up"}, "flip must be one of"),
        ({"dtype": torch.float64}, "dtype one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_by_name(change, message):
    values = {
        "images": IMAGES,
        "labels": LABELS,
        "permutation": ORDER,
        "cursor": 0,
        "mean": MEAN,
        "std": STD,
        "backend": "numba",
    }
    values |= {"seed": 0, "epoch": 0} | change
    with pytest.raises(ValueError, match=message):
        augment(batch_size=20, **values)


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


def test_triton_on_the_cpu_is_refused_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors \(or TRITON_INTERPRET=1\), got \[40, 32, 32, 3\] uint8 on cpu"):
        run("triton")
