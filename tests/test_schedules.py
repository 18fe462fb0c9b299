"""Learning rates: the reports' values at their epochs, PyTorch's own schedulers as peers, and stretching."""

import pytest
import torch

from fastcifar.errors import InputError
from fastcifar.recipes import RECIPES
from fastcifar.schedules import Schedule, learning_rate


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


def test_multi_step_drops_at_report_as_milestones():
    schedule = RECIPES["dropout_resnet24"].recipe.schedule
    spe = 390
    for epoch, expected in (
        (0, 0.09),
        (79, 0.09),
        (80, 0.009),
        (119, 0.009),
        (120, 9e-4),
        (150, 9e-5),
        (180, 9e-6),
        (199, 9e-6),
    ):
        assert learning_rate(schedule, epoch * spe, 200 * spe) == pytest.approx(expected)
    assert learning_rate(schedule, 80 * spe - 1, 200 * spe) == pytest.approx(0.09)


def test_report_ds_warm_up_and_cosine():
    schedule = RECIPES["se_resnet18"].recipe.schedule
    spe = 100
    drawn = rates(schedule, 250 * spe)
    assert drawn[0] == pytest.approx(0.1 / 1500)
    assert max(drawn) == pytest.approx(0.1)
    assert drawn[15 * spe] == pytest.approx(0.1)
    assert drawn[(15 + 235 // 2) * spe] == pytest.approx((0.1 + 0.001) / 2, rel=0.02)
    assert drawn[-1] == pytest.approx(0.001, rel=0.01)


def test_cosine_equals_pytorchs():
    schedule = Schedule("cosine", schedule_epochs=10, peak_lr=0.05, final_lr=0.01)
    expected = torch_rates(0.05, 100, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.01))
    assert rates(schedule, 100) == pytest.approx(expected, rel=1e-9)


def test_warm_restarts_equal_pytorchs():
    schedule = Schedule("cosine_restarts", schedule_epochs=70, peak_lr=0.05, restart_epochs=10, restart_growth=2)
    expected = torch_rates(0.05, 70, lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2))
    assert rates(schedule, 70) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_equals_pytorchs_within_a_step():
    schedule = RECIPES["resnet42"].recipe.schedule
    steps = 15_000
    expected = torch_rates(0.01, steps, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=steps))
    # PyTorch counts its phases in steps - 1 and warms up from step 0: the curves differ by at most a step's change.
    assert max(abs(a - b) for a, b in zip(rates(schedule, steps), expected, strict=True)) < 5e-6
    assert max(rates(schedule, steps)) == pytest.approx(0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_a_stretched_run_has_the_same_shape(name):
    schedule = RECIPES[name].recipe.schedule
    for share in (0.1, 0.3, 0.5, 0.77, 0.95):
        short = learning_rate(schedule, int(share * 2_000), 2_000)
        long = learning_rate(schedule, int(share * 20_000), 20_000)
        assert short == pytest.approx(long, rel=0.01)
    assert all(0 < rate <= schedule.peak_lr * (1 + 1e-12) for rate in rates(schedule, 50)[:-1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "linear"), ("peak_lr", 0.0), ("peak_lr", float("nan")), ("final_lr", 0.2), ("warmup_epochs", 200),
        ("milestones", (3, 2)), ("lr_factor", 0.0), ("restart_epochs", 0), ("restart_growth", 0.5), ("initial_lr", -1.0),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=field):
        Schedule(**{"peak_lr": 0.1, field: value})
