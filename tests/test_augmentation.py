"""Augmentation: every operation against torchvision's on the same parameters, parameters that depend on the key alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
import torchvision.transforms.v2.functional as V
from scipy import stats

from fastcifar import augmentation
from fastcifar.augmentation import Augmentation, augment, colour, draw, geometry, numba_serves, policies
from fastcifar.augmentation.draws import ORDERS, draw_erasing, draw_noise_seed
from fastcifar.dataset import CIFAR10_MEAN, CIFAR10_STD, ResidentSet, epoch_order
from fastcifar.errors import InputError
from fastcifar.recipes import RECIPES
from kernels.augment.reference import clear_box, crop_and_flip, noise, noise_quantiles, normalise

N = 48
MEAN, STD = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_STD)
EVERYTHING = Augmentation(
    crop_mode="reflect", brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, policy="rand_augment",
    rotation=15.0, rotation_interpolation="bilinear", random_erasing=0.5, cutout=12,
)  # fmt: skip
# The recipes whose augmentation differs.
OWN_AUGMENTATION = (
    "dropout_resnet24", "resnet42", "se_resnet18", "robust_resnet64", "light_resnet18_v2_45", "mish_se_resnet18"
)  # fmt: skip
NEAREST = replace(EVERYTHING, rotation_interpolation="nearest")
SAMPLES = torch.arange(20_000)


def shown(settings, images, positions, drawn, mean=MEAN, std=STD, backend="torch"):
    """The images of `augment`."""
    numbers = torch.arange(len(images))
    return augment(settings, ResidentSet(images, numbers, numbers), positions, drawn, mean, std, backend=backend)[0]


@pytest.fixture(scope="module")
def images():
    """Pictures with structure: smooth, noisy, of one level, of two, with a flat channel."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.linspace(0, 6, 32))[:, None, None] * np.cos(np.linspace(0, 5, 32))[None, :, None]
    smooth = 127 + 120 * wave[None] * rng.uniform(-1, 1, (N, 1, 1, 3)) + rng.uniform(-8, 8, (N, 32, 32, 3))
    pictures = smooth.clip(0, 255).astype(np.uint8)
    pictures[:8] = rng.integers(0, 256, (8, 32, 32, 3))
    pictures[8] = 77
    pictures[9] = np.where(rng.random((32, 32, 1)) < 0.5, 3, 250)
    pictures[10, ..., 1] = 0
    return torch.from_numpy(pictures)


@pytest.fixture
def planes(images):
    return images.permute(0, 3, 1, 2).contiguous()


def one_by_one(planes, operation):
    return torch.stack([operation(planes[i], i) for i in range(len(planes))]).float()


def assert_same_levels(ours, theirs, exact=False):
    """Whole levels 0..255; equal, or within one level for 99.9 % of them."""
    assert torch.equal(ours, ours.round())
    assert ours.min() >= 0
    assert ours.max() <= 255
    if exact:
        assert torch.equal(ours, theirs)
    else:
        assert ((ours - theirs).abs() <= 1).float().mean() >= 0.999


