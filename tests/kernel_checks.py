"""What "correct" means for a kernel: measured against float64, its error is at most twice eager PyTorch's own."""

import torch
from torch import Tensor

SLACK = 2.0  # times eager's own error against float64
FLOOR = 4.0  # units in the last place, at the size of the largest value, that are forgiven when eager happens to be exact


def error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the Euclidean norm, computed in float64; NaN never passes."""
    size = torch.linalg.vector_norm(exact.double())
    return float(torch.linalg.vector_norm(result.double() - exact.double()) / size.clamp(min=1e-300))


def assert_as_exact_as_eager(result: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """`result` and `eager` are in the dtype under test, `exact` is the same function in float64 of the same inputs."""
    assert result.shape == eager.shape, f"{what}: shape {list(result.shape)}, expected {list(eager.shape)}"
    assert result.dtype == eager.dtype, f"{what}: {result.dtype}, expected {eager.dtype}"
    ours, theirs = error(result, exact), error(eager, exact)
    floor = FLOOR * torch.finfo(result.dtype).eps / 2
    assert ours <= max(SLACK * theirs, floor), f"{what}: error {ours:.3g} against float64, eager's is {theirs:.3g}"
