"""What a CUDA graph does, on the CPU: every operation of a function is noted with the very tensors and numbers it had, and a
replay runs the operations again on those, without the function. Whatever the function would have decided or computed on the
host since then is as it was, and whatever it would have allocated lies where it lay."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WAITS = ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")


class NoWaiting(TorchFunctionMode):
    """Raises where the host would wait for the device."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: Tensor.{function.__name__}")
        return function(*arguments, **(keywords or {}))


class Notes(TorchDispatchMode):
    """Notes what is called, with which arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: Tensor.item")
        result = operation(*arguments, **(keywords or {}))
        given = {memory(value) for value in tree_leaves((arguments, keywords))} | {None}
        made = [None if memory(value) in given else value for value in tree_leaves(result)]
        writes = any(out.alias_info is not None and out.alias_info.is_write for out in operation._schema.arguments)
        if (any(value is not None for value in made) or writes) and operation.namespace != "profiler":  # no view: it stays one
            fixed = tree_map(lambda value: value, (arguments, keywords or {}))  # lists are the optimizer's own
            self.calls.append((operation, *fixed, made))
        return result


def memory(value):
    """Where a tensor's storage lies; None for anything else."""
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def tape(function):
    """A `fastcifar.capture.Recorder`."""
    with NoWaiting(), Notes() as notes:
        function()

    @torch.no_grad()
    def replay():
        for operation, arguments, keywords, outputs in notes.calls:
            results = tree_leaves(operation(*arguments, **keywords))
            for old, new in zip(outputs, results, strict=True):
                if old is not None:
                    old.copy_(new)

    return replay
