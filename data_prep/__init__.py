"""From CIFAR's pickles, or a procedural stand-in for them, to `.beton` files."""