# Operations


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("padding", [0, 1, 4, 31])
def test_crop_and_flip_equal_torchvision_pixel_for_pixel(images, mode, padding):
    torch.manual_seed(padding)
    positions = torch.arange(N).flip(0)
    down, right = (torch.randint(-padding, padding + 1, (N,)) for _ in range(2))
    flipped = torch.rand(N) < 0.5
    ours = crop_and_flip(images, positions, down, right, flipped, reflect=mode == "reflect")
    for i in range(N):
        padded = V.pad(
            images[positions[i]].permute(2, 0, 1), [padding] * 4, padding_mode="constant" if mode == "zero" else mode
        )
        expected = V.crop(padded, int(down[i]) + padding, int(right[i]) + padding, 32, 32)
        expected = V.horizontal_flip(expected) if flipped[i] else expected
        assert torch.equal(ours[i].permute(2, 0, 1), expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (colour.brightness, V.adjust_brightness, 0, 2), (colour.contrast, V.adjust_contrast, 0, 2),
        (colour.saturation, V.adjust_saturation, 0, 2), (colour.sharpness, V.adjust_sharpness, 0, 2),
        (colour.hue, V.adjust_hue, -0.5, 0.5), (colour.solarize, lambda x, t: V.solarize(x, 255 * t), 0, 1),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness", "hue", "solarize"],
)  # fmt: skip
def test_colour_operations_equal_torchvision(planes, ours, theirs, low, high):
    torch.manual_seed(0)
    strength = low + (high - low) * torch.rand(N)
    strength[0], strength[1] = low, high
    assert_same_levels(ours(planes.float(), strength), one_by_one(planes, lambda x, i: theirs(x, float(strength[i]))))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (colour.auto_contrast, V.autocontrast), (colour.equalize, V.equalize), (colour.invert, V.invert),
        (lambda x: colour.grey(x).expand_as(x), lambda x: V.rgb_to_grayscale(x, 3)),
        (lambda x: colour.posterize(x, torch.arange(N) % 9), None),
    ],
    ids=["auto_contrast", "equalize", "invert", "grey", "posterize"],
)  # fmt: skip
def test_table_operations_equal_torchvision_exactly(planes, ours, theirs):
    expected = one_by_one(planes, (lambda x, i: theirs(x)) if theirs else (lambda x, i: V.posterize(x, i % 9)))
    assert_same_levels(ours(planes.float()), expected, exact=True)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_rotation_equals_torchvision(planes, interpolation):
    torch.manual_seed(0)
    degrees = torch.rand(N) * 360 - 180
    ours = geometry.affine(planes.float(), geometry.rotation_matrix(degrees), interpolation)
    mode = T.InterpolationMode(interpolation)
    assert_same_levels(ours, one_by_one(planes, lambda x, i: V.rotate(x, float(degrees[i]), interpolation=mode)))


@pytest.mark.parametrize("name", policies.OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_policy_operations_equal_torchvisions_own_dispatch(planes, name, sign):
    table = policies.magnitude_table(policies.WIDE, 31)[policies.NUMBER[name]]
    magnitude = table[torch.arange(N) % 31] * (sign if policies.NUMBER[name] in policies.SIGNED else 1)
    ours = policies.apply_operation(planes.float(), torch.full((N,), policies.NUMBER[name]), magnitude)
    baseline = T.RandAugment()

    def theirs(x, i):
        return baseline._apply_image_or_video_transform(
            x, name, float(magnitude[i]), T.InterpolationMode.NEAREST, {torch.Tensor: None}
        )

    assert_same_levels(
        ours, one_by_one(planes, theirs), exact=name.startswith(("Translate", "Posterize", "Auto", "Equal", "Inv"))
    )


def test_colour_jitter_applies_each_images_own_order(planes):
    torch.manual_seed(0)
    factors = torch.stack([0.5 + torch.rand(N), 0.5 + torch.rand(N), 0.5 + torch.rand(N), torch.rand(N) - 0.5], 1)
    order = torch.tensor(ORDERS)[torch.arange(N) % 24]
    operations = (V.adjust_brightness, V.adjust_contrast, V.adjust_saturation, V.adjust_hue)

    def theirs(x, i):
        for number in order[i].tolist():
            x = operations[number](x, float(factors[i, number]))
        return x

    ours = colour.jitter(planes.float(), factors, order, turns_hue=True)
    gap = (ours - one_by_one(planes, theirs)).abs()
    assert (gap <= 2).float().mean() >= 0.999  # four operations, each within one level


def test_normalise_equals_torchvision(images):
    ours = normalise(images, MEAN, STD)
    theirs = V.normalize(V.to_dtype(images.permute(0, 3, 1, 2), torch.float32, scale=True), CIFAR10_MEAN, CIFAR10_STD)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)  # two roundings in another order
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_boxes_are_cleared_clipped_and_nothing_else():
    torch.manual_seed(0)
    corner, size = torch.randint(-20, 33, (N, 2)), torch.randint(0, 40, (N, 2))
    box = torch.stack([corner[:, 0], corner[:, 0] + size[:, 0], corner[:, 1], corner[:, 1] + size[:, 1]], 1)
    x = torch.ones(N, 32, 32, 3)
    cleared = clear_box(x, box)
    for i, (top, bottom, left, right) in enumerate(box.clamp(min=0).tolist()):
        expected = torch.ones(32, 32, 3)
        expected[top:bottom, left:right] = 0
        assert torch.equal(cleared[i], expected)
    assert (x == 1).all()  # the input is not touched


