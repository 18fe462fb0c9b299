"""`build_model(kernels=...)`: the same parameters, logits, gradients and statistics, whoever computes them."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, build_model
from fastcifar.models import layers as model_layers
from fastcifar.models.blocks import BasicBlock, BlockSpec, ConvBlock, PreActivationBlock
from fastcifar.models.resnet import ResNet
from kernels import backends, residual_tail
from tests.kernel_checks import sample

KINDS = ["torch", "numba", "triton", "fusable"]
BLOCKS = [BasicBlock, PreActivationBlock]


SPEED = {"stem": "whitening", "downsampling": "pooled_conv", "norm": model_layers.Norm(momentum=0.4, eps=1e-12, scales=False)}


def small(block, kernels="torch", activation=nn.Mish, **others):
    """Two stages of one block each, of 4 and 6 channels, squeeze-excitation with biases in the second."""
    torch.manual_seed(0)
    zero = {"block_dropout": 0.0, "head_dropout": 0.0, "stochastic_depth": 0.0}
    return ResNet(
        widths=(4, 6), blocks=(1, 1), block=block, shortcut="conv1x1_bn" if block is BasicBlock else "conv1x1",
        activation=activation, se_stages=(2,), se_bias=True, stem_bias=True,
        initialisation="kaiming", num_classes=3, kernels=kernels, **(zero | others),
    )  # fmt: skip


def step(model, autocast=None, dtype=torch.float32, size=6):
    """Logits, gradients and buffers after one batch of two images."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(images)
    logits.float().square().sum().backward()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients, **{name: b.clone() for name, b in model.named_buffers()}}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_choice_changes_no_name(name):
    with torch.device("meta"):
        names = [list(build_model(name, kernels=kernels).state_dict()) for kernels in [*KINDS, "auto"]]
    assert all(other == names[0] for other in names)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_choice_changes_no_parameter(block):
    states = [small(block, kernels).state_dict() for kernels in [*KINDS, "auto"]]
    assert all(torch.equal(state[name], states[0][name]) for state in states for name in states[0])


