"""The smaller parts: losses, optimizers, averages, recipes, held-out split, metrics, inference, checkpoints, progress."""

import io
import json
import math
import pickle
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.beton import Manifest
from fastcifar.checkpoint import Checkpoint, load, load_checkpoint, save_checkpoint, sealed, serialised
from fastcifar.dataset import CIFAR10_CLASSES, CIFAR10_MEAN, CIFAR10_STD, ResidentSet, hold_out, normalisation
from fastcifar.device import computes_bf16
from fastcifar.errors import InputError
from fastcifar.evaluate import EvaluationTally, Evaluator, class_probabilities, evaluating, mean_probabilities, views
from fastcifar.models import ARCHITECTURES, REVISED, build_model
from fastcifar.models.resnet import PixelClassifier
from fastcifar.muon import orthogonal
from fastcifar.optimization import (
    Factors,
    Schedule,
    build_optimizer,
    epoch_mean_weights,
    mixed_cross_entropy,
    momentum_factors,
    rescaled_moments,
    set_step,
)
from fastcifar.recipes import RECIPES, Recipe, RunOptions, recipe_from_dict, reported, run_options_from_dict, to_dict
from fastcifar.reporting import clock, epoch_line
from fastcifar.run_folder import METRIC_KEYS, RunFolder
from fastcifar.step import AveragedModel

CPU = torch.device("cpu")


