"""MixUp and CutMix: how each batch of an epoch is mixed, drawn beforehand, and the mixing itself."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcifar.device import upload
from kernels.augment.operations import CIFAR, Size
from kernels.philox import Purpose, below, philox, uniform

Batches = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class MixPlan:
    """How each batch of an epoch is mixed, drawn beforehand on the host, so that no step waits for anything."""

    lam: Tensor  # [steps] float32 on the device: weight of the own label; 1 = not mixed
    blend: Tensor  # [steps] float32: weight of the own pixels outside the box; below 1 only for mixup
    box: Tensor  # [steps, 4] float32: top, bottom, left, right of the pasted rectangle, pixels; empty unless CutMix


def mix_plan(
    mixup_alpha: float, cutmix_alpha: float, probability: float, *, seed: int, epoch: int, steps: int, device: torch.device,
    size: Size = CIFAR,
) -> MixPlan:  # fmt: skip
    """Draw the mixing of `steps` batches of epoch `epoch` from Philox at (batch number, epoch, MIX).

    mixup_alpha, cutmix_alpha: Beta(alpha, alpha) of the lam, 0 = never; with both, each is equally likely. probability: that
    a batch is mixed at all. size: of the images.
    """
    batch, (height, width) = np.arange(steps, dtype=np.int64), size
    chosen, which, row, column = philox(seed, batch, epoch, Purpose.MIX)
    mixed = (uniform(chosen) < probability) & (mixup_alpha > 0 or cutmix_alpha > 0)
    both = mixup_alpha > 0 and cutmix_alpha > 0
    use_cutmix = below(which, 2) == 1 if both else np.full(steps, cutmix_alpha > 0)
    alpha = np.where(use_cutmix, cutmix_alpha, mixup_alpha)
    lam = np.where(mixed, beta(seed, batch, epoch, np.maximum(alpha, 1e-3)), 1.0)

    # CutMix (Yun et al., ICCV 2019): a box of relative area 1 - lam around a uniform centre, clipped at the edges.
    cut = np.where(mixed & use_cutmix, np.sqrt(1 - lam), 0.0)
    tall, wide = ((side * cut / 2).astype(np.int64) for side in size)
    top, left = below(row, height), below(column, width)
    box = np.stack([top - tall, top + tall, left - wide, left + wide], axis=1).clip(0, [height, height, width, width])
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    blend = np.where(use_cutmix, 1.0, lam)
    lam = np.where(use_cutmix, 1 - area / (height * width), lam)
    values = upload(torch.tensor(np.column_stack([lam, blend, box]), dtype=torch.float32), device)  # one copy
    return MixPlan(lam=values[:, 0], blend=values[:, 1], box=values[:, 2:])


def mix(x: Tensor, blend: Tensor, box: Tensor, size: Size = CIFAR) -> Tensor:
    """Mix every image of [B, 3, H, W], channels_last, with its successor in the batch, which the epoch's permutation made a
    random partner.

        y = w x + (1 - w) partner,   w = 0 inside the box, `blend` outside

    One expression for mixup (empty box), CutMix (blend 1) and no mixing (both), so that the step has no branch. Computed in
    float32, returned in x's dtype and layout. box: [4], in pixels of images of `size`; inside are the pixels whose centres are.
    """
    rows, columns = (
        (torch.arange(side, device=x.device) + 0.5) * (whole / side) for side, whole in zip(x.shape[2:], size, strict=True)
    )
    inside = ((rows >= box[0]) & (rows < box[1]))[:, None] & ((columns >= box[2]) & (columns < box[3]))
    own = x.permute(0, 2, 3, 1)  # rolling the dense view keeps it dense
    mixed = torch.lerp(partner(own).float(), own.float(), torch.where(inside, 0.0, blend)[:, :, None])
    return mixed.to(x.dtype).permute(0, 3, 1, 2)


def partner(values: Tensor) -> Tensor:
    """The values of each sample's mixing partner: the next in the batch, the first for the last."""
    return values.roll(-1, 0)


def beta(seed: int, batch: Batches, epoch: int, alpha: np.ndarray) -> np.ndarray:
    """Draw Beta(alpha, alpha) for every batch number, float64: X / (X + Y) of two keyed gamma draws, in logarithms.

    Logarithms, because for small alpha both gammas underflow while their ratio does not.
    """
    x, y = (log_gamma_draw(seed, batch, epoch, alpha, stream) for stream in (1, 2))
    return 1 / (1 + np.exp(np.clip(y - x, -700, 700)))


def log_gamma_draw(seed: int, batch: Batches, epoch: int, alpha: np.ndarray, stream: int) -> np.ndarray:
    """The logarithm of a Gamma(alpha, 1) draw for every batch number (Marsaglia and Tsang, ACM TOMS 26, 2000).

    Gamma(alpha) = Gamma(alpha + 1) * U^(1/alpha). Rejected tries (under 5 %) take the next block of the counter.
    """
    d = alpha + 1 - 1 / 3
    result = np.full(len(batch), np.nan)
    for attempt in range(64):  # the chance that one is still open is below 1e-80
        words = philox(seed, batch, epoch, Purpose.MIX, block=2 * attempt + stream)
        u1, u2, u3, u4 = ((word + 0.5) * 2.0**-32 for word in words)  # strictly inside 0..1
        normal = np.sqrt(-2 * np.log(u1)) * np.cos(2 * math.pi * u2)
        v = (1 + normal / np.sqrt(9 * d)) ** 3
        positive = np.maximum(v, 1e-300)
        accepted = (v > 0) & (np.log(u3) < normal**2 / 2 + d - d * v + d * np.log(positive))
        result = np.where(np.isnan(result) & accepted, np.log(d * positive) + np.log(u4) / alpha, result)
        if not np.isnan(result).any():
            break
    return result