def test_the_static_form_for_gpus_gives_the_grouped_forms_pixels(images, monkeypatch):
    index = torch.arange(N)
    for policy in ("rand_augment", "auto_augment", "trivial_augment"):
        settings = Augmentation(**{**vars(EVERYTHING), "policy": policy})
        arguments = (settings, images, index, draw(settings, index, 3, 1), MEAN, STD)
        grouped = shown(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert torch.equal(shown(*arguments), grouped)


@pytest.mark.parametrize(
    "settings",
    [
        *(RECIPES[name].recipe.augmentation for name in OWN_AUGMENTATION),
        NEAREST,
        EVERYTHING,
        *(Augmentation(policy=policy, grayscale=0.3) for policy in ("auto_augment", "trivial_augment")),
        Augmentation(policy="rand_augment", policy_operations=5, policy_magnitude=30, rotation=180.0),
        Augmentation(crop_padding=31, flip="alternating", brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, cutout=32),
    ],
    ids=[*OWN_AUGMENTATION, "everything", "bilinear", "auto_augment", "trivial_augment", "strong", "extreme"],
)
def test_numba_shows_pytorchs_pixels_to_the_bit(images, settings):
    nobody = torch.arange(0)
    assert shown(settings, images, nobody, draw(settings, torch.arange(N), 0, 0), MEAN, STD, "numba").shape == (0, 3, 32, 32)
    index = torch.arange(N) * 1000 + 7
    for epoch in range(2):
        arguments = (settings, images, torch.arange(N).flip(0), draw(settings, index, 2**63 - 1, epoch), MEAN, STD)
        assert numba_serves(settings, images.device) == (settings is not EVERYTHING)  # bilinear: left to PyTorch
        ours, expected = shown(*arguments, "numba"), shown(*arguments)
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


def test_numba_computes_every_policy_operation_as_pytorch_does(images):
    for number, name in enumerate(policies.OPERATIONS):
        settings = Augmentation(crop_padding=0, flip="off", policy="rand_augment", policy_operations=1)
        table = policies.magnitude_table(policies.WIDE, 31)[number]
        drawn = draw(settings, torch.arange(N), 0, 0)
        sign = torch.where((torch.arange(N) % 2 == 1) & (number in policies.SIGNED), -1, 1)
        drawn = replace(drawn, operations=torch.full((N, 1), number), magnitudes=(table[torch.arange(N) % 31] * sign)[:, None])
        arguments = (settings, images, torch.arange(N), drawn, MEAN, STD)
        assert torch.equal(shown(*arguments, "numba"), shown(*arguments)), name


def test_matrices_follow_their_samples():
    drawn, positions = draw(NEAREST, torch.arange(N), 0, 0), torch.tensor([5, 2, 40])
    fresh = drawn.at(positions)
    for name in ("moves", "rotations"):
        whole = getattr(drawn, name)
        assert torch.equal(getattr(drawn.at(positions), name), whole[positions])
        assert torch.equal(getattr(fresh, name), whole[positions])


@pytest.mark.slow
def test_everything_compiles_into_one_graph(images):
    index = torch.arange(N)
    arguments = (EVERYTHING, images, index, draw(EVERYTHING, index, 3, 1), MEAN, STD)
    compiled = torch.compile(shown, fullgraph=True, dynamic=False)(*arguments)
    levels = (compiled - shown(*arguments)).abs() * 255 * STD.max()
    assert (levels <= 1.5).float().mean() > 0.999  # the compiler fuses multiply and add, which rounds otherwise


# Parameters


@pytest.mark.parametrize(("settings", "backend"), [(EVERYTHING, "torch"), (NEAREST, "torch"), (NEAREST, "numba")])
def test_pixels_depend_on_seed_epoch_and_sample_alone(images, settings, backend):
    index = torch.arange(N) + 7

    def pixels(positions, index=index, seed=1, epoch=5, images=images):
        return shown(settings, images, positions, draw(settings, index, seed, epoch), MEAN, STD, backend)

    everyone = torch.arange(N)
    whole = pixels(everyone)
    assert torch.equal(torch.cat([pixels(part) for part in everyone.split(7)]), whole)  # batch size
    assert torch.equal(pixels(everyone.flip(0)), whole.flip(0))  # batch position
    subset = torch.tensor([3, 9, 40])
    assert torch.equal(pixels(torch.arange(3), index=index[subset], images=images[subset]), whole[subset])  # another set
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    assert torch.equal(pixels(everyone), whole)
    torch.set_num_threads(threads)
    for other in (pixels(everyone, seed=2), pixels(everyone, epoch=6), pixels(everyone, index=index + 1)):
        assert (other != whole).flatten(1).any(1).float().mean() > 0.9


def test_crop_offsets_are_uniform_and_half_are_flipped():
    drawn = draw(Augmentation(), SAMPLES, 0, 0)
    for offset in (drawn.down, drawn.right):
        counts = torch.bincount(offset + 4, minlength=9)
        assert counts.shape == (9,)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert abs(drawn.flipped.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(len(SAMPLES))
    assert not draw(Augmentation(flip="off"), SAMPLES, 0, 0).flipped.any()


def test_alternating_flip_flips_every_other_epoch_after_a_first_draw():
    settings = Augmentation(flip="alternating")
    epochs = [draw(settings, SAMPLES, 0, epoch).flipped for epoch in range(4)]
    assert abs(epochs[0].float().mean() - 0.5) < 0.02
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])
    assert not torch.equal(draw(settings, SAMPLES, 1, 0).flipped, epochs[0])


