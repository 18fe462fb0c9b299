"""Functions of no arguments recorded once as a CUDA graph, and replayed from then on in one launch."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor

from fastcifar.device import generator_states, set_generators
from fastcifar.errors import shortened

Function = Callable[[], None]
Recorder = Callable[[Function], Function]  # takes what is recorded, returns what replays it

WARM_UPS = 3  # calls before recording: compilers, autotuning and libraries' workspaces must not begin inside a graph


def cuda_graph(function: Function) -> Function:
    """Record `function` on the current stream's device without running it. Raises RuntimeError when the driver refuses."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may wait for their copies meanwhile
        function()
    return graph.replay


class Captured:
    """A function that is called as it is, or, where `record` is given, recorded at the first call and replayed.

    tensors: gives all that the function changes and that outlives it. name, say: in a line to `say`, what could not be recorded
    and why; it is called as it is then.
    """

    def __init__(
        self,
        function: Function,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
        record: Recorder | None,
        name: str,
        say: Callable[[str], object] = print,
    ) -> None:
        self.function, self.tensors, self.device, self.name, self.say = function, tensors, device, name, say
        self._record = record
        self.replay: Function | None = None

    def __call__(self) -> None:
        record, self._record = self._record, None
        if record is not None:
            try:
                self.replay = recorded(self.function, self.tensors, self.device, record)
            except RuntimeError as error:  # of the driver, or for want of memory
                why = (str(error) or type(error).__name__).splitlines()[0]
                self.say(f"{self.name} is not captured, and so slower: {shortened(why, 200)}")
        (self.replay or self.function)()


def recorded(function: Function, tensors: Callable[[], Iterable[Tensor]], device: torch.device, record: Recorder) -> Function:
    """Warm `function` up, record it, and leave everything as if it had never been called; return what replays it.

    What it made itself, as an optimizer's first step does, is set to zero. PyTorch's generators are put back too; a replay
    draws from them as a call would. Raises RuntimeError when recording fails.
    """
    kept = {id(tensor): tensor.detach().clone() for tensor in tensors()}
    states = generator_states(device)

    @torch.no_grad()
    def put_back() -> None:
        for tensor in tensors():
            if id(tensor) in kept:
                tensor.copy_(kept[id(tensor)])
            else:
                tensor.zero_()
        set_generators(states, device)

    aside = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        if aside is not None:
            aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside) if aside is not None else nullcontext():
            for _ in range(WARM_UPS):
                function()
                put_back()
        if aside is not None:
            torch.cuda.current_stream(device).wait_stream(aside)
        return record(function)
    finally:
        put_back()
