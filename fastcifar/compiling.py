"""How the training step is compiled: PyTorch's compiler with the settings that a run names."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, fx

CompileMode = Literal["default", "tuned", "combo"]

# Of Inductor. tuned: fuse longer chains, recompute more in the backward pass (`_tuned`): fewer bytes on some networks, more on
# others (docs/step-cost.md). combo: kernels that do not wait for one another share a launch.
OPTIONS: dict[CompileMode, dict[str, Any]] = {
    "default": {},
    "tuned": {"realize_opcount_threshold": 200, "realize_reads_threshold": 32},
    "combo": {"combo_kernels": True},
}


def compiled(function: Callable[..., Any], mode: CompileMode = "default", *, fullgraph: bool = False) -> Callable[..., Any]:
    """`function`, compiled at its first call for the shapes it is called with."""
    if mode == "tuned":
        return torch.compile(function, dynamic=False, fullgraph=fullgraph, backend=_tuned)
    return torch.compile(function, dynamic=False, fullgraph=fullgraph, options=_options(mode))


def _options(mode: CompileMode) -> dict[str, Any]:
    """Inductor's settings, and our own pass over its graphs; their cache knows the pass by its source."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    from kernels import neighbours

    class FuseNeighbours(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            neighbours.fuse_neighbours(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((neighbours.__file__,))

    return OPTIONS[mode] | {"post_grad_custom_pre_pass": FuseNeighbours()}


def _tuned(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor with a setting that `options` cannot name: what is used far apart may be recomputed instead of kept."""
    import torch._functorch.config  # here, since importing the compiler takes a second
    from torch._inductor.compile_fx import compile_fx

    with torch._functorch.config.patch(ban_recompute_used_far_apart=False):
        return compile_fx(graph, inputs, config_patches=_options("tuned"))
