"""Subsets of the training data, wrong labels, seeds of their own, what is recorded of each image, and a run done again."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastcifar import margins, train
from fastcifar.beton import read_beton
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import load_data, parse_command
from fastcifar.dataset import load_resident
from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES
from fastcifar.models.resnet import PixelClassifier
from fastcifar.run_folder import RunFolder
from fastcifar.state import build_state, build_step
from fastcifar.subsets import listed, mislabelled

CPU = torch.device("cpu")
SHORT = "--arch narrow --recipe se_resnet18 --epochs 2 --batch-size 20 --limit-test 20 --plan default --no-plots"


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)


def command_of(betons, *options):
    return parse_command([*SHORT.split(), "--data", str(betons), *map(str, options)])


def run(betons, out, *options):
    return train.train(command_of(betons, "--out", out, *options), Console(quiet=True))


def weights(folder):
    return load_checkpoint(folder.last, CPU).model


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def numbers(tmp_path):
    """60 of the 200 images, not in order."""
    path = tmp_path / "chosen.npy"
    np.save(path, np.random.default_rng(0).permutation(200)[:60])
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_a_subset_is_the_images_of_those_numbers_with_their_own_randomness(betons, numbers, tmp_path, stream):
    text = tmp_path / "chosen.txt"
    text.write_text("\n".join(map(str, np.load(numbers))))
    whole = read_beton(betons / "train.beton")
    for path in (numbers, text):
        data = load_data(command_of(betons, "--train-indices", path, *(["--stream"] if stream else [])), CPU)
        index = data.train.index.numpy()
        assert sorted(index) == sorted(np.load(numbers))
        np.testing.assert_array_equal(data.train.fetch(torch.arange(60)).images, whole.images[np.isin(whole.index, index)])
        assert len(data.test) == 20


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("x.txt", b"1 2 x", "is no list of whole numbers"),
        ("x.txt", b"", "is no list of whole numbers"),
        ("x.txt", b"9" * 30, "is no list of whole numbers"),
        ("x.txt", b"3 200", "has number 200, the training images are 0..199"),
        ("x.txt", b"-1 3", "has number -1"),
        ("x.txt", b"5 3 5", "has number 5 2 times"),
        ("x.npy", b"1 2 3", "is no list of whole numbers"),
        ("x.npy", saved(np.arange(9))[:90], "is no list of whole numbers"),
        ("x.npy", saved(np.arange(4.0)), "is no list of whole numbers"),
        ("x.npy", saved(np.ones((2, 2), np.int64)), "is no list of whole numbers"),
        ("x.npy", saved(np.ones(200, bool)), "is no list of whole numbers"),
        ("x.npy", saved(np.array([2**63 + 5], np.uint64)), "has number 9223372036854775813"),
    ],
)
def test_wrong_lists_of_images_are_refused(tmp_path, name, content, fragment):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} {fragment}"):
        listed(torch.arange(200), path)
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        listed(torch.arange(200), path)


def test_a_list_and_a_limit_are_not_mixed(betons):
    with pytest.raises(InputError, match="limit_train must be 0 beside --train-indices"):
        command_of(betons, "--train-indices", "chosen.npy", "--limit-train", "10")


def test_label_noise_is_symmetric_keyed_and_of_its_share():
    labels, index = torch.arange(50_000) % 10, torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    wrong = mislabelled(labels, index, 0.2, 10, seed=3)
    changed = wrong != labels
    assert abs(float(changed.double().mean()) - 0.2) < 0.01  # five standard deviations
    shifts = torch.bincount((wrong - labels)[changed] % 10, minlength=10)[1:] / changed.sum()
    assert float((shifts - 1 / 9).abs().max()) < 0.02
    some = torch.arange(0, 50_000, 7)
    assert torch.equal(mislabelled(labels[some], index[some], 0.2, 10, seed=3), wrong[some])
    assert not torch.equal(mislabelled(labels, index, 0.2, 10, seed=4), wrong)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_label_noise_is_for_images_that_are_trained_on(betons, stream):
    clean, noisy = (
        load_data(command_of(betons, "--held-out", "0.3", "--label-noise", share, *stream), CPU) for share in (0, 0.5)
    )
    assert 30 < int((clean.train.labels != noisy.train.labels).sum()) < 110
    assert torch.equal(clean.select.labels, noisy.select.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert torch.equal(clean.train.fetch(torch.arange(9)).images, noisy.train.fetch(torch.arange(9)).images)
    with pytest.raises(InputError, match="label_noise must be 0 to below 1, got 1"):
        command_of(betons, "--label-noise", "1")


def randomness(betons, *options):
    """First weights, and the order, draws and mixing of an epoch."""
    command = command_of(betons, "--mixup-alpha", "1", *options)
    data = load_data(command, CPU)
    state = build_state(command.arch, command.settings, command.run, data, CPU)
    weights = {name: value.clone() for name, value in state.model.state_dict().items()}
    step = build_step(state, command.settings, command.run, data)
    step.begin(1, [0.1] * 10)
    plan = step.tables.plan
    return {
        "init": weights["classifier.weight"],
        "order": step.tables.order,
        "augmentation": torch.cat([plan.draws.down.double(), plan.mixing.lam.double()]),
    }


def test_each_seed_moves_its_own_part_and_by_default_all_have_the_seed(betons):
    usual, other = randomness(betons), randomness(betons, "--seed", 7)
    for part in usual:
        own = randomness(betons, f"--{part}-seed", 7)
        for name in usual:
            assert torch.equal(own[name], other[name] if name == part else usual[name]), (part, name)
            assert not torch.equal(usual[name], other[name])
    with pytest.raises(InputError, match=r"order_seed must be 0\.\.2\^63-1, got -1"):
        command_of(betons, "--order-seed", "-1")


def test_margins_are_of_the_images_as_they_are(betons):
    data, _ = load_resident(betons / "train.beton", CPU)
    command = command_of(betons)
    splits = load_data(command, CPU)
    model = PixelClassifier(
        build_state(command.arch, command.settings, command.run, splits, CPU).model, splits.mean, splits.std
    )
    rows = margins.measure(model, data, 64, None)
    with torch.inference_mode():
        logits = model.eval()(data.images).double()
    own = logits[torch.arange(200), data.labels]
    best = logits.topk(2).values
    expected = own - torch.where(logits.argmax(1) == data.labels, best[:, 1], best[:, 0])
    np.testing.assert_allclose(rows["margin"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows["loss"], torch.logsumexp(logits, 1) - own, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rows["sample"], data.index)


def test_a_resume_keeps_subset_noise_seeds_and_margins(betons, numbers, tmp_path):
    options = ("--train-indices", numbers, "--label-noise", "0.3", "--order-seed", "5", "--record-margins")
    whole = run(betons, tmp_path / "whole", *options)
    cut = run(betons, tmp_path / "cut", *options, "--stop-after", "1")
    again = numbers.with_name("moved.npy")
    again.write_bytes(numbers.read_bytes())
    resumed = train.train(parse_command(["--resume", str(cut.path), "--train-indices", str(again)]), Console(quiet=True))
    assert equal(weights(whole), weights(resumed))
    for epoch in (1, 2):
        rows = [np.load(folder.path / "margins" / f"epoch-{epoch:04d}.npy") for folder in (whole, resumed)]
        np.testing.assert_array_equal(*rows)
        assert sorted(rows[0]["sample"]) == sorted(np.load(numbers))
    np.save(again, np.arange(60))
    with pytest.raises(InputError, match="was trained on other files"):
        train.train(parse_command(["--resume", str(cut.path), "--train-indices", str(again)]), Console(quiet=True))


def test_a_config_does_a_run_again(betons, tmp_path):
    first = run(betons, tmp_path / "first", "--label-smoothing", "0.07", "--seed", "3", "--limit-train", "40")
    config = tmp_path / "shared.json"
    config.write_bytes((first.path / "config.json").read_bytes())
    command = parse_command(["--config", str(config), "--out", str(tmp_path / "second")])
    assert (command.settings.label_smoothing, command.run.seed) == (0.07, 3)
    assert equal(weights(train.train(command, Console(quiet=True))), weights(first))
    assert parse_command(["--config", str(config)]).run.out is None
    other = parse_command(["--config", str(config), "--seed", "4"])
    assert replace(other.run, seed=3) == replace(command.run, out=None)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert "config" not in written["run"]
    assert RunFolder(tmp_path / "second").read_config()[2] == command.settings


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--resume", "run"], "choose one of them"),
        (["--arch", "resnet42"], "is of arch narrow: leave --arch out"),
        (["--recipe", "resnet42"], "is of recipe se_resnet18: leave --recipe out"),
    ],
)
def test_a_config_is_not_mixed_with_another_run(betons, tmp_path, options, fragment):
    command = command_of(betons)
    RunFolder(tmp_path).write_config(command.arch, command.recipe_name, command.settings, command.run, {})
    with pytest.raises(InputError, match=fragment):
        parse_command(["--config", str(tmp_path / "config.json"), *options])
    with pytest.raises(InputError, match=r"gone\.json is missing"):
        parse_command(["--config", str(tmp_path / "gone.json")])
