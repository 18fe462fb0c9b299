"""Convolutions' weights rounded all at once are what autocast would have rounded one by one."""

import pytest
import torch
from torch.func import functional_call

from fastcifar.models import build_model
from fastcifar.rounding import RoundedWeights
from fastcifar.step import autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
@pytest.mark.parametrize(("arch", "count"), [("light_resnet18", 20), ("speed94_half", 8)])
def test_output_and_gradients_have_autocasts_bits(arch, count, dtype):
    model = build_model(arch).train()  # squeeze-excitation's weights stay autocast's, a whitening stem's are not trained
    images, results = torch.randn(4, 3, 32, 32), []
    rounded = RoundedWeights(model, dtype)
    assert len(rounded.by_name) == (0 if dtype is None else count)
    for weights in ({}, rounded.by_name, rounded.by_name):  # twice: gradients must not add up
        rounded.round()
        model.zero_grad()
        with autocast(CPU, dtype):
            output = functional_call(model, weights, images)
        output.float().square().sum().backward()
        if weights:
            rounded.widen()
        assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
        results.append([output, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    for other in results[1:]:
        for one, value in zip(results[0], other, strict=True):
            assert one.dtype == value.dtype
            assert torch.equal(one, value)


def test_a_parameter_no_longer_trained_has_no_gradient():
    model = build_model("speed94_half").train()
    rounded, bias = RoundedWeights(model, torch.bfloat16), model.stem[0].bias
    for trained in (True, False):
        bias.requires_grad_(trained).grad = None
        rounded.round()
        with autocast(CPU, torch.bfloat16):
            functional_call(model, rounded.by_name, torch.randn(2, 3, 32, 32)).sum().backward()
        rounded.widen()
        assert (bias.grad is not None) is trained
