"""The streamed set: the resident set's samples without the memory, and the same refusals."""

import shutil

import pytest
import torch

from fastcifar.dataset import epoch_order, hold_out, load_resident, load_splits, load_streamed
from fastcifar.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture
def train_beton(betons, tmp_path):
    """A beton of this test's own, to be damaged."""
    for name in ("train.beton", "train.json"):
        shutil.copy(betons / name, tmp_path / name)
    return tmp_path / "train.beton"


def test_batches_are_the_resident_sets(train_beton):
    (resident, _), (streamed, _) = (load(train_beton, CPU) for load in (load_resident, load_streamed))
    assert len(streamed) == len(resident) == 200
    for positions in epoch_order(resident.index, 0, 3).split(64):
        batch, expected = streamed.fetch(positions), resident.subset(positions)
        for name in ("images", "labels", "index"):
            assert torch.equal(getattr(batch, name), getattr(expected, name))


def test_limit_and_held_out_part_are_the_resident_sets(betons):
    splits = [
        load_splits(betons, CPU, limit_train=120, limit_test=10, val_fraction=0.25, seed=3, verify=True, stream=stream)
        for stream in (False, True)
    ]
    assert len(splits[1].train) == 90
    assert torch.equal(splits[0].train.index, splits[1].train.index)
    assert torch.equal(splits[0].select.images, splits[1].select.images)
    streamed, _ = load_streamed(betons / "train.beton", CPU)
    assert len(hold_out(streamed, 0.5, 0)[1].fetch(torch.arange(100))) == 100


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "no manifest", "missing", "too few"])
def test_a_damaged_file_is_refused_by_name(train_beton, damage):
    content, limit = bytearray(train_beton.read_bytes()), 0
    if damage == "flipped byte":
        content[len(content) // 2] ^= 1
        train_beton.write_bytes(content)
    elif damage in ("truncated", "empty"):
        train_beton.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    elif damage == "no manifest":
        train_beton.with_suffix(".json").unlink()
    elif damage == "missing":
        train_beton.unlink()
    else:
        limit = 201
    with pytest.raises(InputError, match="train"):
        load_streamed(train_beton, CPU, limit=limit)
