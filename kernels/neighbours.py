"""Moves what stands next to our operators in a compiled graph into their kernels: fewer passes over the maps.

    s = a + b, statistics(s)                    one kernel that writes the sum and takes its statistics: 1 read fewer;
                                                with stochastic depth, where b is multiplied image by image, too
    dropout(tail(...))                          the tail applies the mask: a read and a write fewer each way
    backward(g + h)                             both gradients of a result that two operations read: a read and a write fewer;
                                                of a squeeze-excitation too
    tail_backward(...)[conv_out] + h            what conv_out's other uses add to its gradient: the same

Autograd adds gradients in operations of their own and the compiler cannot fuse into an operator, so this is done where both
stand next to each other: on Inductor's graph (`post_grad_custom_pre_pass`) of forward or backward. Networks are written as
ever, and what is not found as expected stays as it was.
"""

from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from kernels import residual_tail, squeeze_excite  # noqa: F401  both define their operators
from kernels.residual_tail.fusable import EVERY, GIVEN, NEAR, Neighbours, Settings

aten, fastcifar = torch.ops.aten, torch.ops.fastcifar
FORWARD, BACKWARD = fastcifar.residual_tail.default, fastcifar.residual_tail_backward.default
EXCITE_BACKWARD, EXCITE_ARGUMENTS = fastcifar.squeeze_excite_backward.default, 8
STATISTICS, SUM_STATISTICS = fastcifar.residual_tail_statistics.default, fastcifar.residual_sum_statistics.default


def fuse_neighbours(graph: Graph) -> None:
    """Rewrite a graph of ATen operations and our operators in place."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.auto_functionalized_v2 and node.args[0] is STATISTICS:
            _take_sum(node, order)
        elif node.target is FORWARD and not _squeezes_last(node):
            _take_dropout(node, order)
        elif node.target is BACKWARD:
            if not _squeezes_last(node):
                _take_gradients_dropout(node)
            if pair := _two_gradients(node):
                _call(node, pair[0], *_with(node, 1 + EVERY, second=pair[1])[1:])
            _take_elsewhere(node, order)
        elif node.target is EXCITE_BACKWARD and (pair := _two_gradients(node)):
            _call(node, pair[0], *node.args[1:EXCITE_ARGUMENTS], pair[1])
    graph.eliminate_dead_code()


def _take_sum(node: Node, order: dict[Node, int]) -> None:
    """statistics(a + b) becomes an operator whose fourth result is the sum; functionalised, what it moves comes behind."""
    total: Node = node.kwargs["x"]  # type: ignore[assignment]
    parts = _addends(total) or _scaled_addends(total)
    early = any(order[user] < order[node] for user in total.users)
    if parts is None or early or not total.meta["val"].is_contiguous(memory_format=torch.channels_last):
        return
    node.kwargs = dict(node.kwargs) | dict(zip(("x", "addend", "factor"), parts, strict=False))
    _call(node, SUM_STATISTICS)
    for result in list(node.users):
        number: int = result.args[1]  # type: ignore[assignment]
        result.args = (node, number + (number >= 3))
    with node.graph.inserting_after(node):
        found = node.graph.call_function(getitem, (node, 3))
    found.meta = dict(total.meta)
    node.meta["val"] = (*node.meta["val"][:3], total.meta["val"], *node.meta["val"][3:])
    total.replace_all_uses_with(found)


def _squeezes_last(node: Node) -> bool:
    """Whether a tail ends in squeeze-excitation, whose kernels know no dropout."""
    given = GIVEN if node.target is FORWARD else 1 + EVERY
    return bool(Settings(*node.args[given : given + len(Settings._fields)]).se_last)  # type: ignore[arg-type]


def _take_dropout(node: Node, order: dict[Node, int]) -> None:
    """out * mask * factor, where nobody else reads out; the tail moves to where the mask is known."""
    out = _result(node, 0)
    product = _only_user(out)
    scaled = _only_user(product)
    if out is None or product is None or scaled is None:
        return
    kept, factor = _other(product, out), _other(scaled, product)
    if not _masks(kept, product) or not isinstance(factor, float):
        return
    results = list(node.users)
    if any(order[user] < order[product] for result in results for user in result.users):
        return
    for moved in (node, *results):
        product.prepend(moved)
    _call(node, *_with(node, GIVEN, kept=kept, keep=1 / factor))
    scaled.replace_all_uses_with(out)


def _take_gradients_dropout(node: Node) -> None:
    """g * (mask * factor) is the gradient."""
    product: Node = node.args[0]  # type: ignore[assignment]
    factors = product.args if product.target is aten.mul.Tensor and _only_user(product) is node else ()
    for gradient, scaled in (factors, factors[::-1]) if factors else ():
        if not isinstance(scaled, Node) or scaled.target is not aten.mul.Tensor:
            continue
        kept, factor = scaled.args
        kept = kept.args[0] if isinstance(kept, Node) and kept.target is torch.ops.prims.convert_element_type.default else kept
        if _masks(kept, product) and isinstance(factor, float):
            _call(node, gradient, *_with(node, 1 + EVERY, kept=kept, keep=1 / factor)[1:])
            node.graph.erase_node(product)
            return


def _two_gradients(node: Node) -> tuple[Node, Node] | None:
    """g and h, where g + h is the gradient, and nobody else's."""
    total: Node = node.args[0]  # type: ignore[assignment]
    return _addends(total) if _only_user(total) is node else None


