"""Philox4x32-10: a seed and a four-word counter go in, four random 32-bit words come out. Nothing is kept between calls.

One round, with 32-bit words c0..c3 and key k0, k1 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011):

    c0' = hi(M1 * c2) ^ c1 ^ k0        c1' = lo(M1 * c2)
    c2' = hi(M0 * c0) ^ c3 ^ k1        c3' = lo(M0 * c0)
    k0' = k0 + W0                      k1' = k1 + W1

Everything random in fastcifar is drawn at the counter (sample index, epoch, purpose, block), so what a sample looks like
in an epoch depends on the seed and on nothing else: not on batch size, position, loader, world size or a resume.

The same expressions serve NumPy and PyTorch: 32-bit words travel in int64, whose product wraps modulo 2^64 in both.
"""

from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import torch

Words = TypeVar("Words", "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", torch.Tensor)

M0, M1 = 0xD2511F53, 0xCD9E8D57  # the round's multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # the key's increments: golden ratio, sqrt(3) - 1
MASK = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a draw is for: the third word of the counter. Values are part of every published result; only append."""

    ORDER = 0  # words 0, 1: the sample's sort key in the epoch's permutation
    CROP_FLIP = 1  # word 0: row offset, word 1: column offset, word 2: flipped or not
    CUTOUT = 2  # word 0: centre row, word 1: centre column
    MIX = 3  # per batch (counter word 0 = batch number): whether, which, lambda and box of mixup and cutmix
    TORCH = 4  # word 0, 1: the epoch's seed of PyTorch's own generator, which serves dropout and stochastic depth on CUDA
    HOLD_OUT = 5  # words 0, 1: sort key that decides which training samples are held out for validation
    FIRST_FLIP = 6  # word 0: whether an alternating flip flips the even epochs or the odd ones; the counter's epoch is 0
    JITTER = 7  # words 0..3: brightness, contrast, saturation, hue
    JITTER_ORDER = 8  # word 0: which of the 24 orders of the four; word 1: grey or not
    ROTATION = 9  # word 0: angle
    POLICY = 10  # block = place in the sequence; word 0: operation, word 1: sign, word 2: bin or whether applied at all
    ERASING = (
        11  # block 0, word 0: whether; block k in 1..10, the k-th try: words 0..3 area, ratio, row, column; block 11, words
    )
    # 0, 1: the seed of the noise that erases
    NOISE = 12  # by that seed, counter word 0 = value number // 8: eight 16-bit quantiles, the low half of each word first
    DROPOUT = 13  # | layer << 8, block = element // 8: eight 16-bit values, the low half of each word first (kernels.dropout)
    LABEL_NOISE = 14  # word 0: whether the label is replaced, word 1: by which


def philox(seed: Any, sample: Words, epoch: int | Words, purpose: int, block: int | Words = 0) -> tuple[Words, ...]:
    """Return four int64 arrays shaped like `sample`, each holding uniform words in 0..2^32-1.

    seed: 0..2^64-1. sample, epoch, purpose, block: the counter's words, each 0..2^32-1; `sample` (and `epoch` and
    `block`, if they are arrays) int64, NumPy or PyTorch, broadcast against each other. Equals Random123's philox4x32-10 and
    `tl.philox(seed, sample, epoch, purpose, block)`.
    """
    k0, k1 = seed & MASK, seed >> 32 & MASK
    c0: Any  # after two rounds every word has the shape and kind of `sample`
    c1: Any
    c2: Any
    c3: Any
    c0, c1, c2, c3 = sample, epoch, purpose, block
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = p1 >> 32 & MASK ^ c1 ^ k0, p1 & MASK, p0 >> 32 & MASK ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + W0 & MASK, k1 + W1 & MASK
    return c0, c1, c2, c3


def below(words: Words, bound: int) -> Words:
    """Map 32-bit words to integers 0..bound-1 by the high half of a product: bias at most bound / 2^32, no division."""
    return words * bound >> 32


def uniform(words: Words) -> Words:
    """Map 32-bit words to float32 in [0, 1): the top 24 bits, so that every value is exact in every backend."""
    if isinstance(words, torch.Tensor):
        return (words >> 8).to(torch.float32) * 2.0**-24
    return (words >> 8).astype(np.float32) * np.float32(2.0**-24)  # type: ignore[return-value]
