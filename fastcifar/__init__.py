"""fastcifar: small residual networks on CIFAR, trained in minutes, reproducible to the bit, measured honestly."""

__version__ = "0.2.0"

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.checkpoint import load
    from fastcifar.models import build_model as create_model

__all__ = ["create_model", "load"]

HOMES = {"create_model": "fastcifar.models:build_model", "load": "fastcifar.checkpoint:load"}  # imported when asked for


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = HOMES[name].split(":")
    return getattr(import_module(module), attribute)


if sys.argv[:1] == ["-m"]:  # `python -m fastcifar.NAME` is being started
    from fastcifar.errors import importing

    importing()
    if "fastcifar.train" in sys.orig_argv:
        from fastcifar import ahead

        ahead.begin(sys.argv[1:])
