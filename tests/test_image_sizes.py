"""Images of other sizes than CIFAR's: every backend shows the same pixels, networks take them, betons hold them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from small_betons import manifest_of
from test_kernel_augment import MEAN, STD

from data_prep import beton_writer
from fastcifar import evaluate, train
from fastcifar.augmentation import Augmentation, augment, draw
from fastcifar.augmentation.geometry import affine
from fastcifar.augmentation.mixing import mix, mix_plan
from fastcifar.augmentation.policies import USUAL, magnitude_table, move_matrices
from fastcifar.beton import Manifest, channel_statistics, read_beton
from fastcifar.checkpoint import load, save_checkpoint
from fastcifar.dataset import ResidentSet, count_shared, load_resident, load_streamed
from fastcifar.errors import InputError
from fastcifar.models import build_model, require_size, suited_stride
from fastcifar.phases import Phases
from fastcifar.run_folder import RunFolder
from kernels.augment.operations import NUMBER
from kernels.augment.reference import augment_numpy

CPU = torch.device("cpu")
SIZES = [(28, 28), (64, 96), (9, 8), (15, 33)]
CROPS = Augmentation(crop_padding=7, crop_mode="reflect", flip="alternating", cutout=8)
EVERYTHING = Augmentation(
    crop_padding=7, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.3, policy="auto_augment", rotation=20,
    random_erasing=0.8, erasing_value="noise", cutout=5,
)  # fmt: skip


def random_set(size, count=12):
    images = np.random.default_rng(1).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return ResidentSet(torch.from_numpy(images), torch.arange(count) % 3, torch.arange(count) * 5)


def shown(settings, data, backend):
    positions = torch.arange(len(data)).flip(0)
    return augment(settings, data, positions, draw(settings, data.index, 3, 1, data.size), MEAN, STD, backend=backend)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["torch", "triton", pytest.param("numba", marks=pytest.mark.slow)])  # which compiles
def test_crops_are_numpys(size, backend):
    data = random_set(size, count=3)
    expected, _ = augment_numpy(
        data.images.numpy(), data.labels.numpy(), data.index.numpy(), np.arange(3)[::-1], 1, 3, padding=7, reflect=True,
        flip="alternating", cutout=8, mean=MEAN.numpy(), std=STD.numpy(),
    )  # fmt: skip
    assert torch.equal(shown(CROPS, data, backend), torch.from_numpy(expected))


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SIZES, (256, 256)])
@pytest.mark.parametrize("policy", ["rand_augment", "auto_augment", "trivial_augment"])
def test_numba_shows_pytorchs_pixels(size, policy):
    data = random_set(size)
    settings = replace(EVERYTHING, policy=policy)
    assert torch.equal(shown(settings, data, "numba"), shown(settings, data, "torch"))


@pytest.mark.parametrize("size", [(28, 28), (64, 96)])
def test_moves_are_torchvisions(size):
    x = random_set(size, count=1).images.permute(0, 3, 1, 2)
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], "center": [0, 0]}
    for name, magnitude, theirs in (
        ("ShearX", 0.3, {"shear": [float(np.rad2deg(np.arctan(0.3))), 0.0]}),
        ("ShearY", -0.3, {"shear": [0.0, float(np.rad2deg(np.arctan(-0.3)))]}),
        ("TranslateX", 5.0, {"translate": [5, 0]}),
        ("TranslateY", -6.0, {"translate": [0, -6]}),
    ):
        matrix = move_matrices(torch.tensor([NUMBER[name]]), torch.tensor([magnitude]), size)
        expected = F.affine(x, **{**options, **theirs}, interpolation=F.InterpolationMode.NEAREST)
        assert torch.equal(affine(x.float(), matrix, "nearest"), expected.float()), name
    matrix = move_matrices(torch.tensor([NUMBER["Rotate"]]), torch.tensor([17.0]), size)
    assert torch.equal(affine(x.float(), matrix, "nearest"), F.rotate(x, 17.0).float())
    table = magnitude_table(USUAL, 31, size)
    strongest = [round(table[NUMBER[name], -1].item() * 331 / 150) for name in ("TranslateY", "TranslateX")]
    assert strongest == list(size)


def test_cutmix_cuts_boxes_of_the_images_shape():
    size, steps = (64, 96), 4000
    plan = mix_plan(0.0, 1.0, 1.0, seed=0, epoch=0, steps=steps, device=CPU, size=size)
    top, bottom, left, right = plan.box.T
    assert bottom.max() == 64
    assert right.max() == 96
    torch.testing.assert_close(plan.lam, 1 - (bottom - top) * (right - left) / (64 * 96))
    whole = (top > 0) & (bottom < 64) & (left > 0) & (right < 96) & (bottom - top > 20)
    ratio = ((right - left) / (bottom - top))[whole]
    assert abs(ratio.mean() - 1.5) < 0.02
    x = torch.arange(2.0)[:, None, None, None].expand(2, 3, *size).contiguous(memory_format=torch.channels_last)
    mixed = mix(x, plan.blend[0], plan.box[0], size)
    assert torch.isclose(1 - mixed[0].mean(), plan.lam[0])


@pytest.mark.parametrize("arch", ["dropout_resnet24", "resnet42", "light_resnet18", "speed94_half"])  # all stems and blocks
@pytest.mark.parametrize("size", [(16, 16), (64, 96), (128, 130)])
def test_every_network_takes_every_size(arch, size):
    stride = suited_stride(size)
    require_size(arch, size, stride)
    model = build_model(arch, num_classes=7, stem_stride=stride, kernels="torch").eval()
    first = []
    model.stages[0].register_forward_pre_hook(lambda _, inputs: first.append(inputs[0].shape[2]))
    with torch.inference_mode():
        assert model(torch.zeros(0, 3, *size)).shape == (0, 7)
    assert first[0] in (size[0] // stride, size[0] // stride - 1)  # a whitening stem has no padding
    assert model.state_dict().keys() == build_model(arch, num_classes=7).state_dict().keys()


def test_images_that_would_vanish_are_refused():
    require_size("se_resnet18", (8, 8), 1)
    for arch, size, stride in (("speed94", (15, 40), 1), ("speed94", (64, 63), 4), ("se_resnet18", (15, 15), 2)):
        with pytest.raises(
            InputError, match=rf"{arch} needs images of at least \d+ pixels.*{size[1]}x{size[0]}.*--stem-stride"
        ):
            require_size(arch, size, stride)


@pytest.mark.slow
def test_too_many_classes_for_a_confusion_matrix_have_their_accuracies(betons, tmp_path, call, monkeypatch):
    monkeypatch.setattr("fastcifar.evaluate.MOST_CONFUSED", 9)
    options = "--epochs 1 --batch-size 20 --limit-train 20 --plan default --log --arch speed94_half"
    call(train.main, "--data", betons, "--out", tmp_path / "run", *options.split())
    final = RunFolder(tmp_path / "run").read_summary()["final"]
    assert final["confusion"] is None
    assert len(final["per_class"]) == 10
    assert (tmp_path / "run" / "loss.png").exists()
    assert not (tmp_path / "run" / "confusion_matrix.png").exists()
    printed = call(evaluate.main, "--checkpoint", tmp_path / "run" / "best.pt", "--data", betons)
    assert all(f"\n{name} " in printed for name in final["per_class"])


def test_lengths_in_pixels_must_fit_the_images():
    Augmentation(crop_padding=27, cutout=28).require_fits((28, 28))
    with pytest.raises(InputError, match=r"crop_padding must be 0\.\.27 pixels for images of 28, got 28"):
        Augmentation(crop_padding=28).require_fits((28, 40))
    with pytest.raises(InputError, match=r"cutout must be 0\.\.40 pixels for images of 40, got 41"):
        Augmentation(cutout=41).require_fits((28, 40))


def test_phases_shrink_other_images_by_the_same_share():
    phases = Phases(sizes=(24, 32), size_epochs=(4,))
    assert [phases.at(epoch, 1).of((64, 96)) for epoch in (0, 4)] == [(48, 72), (64, 96)]
    assert phases.smallest((28, 28)) == (21, 21)
    assert Phases().smallest((15, 33)) == (15, 33)


def write(folder, size, count=11, split="train", seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    beton_writer.write(folder / f"{split}.beton", images, np.arange(count) % 3, lambda written: None)
    content = (folder / f"{split}.beton").read_bytes()
    mean, std = channel_statistics([images])
    values = {**vars(manifest_of(bytes(10**6))), "count": count, "class_names": list("abc"), "mean": mean, "std": std}
    values |= {"dataset": "own", "height": size[0], "width": size[1], "split": split}
    Manifest(**values | {"sha256": hashlib.sha256(content).hexdigest()}).save(folder / f"{split}.beton")
    return images


@pytest.mark.parametrize("size", SIZES)
def test_a_beton_of_any_size_is_read_and_streamed(tmp_path, size):
    images = write(tmp_path, size)
    assert np.array_equal(read_beton(tmp_path / "train.beton").images, images)
    resident, manifest = load_resident(tmp_path / "train.beton", CPU)
    streamed, _ = load_streamed(tmp_path / "train.beton", CPU)
    assert resident.size == streamed.size == manifest.size == size
    assert torch.equal(streamed.fetch(torch.tensor([7, 2])).images, resident.images[[7, 2]])
    assert count_shared(resident.subset(torch.arange(4)), resident) == count_shared(streamed, resident) - 7 == 4


def test_a_manifest_of_another_size_is_refused(tmp_path):
    write(tmp_path, (28, 30))
    path = tmp_path / "train.beton"
    replace(Manifest.load(path), height=30, width=28).save(path)
    with pytest.raises(InputError, match=r"holds images of 30x28 pixels, its manifest says 28x30"):
        read_beton(path)


def test_a_checkpoint_knows_its_images_size(tmp_path):
    from test_parts import checkpoint_of

    model = build_model("se_resnet18", stem_stride=4)
    checkpoint = replace(checkpoint_of("se_resnet18"), model=model.state_dict(), size=[128, 160], stem_stride=4)
    save_checkpoint(tmp_path / "x.pt", checkpoint)
    loaded = load(tmp_path / "x.pt")
    assert (loaded.preprocessing.size, loaded.network.stem_stride, len(loaded.network.stem)) == ((128, 160), 4, 4)