def checkpoint_of(arch="se_resnet18", classes=10):
    model = build_model(arch, classes)
    names = [f"class {c}" for c in range(classes)]
    return Checkpoint(arch, True, names, [0.5] * 3, [0.2] * 3, "data", ["a", "b"], 1, model.state_dict(), None, {}, 0.5, 1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A small architecture for what does not depend on it."""
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow_test", row)


def test_mixed_loss_is_cross_entropy_against_the_mixed_smoothed_target():
    torch.manual_seed(0)
    logits, a, b = torch.randn(8, 10), torch.arange(8), torch.arange(8).roll(-1)
    share, smoothing = torch.tensor(0.3), 0.1
    target = 0.3 * F.one_hot(a, 10) + 0.7 * F.one_hot(b, 10)
    target = target * (1 - smoothing) + smoothing / 10
    torch.testing.assert_close(target.sum(1), torch.ones(8))
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixed_cross_entropy(logits, a, b, share, smoothing), expected)


def test_optimizers_are_what_they_say():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    sgd = build_optimizer(model, "sgd", momentum=0.9, weight_decay=0.1, decay_norm_and_bias=True)
    assert len(sgd.param_groups) == 1
    assert not sgd.param_groups[0]["nesterov"]
    nesterov = build_optimizer(model, "nesterov", momentum=0.9, weight_decay=0.1, decay_norm_and_bias=False)
    assert nesterov.param_groups[0]["nesterov"]
    assert [p.ndim for p in nesterov.param_groups[0]["params"]] == [2]
    assert [p.ndim for p in nesterov.param_groups[1]["params"]] == [1, 1, 1]
    assert [g["weight_decay"] for g in nesterov.param_groups] == [0.1, 0.0]
    for kind, baseline in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        built = build_optimizer(model, kind, momentum=0.8, weight_decay=0.1, decay_norm_and_bias=True)
        assert isinstance(built, baseline)
        assert built.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
def test_optimizers_take_pytorchs_steps_with_moving_rate_and_momentum(kind):
    """Coupled decay for Adam, a first beta that changes from step to step: PyTorch's unfused optimizers as baselines."""
    torch.manual_seed(0)
    start = torch.randn(20)
    theirs = start.clone().requires_grad_()
    model = nn.Module()
    model.weight = nn.Parameter(start)
    built = build_optimizer(model, kind, momentum=0.95, weight_decay=0.1, decay_norm_and_bias=True)
    baselines = {
        "sgd": lambda: torch.optim.SGD([theirs], momentum=0.95, weight_decay=0.1, foreach=False),
        "nesterov": lambda: torch.optim.SGD([theirs], momentum=0.95, weight_decay=0.1, nesterov=True, foreach=False),
        "adam": lambda: torch.optim.Adam([theirs], betas=(0.95, 0.999), weight_decay=0.1, foreach=False),
        "adamw": lambda: torch.optim.AdamW([theirs], betas=(0.95, 0.999), weight_decay=0.1, foreach=False),
    }
    baseline = baselines[kind]()
    for step in range(6):
        rate, momentum = 0.1 / (step + 1), 0.95 - 0.02 * step
        model.weight.grad = torch.sin(model.weight.detach() * 3)
        theirs.grad = torch.sin(theirs.detach() * 3)
        set_step(built, rate, momentum)
        built.step()
        for group in baseline.param_groups:
            group["lr"] = rate
            group |= {"momentum": momentum} if "momentum" in group else {"betas": (momentum, 0.999)}
        baseline.step()
    torch.testing.assert_close(model.weight.detach(), theirs.detach())


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_a_momentum_from_a_table_is_the_momentum_that_is_set(kind):
    """In float64, where the factors' rounding does not show; from step 3 on too, as after a resume."""
    torch.manual_seed(0)
    start = torch.randn(20, dtype=torch.float64)
    models = []
    for _ in range(2):
        models.append(nn.Module())
        models[-1].weight = nn.Parameter(start.clone())
    moved, fixed = (build_optimizer(m, kind, momentum=0.95, weight_decay=0.1, decay_norm_and_bias=True) for m in models)
    rates, momenta = [0.1 / (step + 1) for step in range(6)], [0.95 - 0.1 * step for step in range(6)]
    factors = [*momentum_factors(fixed, momenta[:3], 0), *momentum_factors(fixed, momenta[3:], 3)]
    for rate, momentum, (of_rate, before, after) in zip(rates, momenta, factors, strict=True):
        for model in models:
            model.weight.grad = torch.sin(model.weight.detach() * 3)
        set_step(moved, rate, momentum)
        moved.step()
        set_step(fixed, torch.tensor(rate * of_rate, dtype=torch.float64), None)
        with rescaled_moments(fixed, torch.tensor(before), torch.tensor(after)):
            fixed.step()
        torch.testing.assert_close(*(model.weight.detach() for model in models))
    for one, other in zip(moved.state.values(), fixed.state.values(), strict=True):
        torch.testing.assert_close(dict(one), dict(other))


def test_muons_directions_are_orthogonal_and_those_of_the_singular_vectors():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 8, 8)):
        matrices = torch.randn(shape, dtype=torch.float64)
        made = orthogonal(matrices, steps=10)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.6
        assert values.max() < 1.3
        aligned = (u.mT @ made @ v.mT).abs()  # diagonal: the singular vectors stay
        assert (aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))).max() < 1e-9


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_of_newton_and_schulz_is_a_quintic_of_each_singular_value(steps):
    torch.manual_seed(0)
    matrices = torch.randn(2, 16, 40, dtype=torch.float64)
    u, values, v = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.square().sum(1, keepdim=True).sqrt()
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonal(matrices, steps), u @ torch.diag_embed(values) @ v, atol=1e-6, rtol=0)


