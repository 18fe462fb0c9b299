"""A recipe's augmentation of batches of the resident uint8 set: normalised images [B, 3, H, W], channels_last.

Each sample's parameters are its own and come from Philox at (sample number, epoch, purpose): no generator, no loop over
samples, no host sync. `draws` draws them, the other modules apply them, `python -m fastcifar.augmentation` shows them.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from fastcifar.augmentation import colour, draws, geometry, policies
from fastcifar.augmentation.draws import Draws
from fastcifar.augmentation.geometry import Interpolation
from fastcifar.augmentation.mixing import MixPlan, mix_plan
from fastcifar.augmentation.policies import PolicyName
from fastcifar.beton import LARGEST
from fastcifar.dataset import ResidentSet
from fastcifar.errors import require
from kernels.augment import augment_fused
from kernels.augment.operations import CIFAR, Size
from kernels.augment.reference import (
    Flip,
    clear_box,
    crop_and_flip,
    draw_cutout,
    draw_geometry,
    fill_with_noise,
    noise_quantiles,
    normalise,
)
from kernels.backends import FLOATS, describe, interpreting

CropMode = Literal["zero", "reflect"]
ErasingValue = Literal["mean", "black", "noise"]
Backend = Literal["torch", "numba", "triton"]  # PyTorch anywhere, one loop on a CPU, one launch on CUDA; the same pixels
BACKENDS = get_args(Backend)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, in this order; every field in the units of its comment, 0 = off."""

    crop_padding: int = 4  # pixels added on every side before a random crop of the image's size, 0 to below its shorter side
    crop_mode: CropMode = "zero"  # what the padding shows: black, as torchvision's RandomCrop, or the image reflected
    flip: Flip = "random"  # horizontal flip: random, probability 1/2; alternating, every other epoch
    brightness: float = 0.0  # colour jitter, in random order: factor drawn from 1 - x .. 1 + x, 0..1
    contrast: float = 0.0  # colour jitter: factor drawn from 1 - x .. 1 + x, 0..1
    saturation: float = 0.0  # colour jitter: factor drawn from 1 - x .. 1 + x, 0..1
    hue: float = 0.0  # colour jitter: turn drawn from -x .. x, in turns, 0..0.5
    jitter_before_crop: bool = False  # colour jitter sees the whole image, before the crop pads it with black (report D)
    grayscale: float = 0.0  # probability of a grey image, 0..1
    policy: PolicyName = "none"  # a learned or random policy of operations; auto_augment is CIFAR-10's
    policy_operations: int = 2  # rand_augment: operations per image, 1..14
    policy_magnitude: int = 9  # rand_augment: strength, 0..30
    rotation: float = 0.0  # degrees; angle drawn from -x .. x, 0..180
    rotation_interpolation: Interpolation = "nearest"  # how rotated pixels are read
    random_erasing: float = 0.0  # probability that a rectangle is replaced, 0..1
    erasing_area_min: float = 0.02  # random_erasing: smallest area, share of the image, above 0
    erasing_area_max: float = 0.33  # random_erasing: largest area, share of the image, at most 1
    erasing_value: ErasingValue = "mean"  # random_erasing: the mean colour, black, or noise N(0, 1) after normalisation
    cutout: int = 0  # side in pixels of a square set to the mean colour, 0..256; its centre is uniform, its edges clipped
    mixup_alpha: float = 0.0  # Beta(alpha, alpha) of the share in mixup at the start of training, 0..10
    mixup_alpha_end: float | None = None  # alpha at the end of training, towards which it moves linearly; None: constant
    mixup_alpha_floor: float = 0.0  # alpha falls no lower than this, 0..mixup_alpha
    cutmix_alpha: float = 0.0  # Beta(alpha, alpha) of the kept area in CutMix, 0..10; with mixup: either, equally likely
    mix_probability: float = 1.0  # probability that a batch is mixed at all, 0..1; 1: every batch

    def __post_init__(self) -> None:
        require(self, 0 <= self.crop_padding < LARGEST, "crop_padding", f"0..{LARGEST - 1} pixels")
        named = {"crop_mode": CropMode, "flip": Flip, "policy": PolicyName, "erasing_value": ErasingValue}
        for field, names in (named | {"rotation_interpolation": Interpolation}).items():
            require(self, getattr(self, field) in get_args(names), field, f"one of {', '.join(get_args(names))}")
        for field in ("brightness", "contrast", "saturation", "grayscale", "random_erasing", "mix_probability"):
            require(self, 0 <= getattr(self, field) <= 1, field, "0..1")
        require(self, 0 <= self.hue <= 0.5, "hue", "0..0.5 turns")
        require(self, 1 <= self.policy_operations <= 14, "policy_operations", "1..14 operations")
        require(self, 0 <= self.policy_magnitude < policies.BINS, "policy_magnitude", "0..30")
        require(self, 0 <= self.rotation <= 180, "rotation", "0..180 degrees")
        require(self, 0 <= self.cutout <= LARGEST, "cutout", f"0..{LARGEST} pixels")
        for field in ("mixup_alpha", "cutmix_alpha"):
            require(self, 0 <= getattr(self, field) <= 10, field, "0..10")
        low, high = self.erasing_area_min, self.erasing_area_max
        require(self, 0 < low <= 1, "erasing_area_min", "above 0, at most 1")
        require(self, low <= high <= 1, "erasing_area_max", f"erasing_area_min ({low}) to 1")
        floor, end = self.mixup_alpha_floor, self.mixup_alpha_end
        most = self.mixup_alpha or 10  # without mixup it does not matter
        require(self, 0 <= floor <= most, "mixup_alpha_floor", f"0..mixup_alpha ({most})")
        reachable = end is None or (0 <= end <= 10 and (end > 0 or floor > 0))
        require(self, reachable, "mixup_alpha_end", "above 0, at most 10, or 0 with a mixup_alpha_floor above 0")

    def require_fits(self, size: Size) -> None:
        """Raise InputError where a length in pixels is too large for images of `size` (height, width)."""
        side = min(size)
        require(self, self.crop_padding < side, "crop_padding", f"0..{side - 1} pixels for images of {side}")
        require(self, self.cutout <= max(size), "cutout", f"0..{max(size)} pixels for images of {max(size)}")

    @property
    def jitter(self) -> tuple[float, float, float, float]:
        """Strengths of brightness, contrast, saturation, hue."""
        return (self.brightness, self.contrast, self.saturation, self.hue)

    @property
    def recolours(self) -> bool:
        """Whether anything works on pixel values between the gathering and the normalisation."""
        return any(self.jitter) or self.recolours_the_crop

    @property
    def recolours_the_crop(self) -> bool:
        """Whether anything works on pixel values between the crop and the normalisation."""
        jitters = any(self.jitter) and not self.jitter_before_crop
        return jitters or self.grayscale > 0 or self.policy != "none" or self.rotation > 0

    @property
    def mixes(self) -> bool:
        """Whether any batch is mixed."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    def plan_mixing(
        self, *, seed: int, epoch: int, steps: int, progress: float, device: torch.device, size: Size = CIFAR
    ) -> MixPlan:
        """Draw how each batch of an epoch is mixed; `progress` is the share of training done before it, 0 to below 1.

        size: height and width of the images.
        """
        end = self.mixup_alpha if self.mixup_alpha_end is None else self.mixup_alpha_end
        alpha = self.mixup_alpha and max(self.mixup_alpha_floor, self.mixup_alpha + (end - self.mixup_alpha) * progress)
        keys: dict[str, int] = {"seed": seed, "epoch": epoch, "steps": steps}
        return mix_plan(alpha, self.cutmix_alpha, self.mix_probability, **keys, device=device, size=size)


def draw(settings: Augmentation, samples: Tensor, seed: int, epoch: int | Tensor, size: Size = CIFAR) -> Draws:
    """Draw the parameters of every sample number in `samples` [N] int64 for an epoch, a number or a 0-d tensor beside them.

    size: height and width of the images.
    """
    down, right, flipped = draw_geometry(samples, seed, epoch, settings.crop_padding, settings.flip)
    area = (settings.erasing_area_min, settings.erasing_area_max)
    noisy = settings.random_erasing > 0 and settings.erasing_value == "noise"
    jitter, order = draws.draw_jitter(samples, seed, epoch, settings.jitter) if any(settings.jitter) else (None, None)
    operations, magnitudes = (
        draws.draw_policy(samples, seed, epoch, settings.policy, settings.policy_operations, settings.policy_magnitude, size)
        if settings.policy != "none"
        else (None, None)
    )
    return Draws(
        down=down,
        right=right,
        flipped=flipped,
        seed=torch.full((), seed, dtype=torch.int64, device=samples.device),  # filled there, where a copy would be waited for
        epoch=epoch if isinstance(epoch, Tensor) else torch.full((), epoch, dtype=torch.int64, device=samples.device),
        jitter=jitter,
        jitter_order=order,
        grey=draws.draw_grey(samples, seed, epoch, settings.grayscale) if settings.grayscale else None,
        degrees=draws.draw_rotation(samples, seed, epoch, settings.rotation) if settings.rotation else None,
        operations=operations,
        magnitudes=magnitudes,
        cutout=torch.stack(draw_cutout(samples, seed, epoch, settings.cutout, size), 1) if settings.cutout else None,
        erased=(
            draws.draw_erasing(samples, seed, epoch, settings.random_erasing, area, size) if settings.random_erasing else None
        ),
        noise_seed=draws.draw_noise_seed(samples, seed, epoch) if noisy else None,
        quantiles=draws.constant(noise_quantiles, samples.device) if noisy else None,
        size=size,
    )


def augment(
    settings: Augmentation,
    data: ResidentSet,
    positions: Tensor,
    drawn: Draws,
    mean: Tensor,
    std: Tensor,
    *,
    backend: Backend = "torch",
    dtype: torch.dtype = torch.float32,
    reuse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the augmented, normalised batch [B, 3, H, W] of `dtype`, channels_last, and its labels [B] int64.

    data: the resident set of N samples. positions: [B] int64, which of them. drawn: the parameters of all N, by `draw` with
    the same settings. mean, std: [3] float32 in 0..1. backend: numba leaves bilinear rotation to PyTorch; triton knows
    crop, flip and cutout, which it draws for itself by `drawn`'s seed and epoch. reuse: an earlier batch, whose memory may be
    overwritten if it has this one's size.

    Raises ValueError naming what does not fit and what is expected. On CUDA, where reading them would wait for the device, the
    values of `positions` are not looked at.
    """
    _check(settings, data, positions, drawn, mean, std, backend, dtype, reuse)
    reuse = reuse if reuse is not None and len(reuse) == len(positions) else None
    if backend == "triton" and len(positions):
        return augment_fused(
            data.images, data.labels, data.index, positions, _zero(positions.device), drawn.epoch, drawn.seed, mean, std,
            batch_size=len(positions), padding=settings.crop_padding, reflect=settings.crop_mode == "reflect",
            flip=settings.flip, cutout=settings.cutout, dtype=dtype, out=reuse,
        )  # fmt: skip
    if backend == "numba" and numba_serves(settings, data.images.device):
        from fastcifar.augmentation.compiled import augment_compiled  # here, since only a CPU's training needs Numba

        x = augment_compiled(settings, data.images, positions, drawn, mean, std, reuse if dtype == torch.float32 else None)
    else:
        x = _augment_torch(settings, data.images, positions, drawn, mean, std)
    return x.to(dtype), data.labels[positions]