def test_jitter_follows_torchvisions_ranges_and_orders():
    drawn = draw(Augmentation(brightness=0.2, contrast=1.0, saturation=0.5, hue=0.05), SAMPLES, 0, 0)
    ranges = [(0.8, 1.2), (0.0, 2.0), (0.5, 1.5), (-0.05, 0.05)]
    for column, (low, high) in zip(drawn.jitter.unbind(1), ranges, strict=True):
        assert stats.kstest((column - low) / (high - low), "uniform").pvalue > 1e-4
    numbers = (drawn.jitter_order * torch.tensor([64, 16, 4, 1])).sum(1)
    assert len(numbers.unique()) == 24
    assert torch.equal(drawn.jitter_order.sort(1).values, torch.arange(4).expand(len(SAMPLES), 4))


def test_policies_draw_what_torchvision_documents():
    rand = draw(Augmentation(policy="rand_augment", policy_operations=3, policy_magnitude=9), SAMPLES, 0, 0)
    assert rand.operations.shape == (len(SAMPLES), 3)
    for name, (table, signed) in T.RandAugment._AUGMENTATION_SPACE.items():
        chosen = rand.operations == policies.NUMBER[name]
        assert abs(chosen.float().mean() - 1 / 14) < 0.005
        expected = table(31, 32, 32)
        expected = 0.0 if expected is None else float(expected[9])
        sizes = rand.magnitudes[chosen]
        torch.testing.assert_close(sizes.abs(), torch.full_like(sizes, expected))
        assert not signed or abs((sizes < 0).float().mean() - 0.5) < 0.05
    trivial = draw(Augmentation(policy="trivial_augment"), SAMPLES, 0, 0)
    assert trivial.operations.shape == (len(SAMPLES), 1)
    for name, (table, _) in T.TrivialAugmentWide._AUGMENTATION_SPACE.items():
        expected = table(31, 32, 32)
        sizes = trivial.magnitudes[trivial.operations == policies.NUMBER[name]].abs().unique()
        expected = torch.zeros(1) if expected is None else expected.float().unique()
        torch.testing.assert_close(sizes, expected)


@pytest.mark.parametrize(("name", "torchvisions"), [("auto_augment", "CIFAR10"), ("auto_augment_imagenet", "IMAGENET")])
def test_auto_augment_has_torchvisions_policies_and_probabilities(name, torchvisions):
    baseline = T.AutoAugment(T.AutoAugmentPolicy[torchvisions])
    theirs = [tuple((operation, chance, size or 0) for operation, chance, size in pair) for pair in baseline._policies]
    assert theirs == list(policies.AUTO_AUGMENT[name])
    table = policies.magnitude_table(policies.USUAL, 10)
    for operation, (magnitudes, signed) in baseline._AUGMENTATION_SPACE.items():
        expected = magnitudes(10, 32, 32)
        expected = torch.zeros(10) if expected is None else expected.float()
        torch.testing.assert_close(table[policies.NUMBER[operation]], expected)
        assert signed == (policies.NUMBER[operation] in policies.SIGNED)
    drawn = draw(Augmentation(policy=name), SAMPLES, 0, 0)
    share = sum(chance for pair in theirs for operation, chance, _ in pair if operation == "Equalize") / 25 / 2
    assert abs((drawn.operations == policies.NUMBER["Equalize"]).float().mean() - share) < 0.01