def test_muon_is_its_formula_step_by_step():
    """Against one written out a filter bank at a time in float64; what is not four-dimensional moves by SGD, with decay."""
    torch.manual_seed(0)
    model = nn.Module()
    model.conv, model.twin, model.wide = nn.Conv2d(3, 8, 3, bias=True), nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1)
    model.gate, model.classifier = nn.Linear(4, 3), nn.Linear(8, 2)
    model.double()
    factors = Factors(head_lr_factor=3.0, vector_lr_factor=0.5, vector_momentum=0.85, muon_steps=3)
    built = build_optimizer(model, "muon", momentum=0.6, weight_decay=0.3, decay_norm_and_bias=True, factors=factors)
    named = dict(model.named_parameters())
    theirs = {name: parameter.detach().clone() for name, parameter in named.items()}
    buffers = {name: torch.zeros_like(x) for name, x in theirs.items()}
    rates = {name: (3.0 if name.startswith("classifier") else 1.0) * (0.5 if x.ndim < 2 else 1.0) for name, x in theirs.items()}
    dtype = torch.bfloat16 if computes_bf16(torch.device("cpu")) else torch.float32
    for step in range(4):
        rate = 0.2 / (step + 1)
        for parameter in named.values():
            parameter.grad = torch.cos(3 * parameter.detach())
        set_step(built, torch.tensor(rate, dtype=torch.float64), None)
        built.step()
        for name, x in theirs.items():
            m = 0.6 if x.ndim == 4 else 0.85
            gradient = torch.cos(3 * x) + (0 if x.ndim == 4 else 0.3 * x)
            buffers[name] = m * buffers[name] + gradient
            direction = gradient + m * buffers[name]
            if x.ndim == 4:
                direction = orthogonal(direction.flatten(1)[None].to(dtype), 3)[0].double().view_as(x)
                theirs[name] = x * len(x) ** 0.5 / x.norm() - rate * direction
            else:
                theirs[name] = x - rate * rates[name] * direction
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.detach(), theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_factors_change_the_rates_of_their_parameters_alone():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.classifier = nn.Linear(2, 2)
    factors = Factors(head_lr_factor=2.0, vector_lr_factor=3.0)
    sgd = build_optimizer(model, "sgd", momentum=0.9, weight_decay=0.0, decay_norm_and_bias=True, factors=factors)
    set_step(sgd, 0.1, None)
    rates = {id(parameter): group["lr"] for group in sgd.param_groups for parameter in group["params"]}
    found = [rates[id(parameter)] for parameter in model.parameters()]
    assert found == pytest.approx([0.1, 0.3, 0.3, 0.3, 0.2, 0.6])
    for kind in ("muon", "sgd"):
        scaled = replace(factors, scale_decay=True)
        built = build_optimizer(model, kind, momentum=0.9, weight_decay=0.3, decay_norm_and_bias=True, factors=scaled)
        set_step(built, 0.1, None)
        assert [group["lr"] * group["weight_decay"] for group in built.param_groups] == pytest.approx([0.1 * 0.3] * 4)
    with pytest.raises(InputError, match="head_lr_factor"):
        Factors(head_lr_factor=0.0)


def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = AveragedModel(model, 0.9)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
        model[1].running_mean.fill_(2.0)
        model[1].num_batches_tracked.fill_(7)
    average.update(model, torch.tensor(0.5))
    torch.testing.assert_close(average.model[0].weight, start + 0.1)
    torch.testing.assert_close(average.model[1].running_mean, torch.full((2,), 0.2))
    assert average.model[1].num_batches_tracked == 7


def test_the_mean_of_the_weights_is_the_mean():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average, seen = AveragedModel(model, 0.0), []
    schedule = Schedule(schedule_epochs=10)
    weights = [weight for epoch in range(2) for weight in epoch_mean_weights(schedule, 4, epoch, 5, 2)]  # from step 4 of 10 on
    assert epoch_mean_weights(schedule, 9.99, 1, 5, 2) == [1.0] * 5  # the last step at least
    for step, weight in enumerate(weights):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_var.uniform_()
        seen.append((model[0].weight.clone(), model[1].running_var.clone()))
        average.update(model, torch.tensor(weight, dtype=torch.float64))
        means = [torch.stack(values).mean(0) for values in zip(*seen[min(step, 4) :], strict=True)]
        torch.testing.assert_close([average.model[0].weight, average.model[1].running_var], means)
        assert step > 4 or torch.equal(average.model[0].weight, model[0].weight)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_and_options_survive_json(name):
    recipe = RECIPES[name].recipe
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    options = RunOptions(seed=3)
    assert run_options_from_dict(json.loads(json.dumps(to_dict(options)))) == options


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 1), ("label_smoothing", 1.0), ("head_dropout", -0.1), ("epochs", 0), ("loss_reduction", "max"),
        ("eval_tta", "twice"), ("centre_weight", 1.5), ("centre_weight", 0.5), ("average_from", 200),
    ],
)  # fmt: skip
def test_bad_recipe_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=rf"{field} must be .*got {value}"):
        Recipe(**{field: value})


