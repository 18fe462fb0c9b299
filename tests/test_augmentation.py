"""Augmentation against plain per-image references, and its independence of everything but the key."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as V

from fastcifar import augmentation
from fastcifar.augmentation import Augmentation, augment, crop_and_flip, cutout, mix, mix_plan, normalise, partner
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, epoch_order
from fastcifar.errors import InputError
from fastcifar.recipes import RECIPES
from kernels.philox import Purpose, below, philox

N = 64
EPOCH = torch.tensor(5)
MEAN, STD = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
EVERYTHING = Augmentation(crop_padding=4, crop_mode="reflect", cutout=12)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4, 31])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_equal_torchvision_pixel_for_pixel(images, mode, padding, flip):
    positions = torch.arange(N).flip(0)
    samples = positions + 1000
    drawn = crop_and_flip(images, positions, samples, 3, EPOCH, padding, mode, flip)
    down, right, mirror, _ = philox(3, samples, 5, Purpose.CROP_FLIP)
    mirrored = 0
    for i in range(N):
        image = images[positions[i]].permute(2, 0, 1)
        padded = V.pad(image, [padding] * 4, padding_mode="reflect" if mode == "reflect" else "constant")
        top, left = int(below(down[i], 2 * padding + 1)), int(below(right[i], 2 * padding + 1))
        expected = V.crop(padded, top, left, 32, 32)
        if flip and below(mirror[i], 2) == 1:
            expected, mirrored = V.horizontal_flip(expected), mirrored + 1
        assert torch.equal(drawn[i].permute(2, 0, 1), expected)
    assert mirrored == 0 if not flip else N / 4 < mirrored < 3 * N / 4


def test_crop_offsets_are_uniform_over_the_padded_image():
    samples = torch.arange(100_000)
    down, right, _, _ = philox(0, samples, 0, Purpose.CROP_FLIP)
    for word in (down, right):
        counts = torch.bincount(below(word, 9), minlength=9).double()
        assert counts.shape == (9,)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 8 + 5 * 4  # chi-square, 8 degrees of freedom


def test_normalise_equals_torchvision(images):
    ours = normalise(images, MEAN, STD)
    theirs = V.normalize(V.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True), CIFAR10_MEAN, CIFAR10_STD)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # two roundings in another order
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("side", [1, 5, 16, 32])
def test_cutout_clears_the_clipped_square_and_nothing_else(side):
    x = torch.ones(N, 3, 32, 32)
    samples = torch.arange(N)
    cut = cutout(x, samples, 0, EPOCH, side)
    rows, columns, _, _ = philox(0, samples, 5, Purpose.CUTOUT)
    for i in range(N):
        top, left = int(below(rows[i], 32)) - side // 2, int(below(columns[i], 32)) - side // 2
        expected = torch.ones(3, 32, 32)
        expected[:, max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
        assert torch.equal(cut[i], expected)
    assert (x == 1).all()  # the input is not touched


def test_pixels_depend_on_seed_epoch_and_sample_alone(images):
    index = torch.arange(N) + 7

    def pixels(positions, index=index, seed=1, epoch=EPOCH, images=images):
        return augment(EVERYTHING, images, positions, index, MEAN, STD, seed, epoch)

    whole = pixels(torch.arange(N))
    assert torch.equal(torch.cat([pixels(part) for part in torch.arange(N).split(7)]), whole)  # batch size
    assert torch.equal(pixels(torch.arange(N).flip(0)), whole.flip(0))  # batch position
    subset = torch.tensor([3, 9, 40])
    assert torch.equal(pixels(torch.arange(3), index=index[subset], images=images[subset]), whole[subset])  # other set
    for other in (
        pixels(torch.arange(N), seed=2),
        pixels(torch.arange(N), epoch=EPOCH + 1),
        pixels(torch.arange(N), index=index + 1),
    ):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_each_epoch_is_a_permutation_of_its_own():
    index = torch.arange(1000)
    orders = [epoch_order(index, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert torch.equal(order.sort().values, index)
    for a in range(4):
        for b in range(a):
            assert (orders[a] == orders[b]).sum() < 20  # about one fixed point is expected
    assert torch.equal(orders[0], epoch_order(index, 0, 0))


def test_order_of_a_subset_is_the_order_of_the_whole_with_the_rest_left_out():
    whole = epoch_order(torch.arange(1000), 0, 3)
    kept = torch.arange(0, 1000, 3)
    assert torch.equal(kept[epoch_order(kept, 0, 3)], whole[whole % 3 == 0])


def test_mixup_and_cutmix_shares_pixels_and_labels_agree():
    settings = Augmentation(mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.8)
    steps = 4000
    plan = mix_plan(settings, 0, 1, steps, 0.0, torch.device("cpu"))
    area = (plan.box[:, 1] - plan.box[:, 0]) * (plan.box[:, 3] - plan.box[:, 2])
    is_mixup, is_cutmix = plan.blend < 1, area > 0
    assert not (is_mixup & is_cutmix).any()
    assert abs(is_mixup.float().mean() - 0.4) < 0.05
    assert abs(is_cutmix.float().mean() - 0.4) < 0.05
    x = torch.stack([torch.full((3, 32, 32), float(i)) for i in range(4)])
    for step in range(40):
        mixed = mix(x, plan.blend[step], plan.box[step])
        expected = plan.share[step] * x.mean((1, 2, 3)) + (1 - plan.share[step]) * partner(x).mean((1, 2, 3))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)  # the share is the share of the pixels
        if is_cutmix[step]:
            assert set(mixed[1].unique().tolist()) <= {1.0, 2.0}  # pasted, not blended
    untouched = ~is_mixup & ~is_cutmix
    assert (plan.share[untouched] == 1).all()
    step = int(torch.nonzero(untouched)[0])
    assert torch.equal(mix(x, plan.blend[step], plan.box[step]), x)


@pytest.mark.parametrize(
    "settings", [Augmentation(), Augmentation(mixup_alpha=1.0, cutmix_alpha=1.0, mix_probability=0.0)], ids=["no alpha", "never"]
)
def test_without_mixing_every_label_is_its_own(settings):
    plan = mix_plan(settings, 0, 0, 1000, 0.0, torch.device("cpu"))
    assert not settings.mixes
    assert (plan.share == 1).all()
    assert (plan.blend == 1).all()
    assert (plan.box[:, 0] == plan.box[:, 1]).all()


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_follow_beta(alpha):
    drawn = np.sort(augmentation.beta(0, np.arange(50_000), 0, np.full(50_000, alpha)))
    expected = np.sort(np.random.default_rng(0).beta(alpha, alpha, 50_000))
    # Two-sample Kolmogorov-Smirnov statistic; 2.2 / sqrt(n / 2) is exceeded once in ten thousand.
    grid = np.concatenate([drawn, expected])
    gap = np.abs(np.searchsorted(drawn, grid, "right") - np.searchsorted(expected, grid, "right")).max() / 50_000
    assert gap < 2.2 / np.sqrt(25_000)


def test_mixup_alpha_falls_over_training():
    settings = Augmentation(mixup_alpha=1.0, mixup_alpha_end=0.1)

    def variance(progress):
        return mix_plan(settings, 0, 0, 20_000, progress, torch.device("cpu")).share.var().item()

    for progress, alpha in ((0.0, 1.0), (0.5, 0.55), (1.0, 0.1)):
        assert variance(progress) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)  # variance of Beta(alpha, alpha)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", -1), ("crop_padding", 32), ("crop_mode", "wrap"), ("cutout", -1), ("cutout", 33),
        ("mixup_alpha", -0.1), ("mixup_alpha_end", 0.0), ("mix_probability", 1.1), ("hue", 0.6), ("grayscale", 2),
        ("rotation", 181), ("rand_augment", -1), ("random_erasing", 1.5), ("brightness", -0.2),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"{field} must be .*got {value}"):
        Augmentation(**{field: value})


def test_recipes_say_what_is_not_applied_yet():
    assert RECIPES["dropout_resnet24"].recipe.augmentation.not_applied == []
    assert set(RECIPES["se_resnet18"].recipe.augmentation.not_applied) == {"brightness", "contrast", "saturation", "hue"}
    assert "rand_augment" in RECIPES["robust_resnet64"].recipe.augmentation.not_applied
    plain = dataclasses.replace(RECIPES["se_resnet18"].recipe.augmentation, brightness=0, contrast=0, saturation=0, hue=0)
    assert plain.not_applied == []