@pytest.mark.parametrize("areas", [(0.02, 0.33), (0.02, 0.1)])
def test_random_erasing_follows_torchvision(areas):
    box = draw_erasing(SAMPLES, 0, 0, 0.5, areas)
    erased = box[:, 1] > box[:, 0]
    assert abs(erased.float().mean() - 0.5) < 0.02
    assert 0 <= box.min() <= box.max() <= 32
    top, bottom, left, right = box[erased].unbind(1)
    baseline = T.RandomErasing(p=1.0, value=0, scale=areas)
    torch.manual_seed(0)
    theirs = [baseline.make_params([torch.zeros(3, 32, 32)]) for _ in range(2000)]
    for ours, key in ((bottom - top, "h"), (right - left, "w"), (top, "i"), (left, "j")):
        assert stats.ks_2samp(ours, [p[key] for p in theirs]).pvalue > 1e-4


def test_erasing_puts_in_the_mean_colour_black_or_torchvisions_noise(images):
    """torchvision draws N(0, 1) a value after normalisation; ours is compared with its values' distribution."""
    index, everyone = torch.arange(N), torch.arange(N)
    found = {}
    for value in ("mean", "black", "noise"):
        settings = Augmentation(crop_padding=0, flip="off", random_erasing=1.0, erasing_value=value)
        drawn = draw(settings, index, 0, 0)
        x = shown(settings, images, everyone, drawn, MEAN, STD)
        inside = (clear_box(torch.ones(N, 32, 32, 3), drawn.erased) == 0).permute(0, 3, 1, 2)
        assert torch.equal(x[~inside], normalise(images, MEAN, STD)[~inside])
        found[value] = x, inside
    x, inside = found["mean"]
    assert not x[inside].any()
    x, inside = found["black"]
    assert torch.equal(x[inside], normalise(torch.zeros_like(images), MEAN, STD)[inside])
    x, inside = found["noise"]
    torch.manual_seed(0)
    baseline = T.RandomErasing(p=1.0, value="random")
    erased = torch.cat([baseline(torch.full((3, 32, 32), math.nan)) for _ in range(60)])
    theirs = erased[erased.isfinite()]
    assert min(len(x[inside]), len(theirs)) > 20_000
    assert stats.ks_2samp(x[inside], theirs).pvalue > 1e-4


def test_noise_is_independent_from_value_to_value_and_keyed_by_its_seed():
    seeds = draw_noise_seed(SAMPLES[:64], 0, 0)
    assert len(seeds.unique()) == 64
    values = noise(seeds, noise_quantiles())
    assert torch.equal(noise(seeds[5:6], noise_quantiles())[0], values[5])
    flat = values.reshape(64, -1).double()
    assert abs(flat.mean()) < 5 / math.sqrt(flat.numel())
    assert abs(flat.var() - 1) < 0.02
    for lag in range(1, 9):  # eight values share a block of Philox
        assert abs((flat[:, lag:] * flat[:, :-lag]).mean()) < 5 / math.sqrt(flat.numel())
    assert noise_quantiles().abs().max() < 4.5


