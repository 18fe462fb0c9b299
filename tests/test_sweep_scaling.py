"""The length of large sweeps: the simulation by hand, within Graham's bounds, and from run folders."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import sweep_scaling
from bench.sweep_scaling import bounds, clock, ready_times, simulated
from fastcifar.run_folder import METRIC_KEYS, RunFolder

EMPTY = dict.fromkeys(METRIC_KEYS) | dict.fromkeys(("train_loss", "train_accuracy", "images_per_second"), 1.0)
EMPTY |= {"learning_rates": [0.1]}


def test_runs_go_to_whichever_device_is_free_first():
    assert simulated([3.0] * 10, [0.0] * 5) == 6
    assert simulated([5, 1, 1, 1, 4], [0.0, 0.0]) == 7  # 5 on one; 1, 1, 1 and then 4 on the other
    assert simulated([2.0, 2.0], ready_times(2, per_node=1, node_seconds=1.5)) == 5  # the second node has its data after 3 s


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=40), st.integers(1, 12), st.floats(0, 100))
def test_no_order_is_outside_the_bounds(lengths, devices, node_seconds):
    ready = ready_times(devices, 4, node_seconds)
    least, most = bounds(lengths, ready)
    assert least * (1 - 1e-9) <= simulated(lengths, ready) <= most * (1 + 1e-9)


def test_a_table_is_made_of_run_folders(tmp_path, call):
    for number, seconds in enumerate((10.0, 20.0)):
        folder = RunFolder(tmp_path / str(number))
        folder.path.mkdir()
        rows = [
            EMPTY | {"epoch": 1, "first_step_seconds": 2.0, "train_seconds": seconds},
            EMPTY | {"epoch": 2, "first_step_seconds": 30.0, "train_seconds": 5.0, "eval_seconds": 1.0},
        ]
        folder.write_metrics(rows)
        (folder.path / "summary.json").write_text("{}")
    said = call(sweep_scaling.main, tmp_path, "--runs", "600", "--devices", "1", "8")
    assert "2 measured runs: 23.0 s on average, 18.0 to 28.0" in said
    assert clock(600 * 23 / 8) in said


def test_a_folder_without_runs_is_refused(tmp_path, refused):
    assert "holds no finished run" in refused(sweep_scaling.main, tmp_path)


@pytest.mark.parametrize(("seconds", "text"), [(59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")])
def test_a_clock(seconds, text):
    assert clock(seconds) == text