def _take_elsewhere(node: Node, order: dict[Node, int]) -> None:
    """The gradient of conv_out is added to another one, which is known before."""
    own = _result(node, 0)
    total = _only_user(own)
    if total is None or own is None or (pair := _addends(total)) is None:
        return
    other = pair[pair[0] is own]
    if order[other] < order[node]:
        _call(node, *_with(node, 1 + EVERY, elsewhere=other))
        total.replace_all_uses_with(own)


def _call(node: Node, *arguments: Any) -> None:
    """Change what an operator is called with; the compiler's note of what lay where at the call no longer fits."""
    node.args = arguments
    node.meta.pop("eager_input_vals", None)


def _with(node: Node, tensors: int, **neighbours: Any) -> tuple[Any, ...]:
    """An operator's arguments, with these neighbours too; `tensors` stand before its settings."""
    settings = tensors + len(Settings._fields)
    known = Neighbours(*node.args[settings:])._replace(**neighbours)  # type: ignore[arg-type]
    return *node.args[:settings], *(known[:NEAR] if node.target is FORWARD else known)


def _result(node: Node, number: int) -> Node | None:
    return next((user for user in node.users if user.args[1] == number), None)


def _only_user(node: Node | None) -> Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _other(product: Node, factor: Node) -> Any:
    """What a product multiplies `factor` by; None where it is no product."""
    return product.args[product.args[0] is factor] if product.target is aten.mul.Tensor else None


def _masks(kept: Any, x: Node) -> bool:
    """Whether `kept` is a boolean map of x's shape."""
    return isinstance(kept, Node) and _kind(kept) == (x.meta["val"].shape, torch.bool)


def _addends(total: Any) -> tuple[Node, Node] | None:
    """a and b of a + b, maps of one shape and dtype that are in memory anyway: the compiler fuses a sum with what is not."""
    if not isinstance(total, Node) or total.target is not aten.add.Tensor or total.kwargs:
        return None
    a, b = total.args
    same = all(isinstance(x, Node) and _stored(x) and _kind(x) == _kind(total) for x in (a, b))
    return (a, b) if same and a is not b else None  # type: ignore[return-value]


def _scaled_addends(total: Node) -> tuple[Node, Node, Node] | None:
    """a, b and f of a + b f, where f has one value an image or one in all, and nobody else wants b f."""
    found = total.args if total.target is aten.add.Tensor and not total.kwargs else ()
    for a, product in (found, found[::-1]) if found else ():
        if not isinstance(product, Node) or product.target is not aten.mul.Tensor or _only_user(product) is not total:
            continue
        for b, factor in (product.args, product.args[::-1]):
            maps = all(isinstance(x, Node) and _stored(x) and _kind(x) == _kind(total) for x in (a, b))
            if maps and isinstance(factor, Node) and factor.meta["val"].shape[1:] == (1, 1, 1):
                return a, b, factor  # type: ignore[return-value]
    return None


def _stored(node: Node) -> bool:
    return node.op == "placeholder" or node.target in (getitem, aten.convolution.default)


def _kind(node: Node) -> tuple[torch.Size, torch.dtype]:
    return node.meta["val"].shape, node.meta["val"].dtype