def test_one_average_at_a_time():
    with pytest.raises(InputError, match="average_from must be 0 beside an ema_decay"):
        Recipe(average_from=10, ema_decay=0.9)


def test_a_recipe_of_another_version_is_refused():
    values = to_dict(RECIPES["se_resnet18"].recipe)
    with pytest.raises(InputError, match="not a recipe"):
        recipe_from_dict({**values, "warp": 9})
    with pytest.raises(InputError, match="did you mean resnet42"):
        reported("resnet_42")


def test_held_out_images_are_no_longer_trained_on_and_the_same_every_time():
    full = ResidentSet(torch.zeros(100, 32, 32, 3, dtype=torch.uint8), torch.arange(100) % 10, torch.arange(100))
    train, held = hold_out(full, 0.2, seed=1)
    assert sorted(train.index.tolist() + held.index.tolist()) == list(range(100))
    assert len(held) == 20
    assert torch.equal(hold_out(full, 0.2, seed=1)[1].index, held.index)
    assert not torch.equal(hold_out(full, 0.2, seed=2)[1].index, held.index)
    assert torch.equal(held.labels, held.index % 10)


@pytest.mark.parametrize("most", [3, 2])
def test_evaluation_counts_by_hand(monkeypatch, most):
    """A confusion matrix where there is room for one; the rest is the same without."""
    monkeypatch.setattr("fastcifar.evaluate.MOST_CONFUSED", most)
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    tally = EvaluationTally(3, CPU)
    tally.add(probabilities[:3], torch.tensor([0, 1, 1]))
    tally.add(probabilities[3:], torch.tensor([0]))
    result = tally.read()
    assert result.confusion == ([[1, 0, 1], [1, 1, 0], [0, 0, 0]] if most == 3 else None)
    assert result.images == 4
    assert result.top1 == 0.5
    assert result.top5 == 1.0  # three classes: the top five are all of them
    assert result.loss == pytest.approx(-torch.tensor([0.7, 0.8, 0.3, 0.2]).log().mean().item())
    assert result.per_class == [0.5, 0.5, None]


def test_views_of_test_time_augmentation():
    x = torch.arange(1024).reshape(1, 32, 32, 1)
    assert len(views(x, "none")) == 1
    assert torch.equal(views(x, "flip")[1], x.flip(2))
    six = views(x, "flip_translate")
    assert len(six) == 6
    assert torch.equal(six[1][:, 1:, 1:], x[:, :-1, :-1])  # looks up-left: content moves down-right
    assert torch.equal(six[2][:, :-1, :-1], x[:, 1:, 1:])
    padded = F.pad(x.permute(0, 3, 1, 2).float(), (1,) * 4, "reflect").permute(0, 2, 3, 1)
    assert torch.equal(six[1].float(), padded[:, :32, :32])
    assert torch.equal(six[2].float(), padded[:, 2:, 2:])
    for view, flipped in zip(six[:3], six[3:], strict=True):
        assert torch.equal(flipped, view.flip(2))


