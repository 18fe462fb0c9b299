"""The table of architectures: exact counts, shapes, the layers the reports describe, and the command that prints it."""

import hashlib
import json

import pytest
import torch
from torch import nn

from fastcifar.errors import InputError
from fastcifar.models import ARCHITECTURES, architecture, build_model, count_parameters, require_budget
from fastcifar.models.__main__ import main
from fastcifar.models.blocks import BasicBlock, ConvBlock, PreActivationBlock
from fastcifar.models.layers import SqueezeExcitation, StochasticDepth
from fastcifar.models.summary import flops_per_image, trace_layers, training_flops

# What the authors' notebooks print; speed94 has airbench94's 1,972,792 less its 1,440 that are not trained.
COUNTS = {
    "dropout_resnet24": 1_177_130,
    "resnet42": 4_907_445,
    "light_resnet18": 2_811_192,
    "light_resnet18_v2_40": 4_389_826,
    "light_resnet18_v2_45": 4_998_947,
    "robust_resnet64": 3_799_978,
    "se_resnet18": 2_818_122,
    "mish_se_resnet18": 4_570_934,
    "resnet18": 11_173_962,
    "speed94_half": 497_240,
    "speed94": 1_971_352,
    "speed95": 4_604_440,
    "speed96": 4_836_760,
}


# SHA-256 of the names and shapes in a state_dict, as checkpoints of version 0.2 hold them.
KEPT = {
    "dropout_resnet24": "c850b079", "resnet42": "128f5a8a", "light_resnet18": "ed48dfa9", "light_resnet18_v2_40": "c6e43819",
    "light_resnet18_v2_45": "bf0563c6", "robust_resnet64": "2dd3b0d8", "se_resnet18": "5ae7304f",
    "mish_se_resnet18": "2314f2ee", "resnet18": "6f102e64",
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_checkpoints_keep_fitting(name):
    with torch.device("meta"):
        state = build_model(name).state_dict()
    listing = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in state.items())
    assert hashlib.sha256(listing.encode()).hexdigest()[:8] == KEPT[name]


def test_json_lists_every_architecture_with_its_exact_count(call):
    rows = json.loads(call(main, "--json"))
    assert {row["arch"]: row["parameters"] for row in rows} == COUNTS
    assert all(row["flops_per_image"] > 0 and row["budget_share"] == row["parameters"] / 5_000_000 for row in rows)


def test_an_unknown_arch_suggests_the_nearest(refused):
    assert "did you mean se_resnet18" in refused(main, "--summary", "se_resnet81")
    with pytest.raises(InputError, match="robust_resnet64"):
        architecture("robustresnet")


@pytest.mark.parametrize("name", COUNTS)
def test_rows_agree_with_the_models_they_describe(name):
    with torch.device("meta"):
        model = build_model(name)
    assert ARCHITECTURES[name].parameters == count_parameters(model) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_forward_and_backward_reach_every_parameter(name):
    torch.manual_seed(0)
    depth = 0 if ARCHITECTURES[name].block is ConvBlock else 0.1
    model = build_model(name, 100, block_dropout=0.1, head_dropout=0.1, stochastic_depth=depth)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 100)
    logits.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", COUNTS)
def test_images_of_any_size_from_16_pixels_are_served(name):
    with torch.device("meta"):
        model = build_model(name, kernels="torch")
        assert all(model(torch.zeros(2, 3, size, size)).shape == (2, 10) for size in (16, 23, 48))


def test_nets_without_residual_branches_drop_none():
    with pytest.raises(InputError, match="speed94 has no residual branches to drop"):
        build_model("speed94", stochastic_depth=0.1)


def test_ablation_without_squeeze_excitation_has_report_ds_count():
    assert count_parameters(build_model("se_resnet18", squeeze_excitation=False)) == 2_797_642


def test_probabilities_change_neither_parameters_nor_names():
    plain = build_model("light_resnet18").state_dict()
    dropped = build_model("light_resnet18", block_dropout=0.2, head_dropout=0.3, stochastic_depth=0.1).state_dict()
    assert {k: v.shape for k, v in plain.items()} == {k: v.shape for k, v in dropped.items()}


def test_weight_layers_are_those_in_the_names():
    def main_path(model):
        return sum(
            isinstance(m, (nn.Conv2d, nn.Linear)) and "shortcut" not in n and ".se." not in n for n, m in model.named_modules()
        )

    assert main_path(build_model("resnet42")) == 42
    assert main_path(build_model("robust_resnet64")) == 62
    assert main_path(build_model("dropout_resnet24")) == 24
    assert main_path(build_model("se_resnet18")) == main_path(build_model("resnet18")) == 18


