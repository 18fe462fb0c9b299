"""Keyed dropout: the definition's bits, and a mask that a sample keeps wherever it is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from fastcifar.command import parse_command
from fastcifar.models import ARCHITECTURES, layers
from fastcifar.models.layers import Dropout, StochasticDepth, share_keys
from fastcifar.train import train
from kernels import philox as keyed
from kernels.dropout import _dropout, _dropout_backward, dropout, numba, reference

SEED, LAYER, EPOCH = 3 << 40 | 5, 7, torch.tensor(11)
SAMPLES = torch.tensor([49_999, 0, 7])
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def values(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def drop(x, samples=SAMPLES, epoch=EPOCH, probability=0.17, layer=LAYER, seed=SEED):
    return dropout(x, samples, epoch, probability=probability, layer=layer, seed=seed)


def mask(samples=SAMPLES, elements=20_000, **others):
    return drop(torch.ones(len(samples), elements), samples, **others) != 0


def expected(x, probability):
    """Element by element, from the formula."""
    y = torch.empty_like(x)
    for n, sample in enumerate(SAMPLES.tolist()):
        for e, place in enumerate(np.ndindex(*x.shape[2:], x.shape[1])):
            at = (n, place[-1], *place[:-1])
            words = keyed.philox(SEED, np.array([sample]), int(EPOCH), 13 | LAYER << 8, e // 8)
            value = int(words[e % 8 // 2][0]) >> 16 * (e % 2) & 0xFFFF
            wide = x[at].double() if x.dtype == torch.float64 else x[at].float()
            y[at] = wide * (1 / (1 - probability)) if value >= round(probability * 65536) else 0
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 8), (3, 5), (3, 5, 3, 7), (3, 2, 3), (3, 1, 1, 1)])
def test_an_element_is_kept_as_the_formula_says(shape, dtype):
    x = values(*shape, dtype=dtype)
    assert torch.equal(drop(x, probability=0.4), expected(x, 0.4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 45, 4, 3), (3, 130), (3, 0, 2, 2)])
def test_memory_may_lie_in_any_order(shape, dtype):
    x = values(*shape, dtype=dtype)
    gaps = torch.stack([x, -x], -1)[..., 0]
    orders = [x, gaps, x.transpose(1, -1).contiguous().transpose(1, -1)]
    one, *others = [drop(order) for order in orders]
    assert all(torch.equal(one, other) for other in others)
    assert one.movedim(1, -1).is_contiguous()
    assert drop(x[:0], SAMPLES[:0]).shape == (0, *shape[1:])


def test_every_bfloat16_is_scaled_and_rounded_as_pytorch_does():
    rows = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    kept = torch.full((256, 32), 255, dtype=torch.uint8)
    one, other = (form.apply(rows, kept, 0.17) for form in (numba, reference))
    assert torch.equal(one.isnan(), other.isnan())
    assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert not numba.apply(rows, torch.zeros_like(kept), 0.17).any()  # of what is not finite, nothing is left


@pytest.mark.parametrize("probability", [0.1, 0.17, 0.5])
def test_masks_are_fair_and_independent(probability):
    """Within five standard deviations of a binomial; two masks agree as often as independent ones do."""
    others = ({}, {"layer": LAYER + 1}, {"epoch": EPOCH + 1}, {"seed": SEED + 1}, {"samples": SAMPLES + 1})
    masks = [mask(probability=probability, **other) for other in others]
    masks.append(masks[0].roll(1, 1))
    agreeing = 1 - 2 * probability * (1 - probability)
    n = masks[0].numel()
    assert abs(int(masks[0].sum()) - n * (1 - probability)) < 5 * (n * probability * (1 - probability)) ** 0.5
    for other in masks[1:]:
        assert abs(int((masks[0] == other).sum()) - n * agreeing) < 5 * (n * agreeing * (1 - agreeing)) ** 0.5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_samples_mask_depends_on_nothing_else(threads):
    samples = torch.arange(100, 140)
    whole = mask(samples, 999)
    torch.set_num_threads(threads)
    assert torch.equal(mask(samples.flip(0), 999), whole.flip(0))
    assert torch.equal(mask(samples[7:8], 999), whole[7:8])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_the_same_mask(dtype):
    x = values(3, 6, 5, 3, dtype=dtype).requires_grad_()
    y = drop(x)
    gradient = values(3, 6, 3, 5, dtype=dtype).transpose(2, 3)
    y.backward(gradient)
    assert torch.equal(x.grad, drop(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_keep_the_compilers_contract(dtype):
    for shape in ((3, 5, 3, 7), (3, 9)):
        x = values(*shape, dtype=dtype)
        torch.library.opcheck(_dropout, (x.clone().requires_grad_(), SAMPLES, EPOCH, 0.17, LAYER, SEED))
        torch.library.opcheck(_dropout_backward, (x, _dropout(x, SAMPLES, EPOCH, 0.17, LAYER, SEED)[1], 0.17))


def test_probability_0_is_nothing():
    x = values(3, 4)
    assert drop(x, probability=0.0) is x


MISTAKES = {
    r"x must be \[N, C, ...\] of a floating-point dtype, got \[3\]": {"x": torch.ones(3)},
    r"x must be .* got \[3, 4\] int64": {"x": torch.ones(3, 4, dtype=torch.int64)},
    r"samples must be \[3\] and epoch \[\], int64, got \[2\] int64": {"samples": SAMPLES[:2]},
    r"samples must be .* got \[3\] int64 on cpu, \[1\] int64": {"epoch": EPOCH[None]},
    r"samples must be .* \[\] int32": {"epoch": EPOCH.int()},
    "probability must be 0 to below 1, .* got 1.0 and 7": {"probability": 1.0},
    "layer 0..2.24-1, got 0.17 and -1": {"layer": -1},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        drop(**{"x": torch.ones(3, 4)} | MISTAKES[message])


# The layers


def keyed_layers(*given):
    keys = share_keys(nn.Sequential(*given))
    keys.seed, keys.epoch, keys.samples, keys.step = SEED, EPOCH, SAMPLES, torch.tensor([4])
    return keys


def test_without_keys_dropout_is_pytorchs():
    x = torch.ones(3, 400)
    for layer in (Dropout(0.3), nn.Dropout(0.3)):
        torch.manual_seed(0)
        drawn = layer(x)
    torch.manual_seed(0)
    assert torch.equal(Dropout(0.3)(x), drawn)
    layer = Dropout(0.3)
    keys = keyed_layers(layer)
    assert torch.equal(layer(x), drop(x, probability=0.3, layer=0))
    assert layer.eval()(x) is x
    keys.samples = None
    torch.manual_seed(0)
    assert torch.equal(layer.train()(x), drawn)


def test_layers_are_numbered_once_and_share_their_keys():
    network = nn.Sequential(Dropout(0.5), nn.Sequential(nn.ReLU(), StochasticDepth(0.5)), Dropout(0.5))
    keys = share_keys(network)
    assert [(layer.number, layer.keys is keys) for layer in (network[0], network[1][1], network[2])] == [
        (i, True) for i in range(3)
    ]
    assert share_keys(network) is keys
    assert not network.state_dict()
    assert share_keys(nn.ReLU()) is None


def test_stochastic_depth_drops_by_sample_or_by_step():
    branch = torch.ones(3, 2, 2, 2)
    by_sample, by_step = StochasticDepth(0.5), StochasticDepth(0.5, "batch")
    keys = keyed_layers(by_sample, by_step)
    seen = {"sample": [], "step": []}
    for step in range(40):
        keys.samples, keys.step = SAMPLES + 3 * step, torch.tensor([step])
        seen["sample"] += by_sample(branch)[:, 0, 0, 0].tolist()
        assert torch.equal(by_sample(branch.flip(0)), by_sample(branch))
        drawn = by_step(branch)
        assert (drawn == drawn[0, 0, 0, 0]).all()
        seen["step"].append(float(drawn[0, 0, 0, 0]))
        keys.samples = keys.samples + 1000
        assert torch.equal(by_step(branch), drawn)  # whatever is in the batch
    assert set(seen["sample"]) == {0.0, 2.0}
    assert set(seen["step"]) == {0.0, 1.0}
    assert 30 < seen["sample"].count(0.0) < 90
    assert 5 < seen["step"].count(0.0) < 35


@pytest.mark.slow
def test_compiled_it_draws_the_same():
    network = nn.Sequential(nn.ReLU(), Dropout(0.3), StochasticDepth(0.4))
    keys, x = keyed_layers(network), values(3, 4, 5, 5).to(memory_format=torch.channels_last)
    with torch._dynamo.config.patch(error_on_recompile=True):
        fast = torch.compile(network, dynamic=False, fullgraph=True)
        for batch in range(4):
            keys.samples = SAMPLES + batch
            a, b = (x.clone().requires_grad_() for _ in range(2))
            one, other = network(a), fast(b)
            one.sum().backward()
            other.sum().backward()
            assert torch.equal(one, other)
            assert torch.equal(a.grad, b.grad)


def test_training_draws_the_same_masks_in_batches_of_any_size(betons, tmp_path, monkeypatch):
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)
    original = layers.keyed_dropout
    sizes = "--epochs 2 --limit-train 64 --limit-test 20 --held-out 0 --eval-every 2 --no-plots --device cpu"
    random = "--block-dropout 0.3 --head-dropout 0.2 --stochastic-depth 0.3 --stochastic-depth-mode sample"
    runs = []
    for batch_size in (32, 64):
        drawn = {}

        def noted(x, samples, epoch, *, layer, drawn=drawn, **others):
            masks = original(torch.ones_like(x), samples, epoch, layer=layer, **others) != 0
            drawn.update(zip(((int(n), int(epoch), layer) for n in samples), masks, strict=True))
            return original(x, samples, epoch, layer=layer, **others)

        monkeypatch.setattr(layers, "keyed_dropout", noted)
        where = f"--data {betons} --out {tmp_path / str(batch_size)} --batch-size {batch_size}"
        train(parse_command(f"--arch narrow --recipe light_resnet18 {where} {sizes} {random}".split()), Console(quiet=True))
        runs.append(drawn)
    one, other = runs
    assert one.keys() == other.keys()
    assert len(one) == 2 * 64 * (4 + 4 + 1)  # epochs, images, layers: four blocks' two, and the head's
    assert all(torch.equal(one[key], other[key]) for key in one)
