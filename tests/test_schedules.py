"""Learning rates: the reports' values at their epochs, PyTorch's own schedulers as baselines, and stretching."""

import pytest
import torch

from fastcifar.errors import InputError
from fastcifar.optimization import Schedule, epoch_momenta, epoch_rates, learning_rate
from fastcifar.recipes import RECIPES


def rates(schedule, steps):
    return [learning_rate(schedule, step, steps) for step in range(steps)]


def torch_rates(peak, steps, make):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make(optimizer)
    drawn = []
    for _ in range(steps):
        drawn.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return drawn


def by_epoch(name):
    """The rate of each epoch of a recipe, which must not move within one."""
    recipe = RECIPES[name].recipe
    drawn = [epoch_rates(recipe.schedule, epoch, 3, recipe.epochs) for epoch in range(recipe.epochs)]
    assert all(len(set(rates)) == 1 for rates in drawn)
    return [rates[0] for rates in drawn]


def test_report_as_rate_falls_where_its_log_and_its_text_say():
    for name, milestones in (("dropout_resnet24", (90, 180)), ("dropout_resnet24_text", (80, 120, 150, 180))):
        expected = [0.09 * 0.1 ** sum(epoch >= at for at in milestones) for epoch in range(200)]
        assert by_epoch(name) == pytest.approx(expected)


def test_report_ds_warm_up_and_cosine():
    """Rates that its notebook printed, to five digits."""
    drawn = by_epoch("se_resnet18")
    assert drawn[:15] == pytest.approx([0.1 * epoch / 15 for epoch in range(1, 16)])
    assert [round(rate, 5) for rate in drawn[:3]] == [0.00667, 0.01333, 0.02]
    assert [round(rate, 5) for rate in drawn[14:20]] == [0.1, 0.1, 0.1, 0.09998, 0.09996, 0.09993]
    assert [round(rate, 5) for rate in drawn[-3:]] == [0.00104, 0.00102, 0.001]


def test_report_cs_and_es_rates_are_pytorchs_stepped_once_an_epoch():
    expected = torch_rates(0.1, 300, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300))
    for name in ("light_resnet18", "light_resnet18_v2_40", "light_resnet18_v2_45", "robust_resnet64"):
        assert by_epoch(name) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    expected = torch_rates(0.05, 100, lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2))
    assert by_epoch("mish_se_resnet18") == pytest.approx(expected, rel=1e-9)
    expected = torch_rates(0.05, 200, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200))
    assert by_epoch("mish_se_resnet18_text") == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_cosine_equals_pytorchs():
    schedule = Schedule("cosine", schedule_epochs=10, peak_lr=0.05, final_lr=0.01)
    expected = torch_rates(0.05, 100, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.01))
    assert rates(schedule, 100) == pytest.approx(expected, rel=1e-9)


def test_linear_equals_pytorchs():
    schedule = Schedule("linear", schedule_epochs=10, peak_lr=0.05, final_lr=0.01)
    falls = {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 100}
    assert rates(schedule, 100) == pytest.approx(
        torch_rates(0.05, 100, lambda o: torch.optim.lr_scheduler.LinearLR(o, **falls))
    )
    after_warmup = Schedule("linear", schedule_epochs=10, peak_lr=0.05, warmup_epochs=2)
    assert rates(after_warmup, 10) == pytest.approx([0.025, 0.05, *(0.05 * (1 - step / 8) for step in range(8))])


def test_warm_restarts_equal_pytorchs():
    schedule = Schedule("cosine_restarts", schedule_epochs=70, peak_lr=0.05, restart_epochs=10, restart_growth=2)
    expected = torch_rates(0.05, 70, lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2))
    assert rates(schedule, 70) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [113, 7])
def test_one_cycle_equals_pytorchs_with_its_cycled_beta(steps):
    recipe = RECIPES["resnet42"].recipe
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.01)
    total = steps * 150
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs=150, steps_per_epoch=steps)
    expected = []
    for step in range(total):
        expected.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        if step + 1 < total:
            scheduler.step()
    ours = []
    for epoch in range(150):
        momenta = epoch_momenta(recipe.schedule, recipe.momentum, epoch, steps, 150)
        ours += zip(epoch_rates(recipe.schedule, epoch, steps, 150), momenta, strict=True)
    for column in (0, 1):
        assert [pair[column] for pair in ours] == pytest.approx([pair[column] for pair in expected], rel=1e-6)


def test_momentum_is_each_groups_own_unless_cycled():
    assert epoch_momenta(Schedule(), 0.9, 3, 4, 10) is None
    once = Schedule("one_cycle", schedule_step="epoch", schedule_epochs=10, warmup_epochs=3, min_momentum=0.8)
    drawn = [epoch_momenta(once, 0.9, epoch, 2, 10) for epoch in range(10)]
    assert [pair[0] for pair in drawn] == [pair[1] for pair in drawn]
    assert drawn[2][0] == pytest.approx(0.8)
    assert drawn[0][0] == drawn[9][0] == pytest.approx(0.9)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stretched_run_has_the_same_shape(name):
    schedule = RECIPES[name].recipe.schedule
    for share in (0.1, 0.3, 0.5, 0.77, 0.95):
        short = learning_rate(schedule, int(share * 20_000), 20_000)
        long = learning_rate(schedule, int(share * 200_000), 200_000)
        assert short == pytest.approx(long, rel=0.01)
    assert all(0 < rate <= schedule.peak_lr * (1 + 1e-12) for rate in rates(schedule, 50)[:-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "square"), ("peak_lr", 0.0), ("peak_lr", float("nan")), ("final_lr", 0.2), ("warmup_epochs", 200),
        ("milestones", (3, 2)), ("lr_factor", 0.0), ("restart_epochs", 0), ("restart_growth", 0.5), ("initial_lr", -1.0),
        ("schedule_step", "step"), ("min_momentum", 0.85),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        Schedule(**{"peak_lr": 0.1, field: value})