def test_blocks_are_what_the_reports_describe():
    def squeezed(name):
        return [n for n, m in build_model(name).named_modules() if isinstance(m, SqueezeExcitation)]

    assert squeezed("se_resnet18") == ["stages.2.0.se", "stages.2.1.se", "stages.3.0.se", "stages.3.1.se"]
    assert len(squeezed("mish_se_resnet18")) == len(squeezed("light_resnet18")) == 8
    assert squeezed("robust_resnet64") == []
    assert all(isinstance(b, PreActivationBlock) for s in build_model("robust_resnet64").stages for b in s)
    assert all(isinstance(b, BasicBlock) for s in build_model("dropout_resnet24").stages for b in s)
    assert not any(isinstance(m, nn.ReLU) for m in build_model("mish_se_resnet18").modules())
    for mode, expected in (
        ("sample", [0.1 * k / 8 for k in range(1, 9)]),
        ("batch", [0.1 * s / 4 * i / 2 for s in (1, 2, 3, 4) for i in (1, 2)]),
    ):
        model = build_model("light_resnet18", stochastic_depth=0.1, stochastic_depth_mode=mode)
        layers = [layer for layer in model.modules() if isinstance(layer, StochasticDepth)]
        assert [layer.drop_probability for layer in layers] == pytest.approx(expected)
        assert {layer.mode for layer in layers} == {mode}


def test_a_basic_block_computes_the_residual_sum():
    torch.manual_seed(0)
    block = build_model("se_resnet18").stages[3][0].eval()
    x = torch.randn(2, 128, 8, 8)
    branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    squeezed = branch.mean((2, 3))
    scale = torch.sigmoid(torch.relu(squeezed @ block.se.reduce.weight.T) @ block.se.expand.weight.T)
    expected = torch.relu(branch * scale[..., None, None] + block.shortcut(x))
    torch.testing.assert_close(block(x), expected)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = StochasticDepth(0.25)
    out = layer(torch.ones(20_000, 2, 1, 1))
    per_sample = out.flatten(1)
    assert (per_sample[:, 0] == per_sample[:, 1]).all()
    assert sorted(out.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert out.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(layer.eval()(out), out)


def test_stochastic_depth_per_batch_drops_all_or_nothing_and_scales_nothing():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25, "batch"), torch.ones(4, 2, 1, 1)
    sums = torch.stack([layer(x).sum() for _ in range(4000)])
    assert sorted(sums.unique().tolist()) == [0.0, 8.0]
    assert (sums == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(StochasticDepth(0.999999, "batch")(x.requires_grad_()), torch.zeros_like(x))  # a draw, not a host's if


def test_initialisations_are_the_reports():
    torch.manual_seed(0)
    head = build_model("robust_resnet64").requires_grad_(False).classifier
    assert head.weight.std() == pytest.approx(0.01, rel=0.1)
    assert not head.bias.any()
    conv = build_model("light_resnet18").requires_grad_(False).stages[3][1].conv2.weight  # normal by fan-out: 256 x 9
    assert conv.std() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)
    assert conv.abs().max() > 3.5 * conv.std()
    conv = (
        build_model("se_resnet18").requires_grad_(False).stages[3][1].conv2.weight
    )  # PyTorch's own: uniform within 1 / sqrt(fan_in)
    assert conv.abs().max() == pytest.approx((256 * 9) ** -0.5, rel=0.01)
    net = build_model("speed96").requires_grad_(False)
    for conv in (net.stages[1][0].conv.weight, net.stages[1][1].conv2.weight):  # of 128 and of 304 channels, 304 filters
        inputs = conv.shape[1]
        torch.testing.assert_close(conv[:inputs, :, 1, 1], torch.eye(inputs))
        assert conv[:inputs].sum() == inputs
        assert inputs == 304 or conv[inputs:].abs().max() == pytest.approx((inputs * 9) ** -0.5, rel=0.01)
    assert net.classifier.weight.std() == pytest.approx(1, rel=1e-5)
    squeeze = build_model("light_resnet18").requires_grad_(False).stages[3][1].se
    assert squeeze.expand.weight.std() == pytest.approx(0.01, rel=0.1)
    assert not squeeze.expand.bias.any()


def test_flops_grow_with_the_image():
    row = ARCHITECTURES["speed94_half"]
    assert (row.widths, row.blocks) == ((32, 128, 128), (1, 1, 1))
    for size in (24, 32):
        side, inputs, expected = size - 1, 24, 2 * 12 * 24 * (size - 1) ** 2  # of the fixed stem the forward pass alone
        for width in row.widths:
            expected += 6 * 9 * width * (inputs * side**2 + width * (side // 2) ** 2)
            side, inputs = side // 2, width
        assert training_flops("speed94_half", (size, size)) == expected + 6 * inputs * 10


def test_flops_of_a_layer_counted_by_hand():
    rows = {row.name: row for row in trace_layers(build_model("se_resnet18"))}
    assert rows["stem.0"].flops == 2 * 32 * 32 * 32 * 27
    assert rows["classifier"].flops == 2 * 256 * 10
    assert rows["stages.3.0.shortcut.0"].output == (256, 4, 4)
    assert sum(row.parameters for row in rows.values()) == COUNTS["se_resnet18"]
    assert flops_per_image(build_model("se_resnet18")) == sum(row.flops for row in rows.values())


def test_the_budget_is_kept_unless_lifted():
    with pytest.raises(InputError, match=r"11,173,962.*--max-parameters 0"):
        require_budget("resnet18", COUNTS["resnet18"], 5_000_000)
    require_budget("resnet18", COUNTS["resnet18"], 0)
    require_budget("light_resnet18_v2_45", COUNTS["light_resnet18_v2_45"], 5_000_000)
