"""Every architecture once more, written straight from its source's words: the same outputs and gradients in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcifar.models import build_model
from tests.test_models import COUNTS


class Squeeze(nn.Module):
    """Global average, C -> C/16 -> C with or without biases, sigmoid, scale."""

    def __init__(self, channels, bias, act):
        super().__init__()
        self.down, self.up, self.act = nn.Linear(channels, channels // 16, bias), nn.Linear(channels // 16, channels, bias), act

    def forward(self, x):
        n, c = x.shape[:2]
        s = x.reshape(n, c, -1).mean(2)
        return x * torch.sigmoid(self.up(self.act(self.down(s)))).view(n, c, 1, 1)


class Post(nn.Module):
    """Reports A, B, D, E: conv, BN, act, conv, BN, [SE], add, act; a projection with BN where the shape changes."""

    def __init__(self, cin, cout, stride, act, se, shortcut):
        super().__init__()
        self.act = act
        self.c1, self.n1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.c2, self.n2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.se = None if se is None else Squeeze(cout, se == "bias", act)
        if stride != 1 or cin != cout:
            self.c3, self.n3 = nn.Conv2d(cin, cout, shortcut, stride, shortcut // 2, bias=False), nn.BatchNorm2d(cout)

    def forward(self, x):
        out = self.n2(self.c2(self.act(self.n1(self.c1(x)))))
        if self.se is not None:
            out = self.se(out)
        return self.act(out + (self.n3(self.c3(x)) if hasattr(self, "c3") else x))


class Pre(nn.Module):
    """Report C: BN, ReLU, [SE], then a 1x1 shortcut from there where the shape changes; conv, BN, ReLU, conv; add."""

    def __init__(self, cin, cout, stride, se):
        super().__init__()
        self.n1 = nn.BatchNorm2d(cin)
        self.se = Squeeze(cin, True, F.relu) if se else None
        self.c1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.n2 = nn.BatchNorm2d(cout)
        self.c2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        if stride != 1 or cin != cout:
            self.c3 = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.n1(x))
        if self.se is not None:
            out = self.se(out)
        side = self.c3(out) if hasattr(self, "c3") else x
        return side + self.c2(F.relu(self.n2(self.c1(out))))


class Network(nn.Module):
    def __init__(self, widths, counts, block, post_act=None, stem_bias=False):
        super().__init__()
        self.stem, self.post_act = nn.Conv2d(3, widths[0], 3, 1, 1, bias=stem_bias), post_act
        if post_act:
            self.stem_norm = nn.BatchNorm2d(widths[0])
        blocks, cin = [], widths[0]
        for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
            for number in range(count):
                blocks.append(block(cin, width, 2 if stage and not number else 1, stage))
                cin = width
        self.blocks = nn.Sequential(*blocks)
        if not post_act:
            self.last_norm = nn.BatchNorm2d(cin)
        self.fc = nn.Linear(cin, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.blocks(self.post_act(self.stem_norm(x)) if self.post_act else x)
        x = x if self.post_act else F.relu(self.last_norm(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Speed(nn.Module):
    """airbench94: 2x2 conv, GELU; thrice conv, pool, BN, GELU and conv, BN, GELU or a residual block; pool, head, scale."""

    def __init__(self, widths, residual):
        super().__init__()
        self.stem, parts, cin = nn.Conv2d(3, 24, 2), [], 24
        for width in widths:
            parts += [nn.Conv2d(cin, width, 3, 1, 1, bias=False), nn.MaxPool2d(2), self.norm(width), nn.GELU()]
            block = Post(width, width, 1, nn.GELU(), None, 1)
            if residual:
                block.n1, block.n2 = self.norm(width), self.norm(width)
                parts += [block]
            else:
                parts += [block.c2, self.norm(width), nn.GELU()]
            cin = width
        self.body, self.fc, self.scale = nn.Sequential(*parts), nn.Linear(cin, 10, bias=False), 1 / cin

    @staticmethod
    def norm(width):
        return nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)

    def forward(self, x):
        x = self.body(F.gelu(self.stem(x)))
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1)) * self.scale


def mish(x):
    return x * torch.tanh(F.softplus(x))


def post(act, se=lambda stage: None, shortcut=1):
    return lambda cin, cout, stride, stage: Post(cin, cout, stride, act, se(stage), shortcut)


def light(*widths):
    return Network(widths, (2, 2, 2, 2), lambda cin, cout, stride, stage: Pre(cin, cout, stride, True))


NETWORKS = {
    "dropout_resnet24": lambda: Network((32, 64, 128), (4, 4, 3), post(F.relu), F.relu),
    "resnet42": lambda: Network((32, 64, 96, 128, 185), (4, 4, 4, 4, 4), post(F.relu, shortcut=3), F.relu),
    "light_resnet18": lambda: light(32, 64, 128, 256),
    "light_resnet18_v2_40": lambda: light(40, 80, 160, 320),
    "light_resnet18_v2_45": lambda: light(45, 90, 170, 340),
    "robust_resnet64": lambda: Network((32, 64, 128), (10, 10, 10), lambda i, o, stride, stage: Pre(i, o, stride, False)),
    "se_resnet18": lambda: Network(
        (32, 64, 128, 256), (2, 2, 2, 2), post(F.relu, lambda stage: "plain" if stage >= 2 else None), F.relu, stem_bias=True
    ),
    "mish_se_resnet18": lambda: Network((32, 64, 256, 256), (2, 2, 2, 2), post(mish, lambda stage: "bias"), mish),
    "resnet18": lambda: Network((64, 128, 256, 512), (2, 2, 2, 2), post(F.relu), F.relu),
    "speed94_half": lambda: Speed((32, 128, 128), residual=False),
    "speed94": lambda: Speed((64, 256, 256), residual=False),
    "speed95": lambda: Speed((128, 384, 384), residual=False),
    "speed96": lambda: Speed((128, 304, 304), residual=True),
}


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COUNTS)
def test_the_same_outputs_and_gradients_as_a_second_construction(name, training):
    torch.manual_seed(0)
    ours = build_model(name, stochastic_depth=0.0).double()
    theirs = NETWORKS[name]().double()
    with torch.no_grad():
        for parameter in ours.parameters():  # also the biases that are 0 at first
            parameter.add_(0.02 * torch.randn_like(parameter))
        for copy, original in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert copy.shape == original.shape
            copy.copy_(original)
            copy.requires_grad_(original.requires_grad)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)  # every layer serves maps of any size
    outputs = []
    for model in (ours.train(training), theirs.train(training)):
        logits = model(images)
        logits.square().sum().backward()
        statistics = [b for b in model.buffers() if b.is_floating_point()]  # batches are counted by the training step
        outputs.append((logits, *(p.grad for p in model.parameters() if p.requires_grad), *statistics))
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == COUNTS[name]
    for own, other in zip(*outputs, strict=True):
        assert (own - other).abs().max() <= 1e-10 * other.abs().max()
