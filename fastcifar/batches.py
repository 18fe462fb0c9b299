"""The batches that training sees: what an epoch draws for them, and how one is made. `TrainStep` and `fastcifar.Loader` have
this in common, and with it every pixel."""

from typing import Literal

import torch
from torch import Tensor

from fastcifar.augmentation import Augmentation, augment, draw, numba_serves, triton_serves
from fastcifar.augmentation.draws import Draws
from fastcifar.augmentation.mixing import MixPlan, mix, partner
from fastcifar.augmentation.resize import Weights, resize
from fastcifar.dataset import ResidentSet, StreamedSet, epoch_order
from fastcifar.epoch_tables import EpochPlan
from fastcifar.models.layers import Kernels, form_of


class Batches:
    """Orders, augments and mixes the images of a set by a seed.

    mean, std: [3] float32 in 0..1, on the set's device. seed: of the augmentation. order_seed: of the order; None: the same.
    dtype: of the images. kernels: who augments. reuses: a batch may be overwritten by the next. Raises InputError where the
    augmentation does not fit the images' size.
    """

    def __init__(
        self,
        data: ResidentSet | StreamedSet,
        augmentation: Augmentation,
        mean: Tensor,
        std: Tensor,
        *,
        seed: int,
        dtype: torch.dtype,
        order_seed: int | None = None,
        kernels: Kernels = "auto",
        reuses: bool = False,
    ) -> None:
        augmentation.require_fits(data.size)
        self.data, self.augmentation, self.mean, self.std = data, augmentation, mean, std
        self.seed, self.order_seed = seed, seed if order_seed is None else order_seed
        self.dtype, self.reuses = dtype, reuses
        self.augments_by = choose_augmentation(augmentation, kernels, mean.device)
        self.resizing: Weights | None = None
        self._last_images: Tensor | None = None

    def plan(self, epoch: int, steps: int, progress: float) -> EpochPlan:
        """Draw an epoch's augmentation and mixing; `progress` is the share of training done, 0..1."""
        return EpochPlan(self.draws(epoch), self.plan_mixing(epoch, steps, progress))

    def plan_mixing(self, epoch: int, steps: int, progress: float) -> MixPlan:
        """Draw how the epoch's batches are mixed."""
        keys, device = {"seed": self.seed, "epoch": epoch, "steps": steps}, self.mean.device
        return self.augmentation.plan_mixing(**keys, progress=progress, device=device, size=self.data.size)

    def draws(self, epoch: int | Tensor) -> Draws:
        """Draw the augmentation of every image."""
        draws = draw(self.augmentation, self.data.index, self.seed, epoch, self.data.size)
        if self.augments_by == "numba":
            _ = draws.moves, draws.rotations  # computed here, not in the first step
        return draws

    def order(self, epoch: int | Tensor) -> Tensor:
        """The order of an epoch: positions [N] int64."""
        return epoch_order(self.data.index, self.order_seed, epoch)

    def prepare(
        self, data: ResidentSet, positions: Tensor, plan: EpochPlan, blend: Tensor, box: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return images [B, 3, H, W] channels_last, labels [B] and the mixing partners' labels [B]."""
        images, labels = augment(
            self.augmentation, data, positions, plan.draws, self.mean, self.std,
            backend=self.augments_by, dtype=self.dtype, reuse=self._last_images,
        )  # fmt: skip
        if self.reuses and self.augments_by == "numba":
            self._last_images = images  # nothing needs it after this step: its memory serves the next
        if self.resizing is not None:
            images = resize(images, *self.resizing)
        if self.augmentation.mixes:
            images = mix(images, blend, box, data.size)
        return images, labels, partner(labels)


def choose_augmentation(
    augmentation: Augmentation, kernels: Kernels, device: torch.device
) -> Literal["torch", "numba", "triton"]:
    """What applies a recipe's augmentation. Numba on a CPU unless PyTorch is asked for; Triton where asked for and able."""
    form = form_of(kernels, "augment")
    if form not in ("torch", "triton") and numba_serves(augmentation, device):  # fusable is said of the network
        return "numba"
    return "triton" if form == "triton" and device.type == "cuda" and triton_serves(augmentation) else "torch"