@pytest.mark.parametrize(("block", "kernels", "activation"), sample(BLOCKS, KINDS[1:], [nn.ReLU, nn.Mish], every=3))
def test_a_training_step_and_evaluation_are_the_same(block, kernels, activation):
    ours, theirs = small(block, kernels, activation), small(block, "torch", activation)
    for _ in range(2):
        assert_same(step(ours), step(theirs), rtol=1e-4, atol=1e-5)
    assert_same(step(ours.eval()), step(theirs.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", KINDS[1:])
@pytest.mark.parametrize("block", [BasicBlock, ConvBlock])
def test_parts_of_the_speed_nets_are_the_same(block, kernels):
    ours, theirs = small(block, kernels, **SPEED), small(block, **SPEED)
    assert_same(step(ours, size=12), step(theirs, size=12), rtol=1e-4, atol=1e-5)
    assert_same(step(ours.eval(), size=12), step(theirs.eval(), size=12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", sample(BLOCKS, every=2))
def test_where_dropout_is_on_the_modules_compute(monkeypatch, block):
    calls = []
    original = residual_tail._tail
    monkeypatch.setattr(residual_tail, "_tail", lambda *arguments: calls.append(arguments) or original(*arguments))
    for training in (True, False):
        for probabilities in ({}, {"block_dropout": 0.5}, {"stochastic_depth": 0.5}):
            ours, theirs = (small(block, kernels, **probabilities).train(training) for kernels in ("triton", "torch"))
            calls.clear()
            assert_same(step(ours), step(theirs), rtol=1e-4, atol=1e-5)  # drawing the same random numbers
            between = block is BasicBlock and training and probabilities  # BN and the sum of both blocks
            assert len(calls) == (3 if between else 5), probabilities


@pytest.mark.parametrize(("excitation", "together"), [("triton", 1), ("torch", 0)])
def test_what_stands_before_a_convolution_is_one_operation_where_both_are_tritons(monkeypatch, excitation, together):
    calls = []
    tail = model_layers.residual_tail
    monkeypatch.setattr(model_layers, "residual_tail", lambda *given, se_last, **more: calls.append(se_last) or tail(
        *given, se_last=se_last, **more
    ))  # fmt: skip
    ours = step(small(PreActivationBlock, {"squeeze_excite": excitation, "*": "triton"}))
    assert sum(calls) == together
    assert_same(ours, step(small(PreActivationBlock)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_on_a_cpu_auto_is_numba_to_the_bit(block):
    ours, theirs = step(small(block, "auto")), step(small(block, "numba"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_torch_path_is_the_modules_one_after_the_other(block):
    """What a run computed before there were kernels, to the bit."""
    model = small(block)
    baseline = deepcopy(model)

    def basic(self, x):
        branch = self.dropout1(self.act1(self.bn1(self.conv1(x))))
        branch = self.se(self.dropout2(self.bn2(self.conv2(branch))))
        return self.act2(self.shortcut(x) + self.drop_path(branch))

    def pre_activation(self, x):
        activated = self.se(self.act1(self.bn1(x)))
        branch = self.conv2(self.dropout(self.act2(self.bn2(self.conv1(activated)))))
        return self.shortcut(activated if self.projects else x) + self.drop_path(branch)

    def network(images):
        x = baseline.stem(images)
        for stage in baseline.stages:
            for layer in stage:
                x = (basic if block is BasicBlock else pre_activation)(layer, x)
        return baseline.classifier(baseline.dropout(baseline.tail(x).mean(dim=(2, 3))))

    baseline.forward = network
    for _ in range(2):
        ours, theirs = step(model), step(baseline)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("kernels", "block"), sample(KINDS[::-1], BLOCKS, every=6))
def test_compiles_into_one_graph_under_autocast(block, kernels):
    model = small(block, kernels)
    compiled = deepcopy(model)
    torch._dynamo.reset()
    compiled.forward = torch.compile(compiled.forward, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, torch.bfloat16), step(model, torch.bfloat16), rtol=0.05, atol=0.05)


def test_a_form_for_each_kind(monkeypatch):
    served = []
    tail = model_layers.residual_tail
    monkeypatch.setattr(model_layers, "residual_tail", lambda *given, backend, **more: served.append(backend) or tail(
        *given, backend=backend, **more
    ))  # fmt: skip
    kinds = {"residual_tail/relu": "fusable", "residual_tail/shortcut+se+relu": "triton", "*": "torch"}
    assert_same(step(small(BasicBlock, kinds, nn.ReLU)), step(small(BasicBlock, activation=nn.ReLU)), rtol=1e-4, atol=1e-5)
    assert served == ["fusable", "fusable", "fusable", "triton"]  # the other tail, with a shortcut alone, is PyTorch's
    served.clear()
    step(small(PreActivationBlock, {"residual_tail/relu": "fusable", "*": "triton"}, nn.ReLU))
    assert served == ["fusable"] * 5  # and squeeze-excitation apart


def test_an_activation_no_kernel_knows_is_left_to_the_modules():
    spec = BlockSpec(4, 4, 1, "conv1x1", nn.GELU, False, False, 0.0, 0.0, kernels="triton")
    x = torch.randn(2, 4, 3, 3)
    torch.manual_seed(0)
    ours = BasicBlock(spec)
    assert torch.equal(ours(x), nn.functional.gelu(ours.bn2(ours.conv2(nn.functional.gelu(ours.bn1(ours.conv1(x))))) + x))


def test_an_unknown_choice_is_a_users_error():
    with pytest.raises(InputError, match=r"kernels.*trition.*triton"):
        build_model("se_resnet18", kernels="trition")
    with pytest.raises(InputError, match=r"unknown kind of kernel 'residual_tail.mich': did you mean residual_tail.mish"):
        build_model("se_resnet18", kernels={"residual_tail/mich": "triton"})


def test_triton_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="triton needs a CUDA tensor"):
        small(BasicBlock, "triton")(torch.randn(2, 3, 6, 6))
