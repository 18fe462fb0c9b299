"""Writes CIFAR's pickles, or a synthetic dataset in the same format, as `.beton` files."""
