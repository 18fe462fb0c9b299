"""The numerical core: keyed randomness now; fused Mish, squeeze-excitation and augmentation kernels as they land."""
