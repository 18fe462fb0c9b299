"""What "correct" means for a kernel: measured against float64, its error is at most twice eager PyTorch's own."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import isfinite
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

SLACK = 2.0  # times eager's own error against float64
FLOOR = 4.0  # units in the last place, at the size of the largest value, that are forgiven when eager happens to be exact
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton's kernels run: else the interpreter


def sample(*choices: Iterable[Any], every: int, gpu: bool = True) -> list[Any]:
    """Parameters for pytest: all combinations, but only one in `every` in the default suite, the rest slow and, with `gpu`, on
    a GPU.
    """
    thorough = [pytest.mark.slow, *([pytest.mark.gpu] if gpu else [])]
    combinations = product(*choices)
    return [pytest.param(*each, marks=thorough if number % every else []) for number, each in enumerate(combinations)]


def error(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact| in the Euclidean norm, computed in float64; NaN never passes."""
    size = torch.linalg.vector_norm(exact.detach().double())
    return float(torch.linalg.vector_norm(result.detach().double() - exact.detach().double()) / size.clamp(min=1e-300))


def assert_as_exact_as_eager(result: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """`result` and `eager` are in the dtype under test, `exact` is the same function in float64 of the same inputs."""
    assert result.shape == eager.shape, f"{what}: shape {list(result.shape)}, expected {list(eager.shape)}"
    assert result.dtype == eager.dtype, f"{what}: {result.dtype}, expected {eager.dtype}"
    ours, theirs = error(result, exact), error(eager, exact)
    floor = FLOOR * torch.finfo(result.dtype).eps / 2
    allowed = max(SLACK * theirs, floor) if isfinite(theirs) else floor  # eager's own float16 may overflow: no excuse
    assert ours <= allowed, f"{what}: error {ours:.3g} against float64, eager's is {theirs:.3g}"


def assert_gradients_as_exact_as_eager(
    ours: Callable[..., Tensor], eager: Callable[..., Tensor], *draws: Sequence[Tensor | None]
) -> None:
    """The same for a function's result and for the gradient of each input, all of them at once.

    draws: one or more lists of inputs, which both functions take as they stand; the exact one is eager's function of their
    float64 copies. Errors are pooled over draws: where a gradient is a few numbers, one draw's ratio of errors is luck.
    """
    generator = torch.Generator().manual_seed(1)
    pools: dict[str, list[list[Tensor]]] = {}
    for inputs in draws:
        mine, theirs = ([None if t is None else t.detach().clone().requires_grad_() for t in inputs] for _ in range(2))
        exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
        results = [ours(*mine), eager(*theirs), eager(*exact)]
        gradient = torch.randn(results[1].shape, generator=generator).to(results[1])
        for result in results:
            result.backward(gradient.to(result.dtype))
        pools.setdefault("result", []).append([result.detach() for result in results])
        for number, leaves in enumerate(zip(mine, theirs, exact, strict=True)):
            if leaves[0] is not None:
                pools.setdefault(f"gradient of input {number}", []).append([leaf.grad for leaf in leaves])
    for what, triples in pools.items():
        assert_as_exact_as_eager(*(torch.stack(tensors) for tensors in zip(*triples, strict=True)), what)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of `step`, compiled outside the capture, and what its replays overwrite."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """Within, what `torch.empty` and `torch.empty_like` give holds NaN: a kernel that leaves a place unwritten shows it."""

    def poisoned(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(create(*args, **kwargs))

    def poison(x: Tensor) -> Tensor:
        return x.fill_(torch.nan) if x.is_floating_point() else x

    from torch._dynamo import trace_rules  # the compiler keeps what it once found under torch's names: let it look before

    trace_rules.get_torch_obj_rule_map()
    with mock.patch("torch.empty", poisoned(torch.empty)), mock.patch("torch.empty_like", poisoned(torch.empty_like)):
        yield
