"""Mixup and CutMix: shares, pixels and labels agree; draws follow their distributions."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastcifar.augmentation import Augmentation
from fastcifar.augmentation.mixing import beta, mix, mix_plan, partner

CPU = torch.device("cpu")


def test_mixup_and_cutmix_shares_pixels_and_labels_agree():
    plan = mix_plan(1.0, 1.0, 0.8, seed=0, epoch=1, steps=4000, device=CPU)
    area = (plan.box[:, 1] - plan.box[:, 0]) * (plan.box[:, 3] - plan.box[:, 2])
    is_mixup, is_cutmix = plan.blend < 1, area > 0
    assert not (is_mixup & is_cutmix).any()
    assert abs(is_mixup.float().mean() - 0.4) < 0.05
    assert abs(is_cutmix.float().mean() - 0.4) < 0.05
    x = torch.stack([torch.full((3, 32, 32), float(i)) for i in range(4)])
    for step in range(40):
        mixed = mix(x, plan.blend[step], plan.box[step])
        expected = plan.lam[step] * x.mean((1, 2, 3)) + (1 - plan.lam[step]) * partner(x).mean((1, 2, 3))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), expected)  # the lam is the lam of the pixels
        if is_cutmix[step]:
            assert set(mixed[1].unique().tolist()) <= {1.0, 2.0}  # pasted, not blended
    untouched = ~is_mixup & ~is_cutmix
    assert (plan.lam[untouched] == 1).all()
    step = int(torch.nonzero(untouched)[0])
    assert torch.equal(mix(x, plan.blend[step], plan.box[step]), x)


@pytest.mark.parametrize(("mixup", "cutmix", "probability"), [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)])
def test_without_mixing_every_label_is_its_own(mixup, cutmix, probability):
    plan = mix_plan(mixup, cutmix, probability, seed=0, epoch=0, steps=1000, device=CPU)
    assert (plan.lam == 1).all()
    assert (plan.blend == 1).all()
    assert torch.equal(plan.box[:, 0], plan.box[:, 1])
    assert not Augmentation(mixup_alpha=mixup, cutmix_alpha=cutmix, mix_probability=probability).mixes


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_follow_beta(alpha):
    drawn = beta(0, np.arange(50_000), 0, np.full(50_000, alpha))
    expected = np.random.default_rng(0).beta(alpha, alpha, 50_000)  # not the distribution: of alpha 0.1, 1 % round to 1
    assert stats.ks_2samp(drawn, expected).pvalue > 1e-4


def test_mixup_alpha_falls_linearly_over_training():
    settings = Augmentation(mixup_alpha=1.0, mixup_alpha_end=0.1)
    for progress, alpha in ((0.0, 1.0), (0.5, 0.55), (1.0, 0.1)):
        plan = settings.plan_mixing(seed=0, epoch=0, steps=20_000, progress=progress, device=CPU)
        assert plan.lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)  # variance of Beta(alpha, alpha)
    assert (Augmentation().plan_mixing(seed=0, epoch=0, steps=9, progress=0.5, device=CPU).lam == 1).all()
