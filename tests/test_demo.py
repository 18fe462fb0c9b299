"""`make demo`: one picture at the end, and a run folder of its own every time."""

import pytest
from matplotlib.image import imread

from fastcifar import demo
from fastcifar.run_folder import RunFolder


@pytest.mark.slow
def test_the_demo_trains_and_draws_anew_every_time(betons, tmp_path, monkeypatch, call):
    few = ("--arch", "dropout_resnet24", "--epochs", "1", "--limit-train", "20", "--limit-test", "10", "--batch-size", "20")
    monkeypatch.setattr(demo, "TRAINING", (*few, "--no-plots"))
    picture = tmp_path / "demo.png"
    for name in ("run", "run-2"):
        printed = call(demo.main, "--data", betons, "--out", picture, "--run", tmp_path / "run")
        assert printed.splitlines()[-1] == str(picture)
        assert RunFolder(tmp_path / name).read_summary()["final"]["images"] == 10
        assert imread(picture).std() > 0.1  # drawn: not one colour
        picture.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-2"}
