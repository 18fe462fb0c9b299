"""Convolutions' weights rounded all at once are what autocast would have rounded one by one."""

import pytest
import torch
from torch.func import functional_call

from fastcifar.models import build_model
from fastcifar.rounding import RoundedWeights
from fastcifar.step import autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_output_and_gradients_have_autocasts_bits(dtype):
    model = build_model("light_resnet18").train()  # squeeze-excitation's weights stay autocast's
    images, results = torch.randn(4, 3, 32, 32), []
    rounded = RoundedWeights(model, dtype)
    assert len(rounded.by_name) == (0 if dtype is None else 20)
    for weights in ({}, rounded.by_name, rounded.by_name):  # twice: gradients must not add up
        rounded.round()
        model.zero_grad()
        with autocast(CPU, dtype):
            output = functional_call(model, weights, images)
        output.float().square().sum().backward()
        if weights:
            rounded.widen()
        results.append([output, *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        for one, value in zip(results[0], other, strict=True):
            assert one.dtype == value.dtype
            assert torch.equal(one, value)
