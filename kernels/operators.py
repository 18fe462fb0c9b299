"""What PyTorch's compiler is told of each operator: what its results look like, and that it is called as it is."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch._library.custom_ops import CustomOpDef

MARK = "__dynamo_disable"  # where `torch._disable_dynamo` keeps what it calls instead
Fake = TypeVar("Fake", bound=Callable[..., Any])


def register_fake(operator: CustomOpDef) -> Callable[[Fake], Fake]:
    """Decorate the function that gives an operator's results without computing them; Inductor learns of the operator then.

    An operator without a lowering is called as it is too, but first Inductor writes a message that describes its inputs, each
    with all it was computed from, twice what was used twice: for se_resnet18 that does not end.
    """

    def register(fake: Fake) -> Fake:
        def trace(*arguments: Any, **keywords: Any) -> Any:
            if lowering := sys.modules.get(
                "torch._inductor.lowering"
            ):  # present in time, since Inductor traces before it lowers
                _register_fallback(lowering, operator._opoverload)
            return fake(*arguments, **keywords)

        operator.register_fake(trace)
        for call in operator._backend_fns.values():
            spare_compiler(call)
        return fake

    return register


def _register_fallback(lowering: Any, overload: Any) -> None:
    """Inductor's call of an operator as it is, on tensors that lie in memory as they do uncompiled."""
    if overload not in lowering.lowerings:
        lowering.make_fallback(overload, layout_constraint=lowering.constrain_to_fake_tensors)


def spare_compiler(function: Any) -> None:
    """Keep a function that hides itself from PyTorch's compiler from importing it, where nothing is compiled.

    Such functions (`torch._disable_dynamo`) import it at their first call, for half a second; this one waits until it is there.
    """
    hidden = function.__wrapped__

    def call(*arguments: Any, **keywords: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return hidden(*arguments, **keywords)
        del hidden.__dict__[MARK]
        return function(*arguments, **keywords)

    setattr(hidden, MARK, call)
