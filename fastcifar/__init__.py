"""fastcifar: small residual networks on CIFAR, trained in minutes, reproducible to the bit, measured honestly."""

__version__ = "0.2.0"