def test_probabilities_are_the_mean_of_the_views_whatever_the_batch_size():
    torch.manual_seed(0)
    network = build_model("se_resnet18").train()
    images = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    model = PixelClassifier(network, torch.tensor([0.5] * 3), torch.tensor([0.25] * 3))

    def probabilities(batch_size, tta):
        return torch.cat(list(class_probabilities(model, images, batch_size=batch_size, tta=tta, autocast_dtype=None)))

    whole = probabilities(10, "flip")
    assert network.training  # left as it was found
    torch.testing.assert_close(whole, probabilities(3, "flip"))
    torch.testing.assert_close(whole.sum(1), torch.ones(10))
    x = ((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = (network.eval()(x).softmax(1) + network(x.flip(3)).softmax(1)) / 2
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-4)
    data = ResidentSet(images, whole.argmax(1), torch.arange(10))
    assert Evaluator(model, data, batch_size=4, tta="flip")().top1 == 1.0
    with evaluating(network):
        each = torch.stack([model(view).softmax(1) for view in views(images, "flip_translate")])
        for centre, moved in ((1 / 3, 1 / 6), (0.5, 1 / 8), (1.0, 0.0)):
            expected = (each * torch.tensor([centre / 2, moved, moved] * 2)[:, None, None]).sum(0)
            torch.testing.assert_close(mean_probabilities(model, images, "flip_translate", None, centre), expected)
    assert {name.removeprefix("network.") for name in model.state_dict()} == set(network.state_dict())


def test_checkpoints_come_back_and_damaged_ones_do_not(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of())
    loaded = load_checkpoint(path, CPU, arch="se_resnet18")
    assert loaded.class_names[3] == "class 3"
    assert not load(path).training
    with pytest.raises(InputError, match=r"last\.pt is of arch se_resnet18, not resnet42"):
        load_checkpoint(path, CPU, arch="resnet42")
    content = path.read_bytes()
    for kept in (0, 10, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match=r"last\.pt is damaged"):
            load_checkpoint(path, CPU)
    with pytest.raises(InputError, match="is missing"):
        load_checkpoint(tmp_path / "none.pt", CPU)
    torch.save({"format": 0}, path)
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        load_checkpoint(path, CPU)


def test_any_flipped_byte_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint_of("narrow_test"))
    assert torch.load(path, weights_only=True)["epoch"] == 1  # the hash does not disturb other readers of the archive
    content = path.read_bytes()
    size = len(content)
    rng = np.random.default_rng(0)
    for position in (0, size - 1, size - 64, size - 65, size - 66, size - 86, size - 87, *rng.integers(0, size, 40).tolist()):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"last\.pt (is damaged|is not a checkpoint of this version)"):
            load_checkpoint(path, CPU)


WRONG_FIELDS = {
    "arch": [3, None, ["se_resnet18"]],
    "squeeze_excitation": [1, "yes"],
    "class_names": [[], "abc", [1, 2]],
    "mean": [[0.5], [0.5, 0.5, math.nan], "abc"],
    "std": [[0.2, 0.2, 0.0], None],
    "data_name": [7],
    "data_sha256": ["abc", [1]],
    "epoch": [-1, 1.0, True, "1"],
    "model": [None, [], {"weight": 1}, {1: torch.zeros(1)}],
    "average": [3, {"weight": "x"}],
    "optimizer": [None, []],
    "best_accuracy": [math.nan, 2.0, "best"],
    "best_epoch": [-1, None],
    "within": [3, "step"],
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_checkpoints_fields_have_their_types(tmp_path, name):
    for value in WRONG_FIELDS[name]:
        save_checkpoint(tmp_path / "x.pt", Checkpoint(**{**vars(checkpoint_of("narrow_test")), name: value}))
        with pytest.raises(InputError, match=rf"x\.pt has fields that are not valid \({name}\)"):
            load_checkpoint(tmp_path / "x.pt", CPU)


def test_weights_that_are_not_finite_and_archives_that_unpack_to_more_are_refused(tmp_path):
    checkpoint = checkpoint_of("narrow_test")
    checkpoint.model["classifier.weight"][0, 0] = math.nan
    save_checkpoint(tmp_path / "x.pt", checkpoint)
    with pytest.raises(InputError, match=r"x\.pt holds weights that are not finite"):
        load_checkpoint(tmp_path / "x.pt", CPU)
    huge = {**vars(checkpoint_of("narrow_test")), "model": {"weight": torch.zeros(1).expand(1 << 40)}}
    save_checkpoint(tmp_path / "x.pt", Checkpoint(**huge))
    with pytest.raises(InputError, match="larger than the file"):
        load_checkpoint(tmp_path / "x.pt", CPU)
    buffer = io.BytesIO()
    stored = serialised({"format": 2, **vars(checkpoint_of("narrow_test"))})
    with zipfile.ZipFile(io.BytesIO(stored)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)["epoch"] == 1  # nothing else is wrong with it
    (tmp_path / "x.pt").write_bytes(sealed(buffer.getvalue()))
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "x.pt", CPU)


