"""Filters of a whitening stem, from images: its outputs are uncorrelated and of one size (Page, "How to Train Your ResNet 8",
2019; Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).

Of the patches p [12], 2x2 pixels of three channels, of normalised images:

    C = mean(p p^T) = V diag(l) V^T        w_i = v_i / sqrt(l_i + EPS)        filters w_1 .. w_12, -w_1 .. -w_12
"""

import torch
from torch import Tensor

from kernels.augment.reference import normalise

IMAGES = 5000  # images that are enough to know C
EPS = 5e-4  # keeps directions that hardly vary from being blown up


@torch.no_grad()
def whitening_filters(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The filters [24, 3, 2, 2] float32 for images [N, H, W, 3] uint8, which are normalised by mean and std, [3] in 0..1."""
    # In float32 the filters of the smallest values were 1 % off.
    sums, patches = torch.zeros(12, 12, dtype=torch.float64, device=images.device), 0
    for part in images.split(100):  # as many as a CPU's cache holds
        windows = normalise(part, mean, std).double().unfold(2, 2, 1).unfold(3, 2, 1)  # [N, 3, H - 1, W - 1, 2, 2]
        rows = windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
        sums += rows.T @ rows
        patches += len(rows)
    values, vectors = torch.linalg.eigh((sums / patches).cpu())
    filters = (vectors / (values + EPS).sqrt()).T.reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters]).to(images.device, torch.float32)