def test_jitter_before_the_crop_leaves_the_padding_black(images):
    """As report D's transforms: ColorJitter of the whole image, then RandomCrop."""
    settings = Augmentation(contrast=1.0, brightness=0.5, hue=0.2, jitter_before_crop=True, flip="off")
    drawn = draw(settings, torch.arange(N), 0, 0)
    everyone = torch.arange(N)
    whole = Augmentation(crop_padding=0, contrast=1.0, brightness=0.5, hue=0.2, flip="off")
    mean, std = torch.zeros(3), torch.full((3,), 1 / 255)
    still = replace(drawn, down=torch.zeros_like(drawn.down), right=torch.zeros_like(drawn.right))
    jittered = shown(whole, images, everyone, still, mean, std).permute(0, 2, 3, 1).round().to(torch.uint8)
    cropped = shown(Augmentation(flip="off"), jittered, everyone, drawn, mean, std)
    assert torch.equal(shown(settings, images, everyone, drawn, mean, std), cropped)
    outside = shown(Augmentation(flip="off"), torch.ones_like(images), everyone, drawn, mean, std) == 0
    assert outside.any()
    assert not cropped[outside].any()


def test_rotation_cutout_and_grey_follow_their_fields():
    drawn = draw(Augmentation(rotation=15.0, cutout=16, grayscale=0.1), SAMPLES, 0, 0)
    assert drawn.degrees.abs().max() <= 15
    assert abs(drawn.degrees.var() - 15**2 / 3) < 2
    assert abs(drawn.grey.float().mean() - 0.1) < 0.01
    top, bottom, left, _ = drawn.cutout.unbind(1)
    assert torch.equal(bottom - top, torch.full_like(top, 16))
    assert (top.min(), top.max()) == (left.min(), left.max()) == (-8, 23)
    assert draw(Augmentation(), SAMPLES[:2], 0, 0).cutout is None


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crop_padding", -1), ("crop_padding", 256), ("crop_mode", "wrap"), ("flip", "up"), ("cutout", -1), ("cutout", 257),
        ("mixup_alpha", -0.1), ("mixup_alpha_end", 0.0), ("mixup_alpha_floor", -0.1), ("erasing_area_min", 0.0),
        ("erasing_area_max", 0.01), ("erasing_value", "grey"), ("mix_probability", 1.1), ("hue", 0.6), ("grayscale", 2),
        ("rotation", 181), ("policy", "best"), ("policy_operations", 0), ("policy_magnitude", 31), ("random_erasing", 1.5),
        ("brightness", -0.2),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"{field} must be .*got {value}"):
        Augmentation(**{field: value})


def test_mixup_is_switched_off_by_its_alpha_alone():
    """Though report D's recipe has a floor."""
    assert not replace(RECIPES["se_resnet18"].recipe.augmentation, mixup_alpha=0.0).mixes
    with pytest.raises(InputError, match=r"mixup_alpha_floor must be 0..mixup_alpha \(0\.4\), got 0\.5"):
        Augmentation(mixup_alpha=0.4, mixup_alpha_floor=0.5)


def test_recipes_augment_as_their_notebooks_do():
    """Fields that differ from crop 4 with black padding and flip."""
    mixed = {"mixup_alpha": 1.0, "cutmix_alpha": 1.0}
    jitter = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05, "jitter_before_crop": True}
    expected = {
        "dropout_resnet24": {},
        "resnet42": {"crop_mode": "reflect"},
        "light_resnet18": mixed | {"policy": "rand_augment"},
        "light_resnet18_v2_45": mixed
        | {"policy": "auto_augment", "random_erasing": 0.5, "erasing_area_max": 0.1, "erasing_value": "noise"},
        "robust_resnet64": mixed | {"policy": "rand_augment"},
        "se_resnet18": jitter | {"cutout": 16, "mixup_alpha": 0.4, "mixup_alpha_end": 0.0, "mixup_alpha_floor": 0.1},
        "mish_se_resnet18": {"policy": "auto_augment_imagenet", "random_erasing": 0.5, "erasing_value": "black"},
        "mish_se_resnet18_text": {},
    }
    for name, fields in expected.items():
        assert RECIPES[name].recipe.augmentation == Augmentation(**fields), name


def test_report_ds_alpha_falls_to_its_floor(monkeypatch):
    alphas = []
    monkeypatch.setattr(augmentation, "mix_plan", lambda alpha, *_, **__: alphas.append(alpha))
    settings = RECIPES["se_resnet18"].recipe.augmentation
    for epoch in range(250):
        settings.plan_mixing(seed=0, epoch=epoch, steps=1, progress=epoch / 250, device=torch.device("cpu"))
    assert alphas == pytest.approx([max(0.1, 0.4 * (1 - epoch / 250)) for epoch in range(250)])
