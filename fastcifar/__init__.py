"""fastcifar: small residual networks on CIFAR, trained in minutes, reproducible to the bit, measured honestly."""

__version__ = "0.2.0"

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcifar.augmentation import Augmentation
    from fastcifar.checkpoint import load
    from fastcifar.loader import Loader, augment
    from fastcifar.models import build_model as create_model

__all__ = ["Augmentation", "Loader", "augment", "create_model", "load"]

HOMES = {  # imported when asked for
    "Augmentation": "fastcifar.augmentation:Augmentation",
    "Loader": "fastcifar.loader:Loader",
    "augment": "fastcifar.loader:augment",
    "create_model": "fastcifar.models:build_model",
    "load": "fastcifar.checkpoint:load",
}


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
