"""The numerical core: keyed randomness, and fused kernels each with its definition in plain PyTorch.

    kernels.mish(x)                                          Mish of any tensor
    kernels.squeeze_excite(x, w_reduce, w_expand, ...)       scale each channel by what the whole map says of it
    kernels.residual_tail(conv_out, shortcut, ...)           BN, squeeze-excitation, sum and activation
    kernels.residual_tail_fusable(conv_out, shortcut, ...)   the same algebra, for the compiler to fuse
    kernels.augment(images, labels, permutation, ...)        a batch from the resident set, cropped, mirrored, normalised

Importing this imports neither Triton nor Numba: the modules named `*_triton` and `*_numba` do, when a kernel first runs.
"""

from kernels.augment import augment
from kernels.mish import mish
from kernels.residual_tail import residual_tail, residual_tail_fusable
from kernels.squeeze_excite import squeeze_excite

__all__ = ["augment", "mish", "residual_tail", "residual_tail_fusable", "squeeze_excite"]