def _check(
    settings: Augmentation, data: ResidentSet, positions: Tensor, drawn: Draws, mean: Tensor, std: Tensor,
    backend: Backend, dtype: torch.dtype, reuse: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for what `augment` does not take: behind it are loops that look at no bounds."""
    count, device = len(data.images) if data.images.ndim else 0, data.images.device
    expected = [
        ("images", data.images, [count, *drawn.size, 3], torch.uint8),
        ("labels", data.labels, [count], torch.int64),
        ("index", data.index, [count], torch.int64),
        ("positions", positions, [positions.numel()], torch.int64),
        ("mean", mean, [3], torch.float32),
        ("std", std, [3], torch.float32),
    ]
    if reuse is not None:
        nhwc = reuse.permute(0, 2, 3, 1) if reuse.ndim == 4 else reuse
        expected.append(("reuse, as NHWC,", nhwc, [*reuse.shape[:1], *drawn.size, 3], dtype))
    for name, tensor, shape, kind in expected:
        if list(tensor.shape) != shape or tensor.dtype != kind or tensor.device != device or not tensor.is_contiguous():
            wanted = f"contiguous {shape} {str(kind).removeprefix('torch.')} on {device}"
            raise ValueError(f"augment: {name} must be {wanted}, got {describe(tensor)}, strides {list(tensor.stride())}")
    if backend not in BACKENDS or dtype not in FLOATS:
        known = f"backend must be one of {', '.join(BACKENDS)} and dtype one of {FLOATS}"
        raise ValueError(f"augment: {known}, got {backend!r} and {dtype}")
    if backend == "triton" and not (data.images.is_cuda or interpreting()):
        raise ValueError(f"augment: triton needs CUDA tensors (or TRITON_INTERPRET=1), got {describe(data.images)}")
    if backend == "triton" and not triton_serves(settings):
        raise ValueError(f"augment: triton knows crop, flip and cutout only: choose torch for {settings}")
    if backend == "numba" and device.type != "cpu":
        raise ValueError(f"augment: numba needs CPU tensors, got {describe(data.images)}")
    if torch.compiler.is_compiling():
        return
    if drawn.rows != count:
        raise ValueError(f"augment: drawn must hold the parameters of all {count} images, got those of {drawn.rows}")
    if settings.erasing_value == "noise" and drawn.erased is not None and drawn.noise_seed is None:
        raise ValueError("augment: drawn must be drawn with these settings: erasing_value is noise, and it has no noise_seed")
    if device.type == "cpu" and len(values := positions.numpy()) and not 0 <= values.min() <= values.max() < count:
        raise ValueError(f"augment: positions must be 0..{count - 1}, got {values.min()}..{values.max()}")


@cache
def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=device)


def _augment_torch(
    settings: Augmentation, images: Tensor, positions: Tensor, drawn: Draws, mean: Tensor, std: Tensor
) -> Tensor:
    """`augment` in PyTorch operations, for any device and the compiler: float32 [B, 3, H, W]."""
    batch = drawn.at(positions)
    if any(settings.jitter) and settings.jitter_before_crop:
        images = as_pixels(jittered(settings, as_planes(images[positions]), batch)).to(torch.uint8)
        positions = torch.arange(len(positions), device=positions.device)
    pixels = crop_and_flip(images, positions, batch.down, batch.right, batch.flipped, reflect=settings.crop_mode == "reflect")
    if settings.recolours_the_crop:
        pixels = recolour(settings, pixels, batch)
    if batch.erased is not None and settings.erasing_value == "black":
        pixels = clear_box(pixels, batch.erased)
    x = normalise(pixels, mean, std).permute(0, 2, 3, 1)  # [B, H, W, 3]
    if batch.erased is not None and settings.erasing_value != "black":
        erases = batch.erased[:, 1] > batch.erased[:, 0]  # [B]
        if batch.noise_seed is None or batch.quantiles is None:
            x = colour.apply_where(x, erases, clear_box, batch.erased)
        else:
            with_noise = partial(fill_with_noise, quantiles=batch.quantiles)
            x = colour.apply_where(x, erases, with_noise, batch.erased, batch.noise_seed)
    if batch.cutout is not None:
        x = clear_box(x, batch.cutout)
    return x.permute(0, 3, 1, 2)


def numba_serves(settings: Augmentation, device: torch.device) -> bool:
    """Whether the Numba form exists for these settings: on a CPU, all but bilinear rotation."""
    return device.type == "cpu" and not (settings.rotation and settings.rotation_interpolation == "bilinear")


def triton_serves(settings: Augmentation) -> bool:
    """Whether the one launch of `kernels.augment` does all that the settings ask for."""
    return not (settings.recolours or settings.random_erasing)


def as_planes(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] as float32 [B, 3, H, W], in which colour operations are fastest; in one pass."""
    planes = pixels.permute(0, 3, 1, 2)
    return torch.empty(planes.shape, device=pixels.device).copy_(planes)


def as_pixels(planes: Tensor) -> Tensor:
    """[B, 3, H, W] as [B, H, W, 3]."""
    return planes.permute(0, 2, 3, 1).contiguous()


def jittered(settings: Augmentation, planes: Tensor, batch: Draws) -> Tensor:
    """Colour jitter of whole float32 pixel values [B, 3, H, W], which it may overwrite."""
    assert batch.jitter is not None
    assert batch.jitter_order is not None
    return colour.jitter(planes, batch.jitter, batch.jitter_order, turns_hue=settings.hue > 0)


def recolour(settings: Augmentation, pixels: Tensor, batch: Draws) -> Tensor:
    """Everything that works on the crop's pixel values: uint8 [B, H, W, 3] to whole float32 values of the same layout."""
    planes = as_planes(pixels)
    if any(settings.jitter) and not settings.jitter_before_crop:
        planes = jittered(settings, planes, batch)
    if batch.grey is not None:
        planes = colour.apply_where(planes, batch.grey, lambda some: colour.grey(some).expand_as(some))
    if batch.operations is not None and batch.magnitudes is not None:
        for operation, magnitude in zip(batch.operations.unbind(1), batch.magnitudes.unbind(1), strict=True):
            planes = policies.apply_operation(planes, operation, magnitude)
    if batch.degrees is not None:
        planes = geometry.affine(planes, geometry.rotation_matrix(batch.degrees), settings.rotation_interpolation)
    return as_pixels(planes)
