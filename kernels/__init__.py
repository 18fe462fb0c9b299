"""The numerical core: keyed randomness, and fused kernels, each beside its definition in plain PyTorch. Map: README.md.

Nothing here imports Triton or Numba; the modules `*.triton` and `*.numba` do, when a kernel first runs.
"""