@pytest.mark.parametrize("tensor", [torch.empty(3, device="meta"), torch.zeros(2, 2).to_sparse(), torch.ones(2) * 1j])
def test_tensors_that_no_network_of_ours_has_are_refused(tmp_path, tensor):
    checkpoint = checkpoint_of("narrow_test")
    save_checkpoint(tmp_path / "x.pt", Checkpoint(**{**vars(checkpoint), "model": {**checkpoint.model, "extra": tensor}}))
    with pytest.raises(InputError, match=r"fields that are not valid \(model\)"):
        load_checkpoint(tmp_path / "x.pt", CPU)


def test_a_checkpoint_of_version_0_1_still_reads(tmp_path):
    values = {name: value for name, value in vars(checkpoint_of("narrow_test")).items() if name != "within"}
    torch.save({"format": 1, **values}, tmp_path / "old.pt")
    assert load_checkpoint(tmp_path / "old.pt", CPU).within is None


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for name, save in (("zip.pt", torch.save), ("plain.pt", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path = tmp_path / name
        save({"format": 1, "model": Payload()}, path)
        marker.unlink(missing_ok=True)
        with pytest.raises(InputError, match=name):
            load_checkpoint(path, CPU)
        assert not marker.exists()


def test_a_checkpoint_whose_weights_do_not_fit_is_refused(tmp_path):
    checkpoint = checkpoint_of("resnet42")
    save_checkpoint(tmp_path / "x.pt", Checkpoint(**{**vars(checkpoint), "arch": "se_resnet18"}))
    with pytest.raises(InputError, match="does not fit arch se_resnet18"):
        load(tmp_path / "x.pt", CPU)


@pytest.mark.parametrize("arch", REVISED)
def test_a_checkpoint_of_version_0_1_of_a_revised_row_is_refused_with_the_reason(tmp_path, arch):
    checkpoint = checkpoint_of(arch)
    missing = ARCHITECTURES[arch].parameters - REVISED[arch]
    state = dict(checkpoint.model) | ({} if missing > 0 else {"stages.0.0.se.extra": torch.zeros(-missing)})
    while missing > 0:  # take weights away until the old count is left
        name = next(n for n in state if n.endswith((".bias", "weight")) and state[n].numel() > 0)
        taken = min(missing, state[name].numel())
        state[name], missing = state[name].flatten()[taken:], missing - taken
    save_checkpoint(tmp_path / "old.pt", Checkpoint(**{**vars(checkpoint), "model": state}))
    with pytest.raises(InputError, match=rf"old\.pt holds {arch} as version 0\.1 had it \({REVISED[arch]:,} parameters\)"):
        load(tmp_path / "old.pt", CPU)


def test_a_run_folder_of_version_0_1_of_a_revised_row_is_refused_with_the_reason(tmp_path):
    folder = RunFolder(tmp_path)
    recipe, run = to_dict(RECIPES["se_resnet18"].recipe), to_dict(RunOptions())
    for arch, fits in (("se_resnet18", False), ("resnet42", True)):
        values = {"arch": arch, "recipe_name": arch, "recipe": recipe, "run": run}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if fits:
            assert folder.read_config()[0] == arch
        else:
            with pytest.raises(InputError, match=r"run of version 0\.1, whose se_resnet18 was not the report's network"):
                folder.read_config()


def test_cifar10_is_normalised_as_the_recipe_says_and_other_data_by_its_own_statistics(betons):
    ours = Manifest.load(betons / "train.beton")
    named = {**vars(ours), "class_names": list(CIFAR10_CLASSES)}
    assert normalisation(Manifest(**named)) == (CIFAR10_MEAN, CIFAR10_STD)
    assert normalisation(Manifest(**named), (0.35,) * 3) == (CIFAR10_MEAN, (0.35,) * 3)
    other = {**named, "class_names": [f"mine {c}" for c in range(10)]}
    assert normalisation(Manifest(**other), (0.35,) * 3) == (tuple(ours.mean), tuple(ours.std))
    assert normalisation(Manifest(**other), (0.35,) * 3, everywhere=True) == (tuple(ours.mean), (0.35,) * 3)
    with pytest.raises(InputError, match="cannot be normalised"):
        normalisation(Manifest(**{**other, "std": [0.2, 0.0, 0.2]}))


WRONG_CONFIGS = {
    "epochs": ("recipe", "epochs", "3"), "bool": ("run", "plots", "yes"), "infinite": ("recipe", "weight_decay", math.inf),
    "path": ("run", "data", 3), "literal": ("run", "device", "gpu"), "endless": ("run", "limit_train", 1 << 70),
    "std": ("recipe", "std", [0.2, 0.2]), "unknown": ("run", "bogus", 1), "nested": ("recipe", "schedule", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_of_wrong_types_is_named(tmp_path, case):
    part, name, value = WRONG_CONFIGS[case]
    values = {"format": 2, "arch": "resnet42", "recipe_name": "resnet42"}
    values |= {"recipe": to_dict(RECIPES["resnet42"].recipe), "run": to_dict(RunOptions())}
    (tmp_path / "config.json").write_text(json.dumps(values))
    RunFolder(tmp_path).read_config()
    values[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.json is not a run's config"):
        RunFolder(tmp_path).read_config()


def test_a_damaged_run_folder_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    row = dict.fromkeys(METRIC_KEYS, 0.5) | {"epoch": 1, "learning_rates": [0.1]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert folder.read_metrics() == [row]
    for wrong in ({"train_loss": 10**400}, {"learning_rates": []}, {"eval_loss": "0.5"}, {"epoch": 2}, {"eval_loss": math.nan}):
        (tmp_path / "metrics.jsonl").write_text(json.dumps(row | wrong) + "\n")
        with pytest.raises(InputError, match="line 1 is not an epoch's metrics"):
            folder.read_metrics()
    for content, problem in ((b"\xff\xfe", "is not text"), (b'{"epoch": "abc"}\n', "line 1"), (b'{"epoch": 1}\n', "line 1")):
        (tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=problem):
            folder.read_metrics()
    recipe = to_dict(RECIPES["resnet42"].recipe)
    for run, wrong in (([], recipe), ({}, {**recipe, "epochs": 3.5}), ({}, {**recipe, "schedule": []})):
        (tmp_path / "config.json").write_text(
            json.dumps({"arch": "resnet42", "recipe_name": "resnet42", "recipe": wrong, "run": run})
        )
        with pytest.raises(InputError):
            folder.read_config()


def test_lines_and_clocks_people_read():
    record = {
        "epoch": 3, "train_loss": 1.5, "train_accuracy": 0.5, "eval_accuracy": 0.6, "eval_loss": 1.2, "eval_split": "test",
        "best_accuracy": 0.6, "images_per_second": 1234.0,
    }  # fmt: skip
    assert epoch_line(record, 200, 3725) == (
        "epoch   3/200 | train loss 1.500 acc 50.00% | test loss 1.200 acc 60.00% best 60.00% | 1,234 img/s | left 1:02:05"
    )
    assert "test" not in epoch_line({**record, "eval_accuracy": None}, 200, 0)
    assert clock(59.6) == "1:00"
