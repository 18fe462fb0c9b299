"""Keyed randomness: published vectors, equal bits in NumPy and PyTorch, and draws that look random."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kernels.philox import Purpose, below, philox, uniform

# Random123's kat_vectors, philox4x32 with 10 rounds: (counter, key, result).
PUBLISHED = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

word = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("counter", "key", "expected"), PUBLISHED)
@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_published_vectors(counter, key, expected, array):
    seed = key[0] | key[1] << 32
    words = philox(seed, array([counter[0]]), *counter[1:])
    assert tuple(int(w[0]) for w in words) == expected


@given(seed=st.integers(0, 2**64 - 1), samples=st.lists(word, min_size=1, max_size=50), epoch=word, purpose=word, block=word)
def test_numpy_and_pytorch_agree_to_the_bit(seed, samples, epoch, purpose, block):
    ours = philox(seed, np.array(samples, np.int64), epoch, purpose, block)
    theirs = philox(seed, torch.tensor(samples), torch.tensor(epoch), purpose, block)
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(a, b.numpy())
        assert np.array_equal(uniform(a), uniform(b).numpy())
        assert np.array_equal(below(a, 9), below(b, 9).numpy())


def test_every_part_of_the_counter_changes_the_draw():
    samples = torch.arange(1000)
    base = philox(1, samples, 2, 3, 4)
    for seed, *rest in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)):
        for a, b in zip(base, philox(seed, samples, *rest), strict=True):
            assert (a == b).float().mean() < 0.01


@pytest.mark.parametrize("bound", [2, 9, 32, 1000])
def test_below_is_uniform_by_chi_square(bound):
    words = philox(7, np.arange(200_000), 3, Purpose.CROP_FLIP)
    for word in words:
        drawn = below(word, bound)
        assert drawn.min() == 0
        assert drawn.max() == bound - 1
        assert 1e-5 < stats.chisquare(np.bincount(drawn)).pvalue < 1 - 1e-5  # nor more even than chance


def test_neighbouring_samples_and_epochs_are_uncorrelated():
    samples = np.arange(100_000)
    first, second = (uniform(philox(0, samples, epoch, Purpose.CUTOUT)[0]) for epoch in (0, 1))
    for a, b in ((first[:-1], first[1:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_uniform_covers_zero_to_below_one():
    values = uniform(np.array([0, 255, 256, 2**32 - 1]))
    assert values.tolist() == [0, 0, 2.0**-24, 1 - 2.0**-24]
