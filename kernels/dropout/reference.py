"""Dropout by Philox in plain PyTorch: the definition. Samples' elements stand in rows [N, E]."""

import torch
from torch import Tensor

from kernels.backends import wide
from kernels.philox import Purpose, philox


def draw(samples: Tensor, epoch: Tensor, elements: int, probability: float, layer: int, seed: int) -> Tensor:
    """The mask [N, ceil(E / 8)] uint8 of samples [N]; bits beyond the elements are drawn like the others."""
    blocks = torch.arange(-(-elements // 8), device=samples.device)
    words = philox(seed, samples[:, None], epoch, Purpose.DROPOUT | layer << 8, blocks)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)  # [N, ceil(E / 8), 8]
    return _pack(halves >= round(probability * 65536))


def apply(rows: Tensor, mask: Tensor, probability: float) -> Tensor:
    """rows / (1 - probability) where the mask [N, ceil(E / 8)] says so, 0 elsewhere."""
    keep = (mask[..., None] >> torch.arange(8, device=mask.device) & 1).flatten(1)[:, : rows.shape[1]].bool()
    return torch.where(keep, wide(rows) * (1 / (1 - probability)), 0).to(rows.dtype)


def _pack(bits: Tensor) -> Tensor:
    """[..., 8] bool -> [...] uint8, the first the lowest."""
    return (bits << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)
