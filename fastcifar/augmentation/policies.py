"""RandAugment, AutoAugment and TrivialAugment: their tables, and their operations on batches of pixel values.

All three reduce to the same thing: for each image a short sequence of (operation, signed magnitude). What differs is the
table they draw from. Operations and tables are torchvision's.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastcifar.augmentation import colour, geometry
from fastcifar.augmentation.colour import apply_where
from kernels.augment.operations import CIFAR, NUMBER, OPERATIONS, Size

PolicyName = Literal["none", "rand_augment", "auto_augment", "auto_augment_imagenet", "trivial_augment"]
Pairs = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]  # two of (operation, probability, magnitude 0..9)

SIGNED = range(NUMBER["ShearX"], NUMBER["Sharpness"] + 1)  # their magnitude is negated with probability 1/2
DRAWN = NUMBER["Equalize"] + 1  # how many operations RandAugment and TrivialAugment choose from
BINS = 31  # RandAugment's and TrivialAugment's magnitudes, 0..30

# AutoAugment's policy for CIFAR-10 (Cubuk et al., "AutoAugment", CVPR 2019, table 7).
AUTO_AUGMENT_CIFAR10: Pairs = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)

# Its policy for ImageNet (table 9), torchvision's default.
AUTO_AUGMENT_IMAGENET: Pairs = (
    (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
    (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
    (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
    (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
    (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
    (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
    (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
    (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
    (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
    (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
    (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
    (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
    (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
    (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
    (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
    (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
    (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
    (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)
AUTO_AUGMENT: dict[str, Pairs] = {"auto_augment": AUTO_AUGMENT_CIFAR10, "auto_augment_imagenet": AUTO_AUGMENT_IMAGENET}


@dataclass(frozen=True)
class Strengths:
    """The largest magnitudes of a table; the smallest is 0 but for Posterize and Solarize, which run the other way."""

    shear: float  # tangent of the angle
    translate: float  # share of the side
    rotate: float  # degrees
    enhance: float  # Brightness, Color, Contrast, Sharpness: factor 1 - x or 1 + x
    posterize: int  # bits lost
    translate_pixels: float = 0.0  # this many pixels, whatever the side


USUAL = Strengths(shear=0.3, translate=150 / 331, rotate=30, enhance=0.9, posterize=4)  # RandAugment and AutoAugment
WIDE = Strengths(shear=0.99, translate=0, rotate=135, enhance=0.99, posterize=6, translate_pixels=32)  # TrivialAugment


def magnitude_table(strengths: Strengths, bins: int, size: Size = CIFAR) -> Tensor:
    """Magnitudes [15 operations, bins] float32 for images of `size`: strength rises with the bin, evenly."""
    table = torch.zeros(len(OPERATIONS), bins)
    height, width = size
    for strength, names in (
        (strengths.shear, ("ShearX", "ShearY")),
        (strengths.translate * width + strengths.translate_pixels, ("TranslateX",)),
        (strengths.translate * height + strengths.translate_pixels, ("TranslateY",)),
        (strengths.rotate, ("Rotate",)),
        (strengths.enhance, ("Brightness", "Color", "Contrast", "Sharpness")),
    ):
        for name in names:
            table[NUMBER[name]] = torch.linspace(0.0, strength, bins)
    table[NUMBER["Posterize"]] = (8 - torch.arange(bins) / ((bins - 1) / strengths.posterize)).round()  # bits kept
    table[NUMBER["Solarize"]] = torch.linspace(1.0, 0.0, bins)  # threshold, share of the range
    return table


def apply_operation(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Apply to each image of [B, 3, H, W] its own operation [B] with its magnitude [B]. May overwrite `pixels`."""

    def chosen(*names: str) -> Tensor:
        return sum((operation == NUMBER[name] for name in names), torch.zeros_like(operation, dtype=torch.bool))

    pixels = apply_where(pixels, chosen("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"), _move, operation, magnitude)
    pixels = apply_where(pixels, chosen("Brightness"), colour.brightness, 1 + magnitude)
    pixels = apply_where(pixels, chosen("Color"), colour.saturation, 1 + magnitude)
    pixels = apply_where(pixels, chosen("Contrast"), colour.contrast, 1 + magnitude)
    pixels = apply_where(pixels, chosen("Sharpness"), colour.sharpness, 1 + magnitude)
    pixels = apply_where(pixels, chosen("Posterize"), colour.posterize, magnitude)
    pixels = apply_where(pixels, chosen("Solarize"), colour.solarize, magnitude)
    pixels = apply_where(pixels, chosen("AutoContrast"), colour.auto_contrast)
    pixels = apply_where(pixels, chosen("Equalize"), colour.equalize)
    return apply_where(pixels, chosen("Invert"), colour.invert)


def _move(pixels: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """The five operations that move pixels are one gather with a matrix each."""
    return geometry.affine(pixels, move_matrices(operation, magnitude, (pixels.shape[2], pixels.shape[3])), "nearest")


def move_matrices(operation: Tensor, magnitude: Tensor, size: Size) -> Tensor:
    """Inverse matrices [B, 2, 3] of the operations that move pixels of images of `size`; for the others the identity."""

    def of(name: str) -> Tensor:
        return torch.where(operation == NUMBER[name], magnitude, 0.0)

    right, down = of("TranslateX").trunc(), of("TranslateY").trunc()
    sheared = geometry.shear_translate_matrix(of("ShearX"), of("ShearY"), right, down, size)
    rotates = (operation == NUMBER["Rotate"])[:, None, None]
    return torch.where(rotates, geometry.rotation_matrix(magnitude), sheared)
