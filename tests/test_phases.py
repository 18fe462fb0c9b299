"""Phases of a training: which epoch belongs to which, the resizing, and that captured and resumed runs give the same bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.augmentation.mixing import mix
from fastcifar.augmentation.resize import resize, resize_weights
from fastcifar.errors import InputError
from fastcifar.optimization import Schedule
from fastcifar.phases import PLAIN, Phase, Phases, freezable
from fastcifar.recipes import Recipe, recipe_from_dict, to_dict

CPU = torch.device("cpu")


def images(dtype, count=5, size=(32, 32)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, *size, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("size", "whole"), [*(((side, side), (32, 32)) for side in (16, 20, 24, 31, 48)), ((48, 72), (64, 96))]
)
def test_resizing_is_pytorchs_antialiased(size, whole):
    def theirs(x):
        return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)

    x = images(torch.float32, size=whole)
    ours = resize(x, *resize_weights(size, torch.float32, CPU, whole))
    torch.testing.assert_close(ours, theirs(x.double()).float())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    x = images(torch.bfloat16, size=whole)
    exact = theirs(x.double())
    ours, rounded = (y.double() for y in (resize(x, *resize_weights(size, torch.bfloat16, CPU, whole)), exact.bfloat16()))
    assert (ours - exact).norm() < 3 * (rounded - exact).norm()  # of weights, between the products, and of the result


def test_a_box_of_cutmix_covers_the_same_part_of_smaller_images():
    box = torch.tensor([4.0, 20.0, 8.0, 32.0])
    share = (20 - 4) * (32 - 8) / 32**2
    for size in (16, 32, 48):
        x = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)]).to(memory_format=torch.channels_last)
        assert mix(x, torch.tensor(1.0), box)[0].mean() == share


@pytest.mark.parametrize(("epochs", "expected"), [(8, [20] * 2 + [24] * 3 + [32] * 3), (4, [20, 24, 24, 32]), (1, [24])])
def test_sizes_begin_where_the_stretched_schedule_says(epochs, expected):
    recipe = Recipe(epochs=epochs, schedule=Schedule(schedule_epochs=8), phases=Phases((20, 24, 32), (2, 5.2)))
    assert [recipe.phase(epoch).size for epoch in range(epochs)] == expected
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert [Recipe(epochs=2).phase(epoch).size for epoch in range(2)] == [32, 32]


def test_frozen_parameters_are_those_that_names_and_patterns_mean():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[1].weight.requires_grad_(False)
    assert freezable(model, ()) == []
    (bias,) = freezable(model, ("0.bias",))
    assert bias is model[0].bias
    assert len(freezable(model, ("*.bias",))) == len(freezable(model, ("*.bias", "1.*"))) == 2
    for patterns, message in ((("0.bia",), "did you mean 0.bias"), (("1.weight",), "unknown parameter"), (("*",), "leave a")):
        with pytest.raises(InputError, match=message):
            freezable(model, patterns)


def test_parameters_freeze_at_their_epoch():
    phases = Phases((24, 32), (2,), frozen=("stem.*",), frozen_from=3)
    assert [phases.at(epoch, 0.5) for epoch in range(3)] == [Phase(24, False), Phase(32, False), Phase(32, True)]
    assert Phases(frozen=("stem.*",)).at(0, 1) == Phase(32, True)
    assert Phases(frozen_from=0).at(0, 1) == PLAIN


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sizes": (8,)}, "sizes"), ({"sizes": (24, 64), "size_epochs": (1,)}, "sizes"), ({"sizes": (24, 32)}, "size_epochs"),
        ({"size_epochs": (3,)}, "size_epochs"), ({"sizes": (20, 24, 32), "size_epochs": (2, 2)}, "size_epochs"),
        ({"sizes": (24, 32), "size_epochs": (0,)}, "size_epochs"), ({"sizes": (24, 32), "size_epochs": (200,)}, "size_epochs"),
        ({"frozen": ("a",), "frozen_from": -1}, "frozen_from"), ({"frozen_from": 201}, "frozen_from"),
        ({"sizes": (32,) * 7, "size_epochs": tuple(range(1, 7))}, "sizes"),
    ],
)  # fmt: skip
def test_impossible_phases_are_refused_by_name(values, named):
    with pytest.raises(InputError, match=f"^{named} must be "):
        Recipe(phases=Phases(**values))
