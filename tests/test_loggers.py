"""What TensorBoard, wandb and MLflow get of a run, also when it is resumed, stopped, or their server is gone."""

import io
import json
import sys
from threading import Event
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastcifar import loggers
from fastcifar.arguments import require_typed
from fastcifar.command import parse_command
from fastcifar.errors import InputError, Stopped
from fastcifar.loggers import Loggers
from fastcifar.recipes import RunOptions
from fastcifar.train import main, train

RECORD = {
    "train_loss": 2.0, "eval_loss": None, "train_accuracy": 0.5, "eval_accuracy": None, "best_accuracy": 0.25,
    "images_per_second": 100.0, "learning_rates": [0.1, 0.05],
}  # fmt: skip
CURVES = {
    "loss/train": 2.0, "accuracy/train": 0.5, "accuracy/best": 0.25, "speed/images_per_second": 100.0, "learning_rate": 0.05,
}  # fmt: skip
SERVICES = ("wandb", "mlflow")


def fake_wandb(calls):
    module = ModuleType("wandb")
    noted = lambda name: lambda *args, **options: calls.append((name, *args, options))  # noqa: E731
    run = SimpleNamespace(id="w1", log=noted("log"), finish=noted("finish"))
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="offline"))
    module.Settings = dict
    module.init = lambda **options: calls.append(("init", options)) or run
    return module


def fake_mlflow(calls):
    module = ModuleType("mlflow")
    for name in ("set_tracking_uri", "log_params", "log_metrics", "end_run"):
        setattr(module, name, lambda *args, name=name, **options: calls.append((name, *args, options)))
    run = SimpleNamespace(info=SimpleNamespace(run_id="m1"))
    module.start_run = lambda **options: calls.append(("start_run", options)) or run
    return module


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What a logger asks of its library; what it says stands in calls["said"]."""
    found = {"wandb": [], "mlflow": [], "said": []}
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(found["wandb"]))
    monkeypatch.setitem(sys.modules, "mlflow", fake_mlflow(found["mlflow"]))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"arch": "x", "run": {"seed": 0, "kernels": {"*": "torch"}}}))
    return found


def opened(calls, tmp_path, names=SERVICES):
    made = Loggers(calls["said"].append)
    made.open(names, tmp_path / "run")
    return made


def test_every_service_gets_the_curves_and_the_configuration_and_a_resume_goes_on(calls, tmp_path):
    for epoch in (1, 2):
        with opened(calls, tmp_path) as curves:
            curves.log(RECORD | {"epoch": epoch})
    assert calls["said"] == []
    config = {"arch": "x", "run": {"seed": 0, "kernels": {"*": "torch"}}}
    known = {"resume": "allow", "config": config, "settings": {"console": "off"}, "dir": str(tmp_path / "run"), "name": "run"}
    assert calls["wandb"] == [
        ("init", {"id": None} | known), ("log", CURVES, {"step": 1}), ("finish", {"exit_code": 0}),
        ("init", {"id": "w1"} | known), ("log", CURVES, {"step": 2}), ("finish", {"exit_code": 0}),
    ]  # fmt: skip
    begun, gone_on = {"run_id": None, "run_name": "run"}, {"run_id": "m1", "run_name": None}
    where = ("set_tracking_uri", f"sqlite:///{tmp_path}/mlflow.db", {})
    end = [("end_run", "FINISHED", {}), ("set_tracking_uri", None, {})]
    assert calls["mlflow"] == [
        where, ("start_run", begun), ("log_params", {"arch": "x", "run.seed": 0, "run.kernels._": "torch"}, {}),
        ("log_metrics", CURVES, {"step": 1}), *end,
        where, ("start_run", gone_on), ("log_metrics", CURVES, {"step": 2}), *end,
    ]  # fmt: skip


def test_the_environment_says_where_things_go(calls, tmp_path, monkeypatch):
    for variable in ("WANDB_DIR", "WANDB_NAME", "WANDB_CONSOLE", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "own")
    with opened(calls, tmp_path):
        pass
    assert not {"dir", "name"} & set(calls["wandb"][0][1])
    assert calls["wandb"][0][1]["settings"] == {}
    assert "set_tracking_uri" not in {name for name, *_ in calls["mlflow"]}


@pytest.mark.parametrize(("error", "end", "code"), [(Stopped(2, ""), "KILLED", 255), (InputError("NaN"), "FAILED", 1)])
def test_a_run_that_does_not_finish_is_ended_as_what_it_is(calls, tmp_path, error, end, code):
    with pytest.raises(type(error)), opened(calls, tmp_path):
        raise error
    assert ("end_run", end, {}) in calls["mlflow"]
    assert calls["wandb"][-1] == ("finish", {"exit_code": code})


def test_a_service_that_fails_is_a_line_and_one_that_hangs_is_left(calls, tmp_path, monkeypatch):
    refused, hang = ConnectionError("no route\nto host"), Event()
    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", lambda *args, **options: (_ for _ in ()).throw(refused))
    monkeypatch.setattr(loggers, "PATIENCE", 1.0)
    monkeypatch.setattr(loggers, "time", SimpleNamespace(monotonic=lambda: 0.0))  # no stall of the machine is counted
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **options: hang.wait(60))
    with opened(calls, tmp_path) as curves:
        for epoch in (1, 2):
            curves.log(RECORD | {"epoch": epoch})
    hang.set()
    assert sorted(calls["said"]) == [
        "mlflow logs no more, training goes on: no route to host",
        "waiting for wandb, 1 seconds at most (Ctrl-C: no longer)",
        "wandb has not taken everything: not waited for any longer",
    ]
    assert calls["mlflow"][-2:] == [
        ("end_run", "FAILED", {}),
        ("set_tracking_uri", None, {}),
    ]  # nothing for a next run to find


def test_one_that_cannot_be_closed_keeps_no_other_from_its_end(calls, tmp_path, monkeypatch):
    class Full(loggers.TensorBoard):
        def close(self, end):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda folder, say: Full(folder))
    with pytest.raises(OSError, match="No space"), opened(calls, tmp_path, ("tensorboard", "mlflow")):
        pass
    assert ("end_run", "FINISHED", {}) in calls["mlflow"]


def test_without_a_key_nobody_is_asked_for_one(calls, tmp_path, monkeypatch):
    wandb = sys.modules["wandb"]
    wandb.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode="online"))
    wandb.login = lambda prompt: prompt
    with opened(calls, tmp_path, ("wandb",)):
        pass
    assert calls["said"][0].endswith("training goes on: no API key: run `wandb login` once, or set WANDB_MODE=offline")


def test_what_is_missing_is_named_before_anything_is_trained(betons, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(loader=None if name in SERVICES else 1))
    line = refused(main, "--data", betons, "--out", tmp_path / "run", "--log", "tensorboard", "mlflow")
    assert "--log tensorboard mlflow needs mlflow, not installed: uv sync --extra loggers, or pip install" in line
    assert not (tmp_path / "run").exists()
    assert "--log 'neptune' is none of its choices" in refused(main, "--log", "neptune")
    assert parse_command(["--log"]).run.log == ()
    with pytest.raises(InputError, match=r"log must be a list of tensorboard, wandb, mlflow, got \('neptune',\)"):
        require_typed(RunOptions(log=("neptune",)))


@pytest.mark.slow
def test_their_own_libraries_hold_what_tensorboard_shows(betons, tmp_path, monkeypatch):
    mlflow, _ = (pytest.importorskip(name, reason="uv sync --extra loggers") for name in ("mlflow", "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # seconds in which its process must have started; 30 by default
    monkeypatch.setattr(loggers, "PATIENCE", 300.0)
    monkeypatch.chdir(tmp_path)
    options = "--epochs 2 --eval-every 2 --batch-size 20 --limit-train 40 --no-plots --log tensorboard wandb mlflow"
    console = Console(record=True, file=io.StringIO())
    began = parse_command([*options.split(), "--data", str(betons), "--out", "runs/a", "--stop-after", "1"])
    folder = train(began, console)
    train(parse_command(["--resume", str(folder.path)]), console)
    assert "logs no more" not in console.export_text()
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}

    events = EventAccumulator(str(folder.path)).Reload()
    shown = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert shown["loss/train"] == [(row["epoch"], pytest.approx(row["train_loss"])) for row in folder.read_metrics()]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert run.data.params["recipe.batch_size"] == "20"
    kept = {tag: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag)] for tag in shown}
    assert kept == {tag: [(step, pytest.approx(value)) for step, value in points] for tag, points in shown.items()}
    sent = [*(folder.path / "wandb").glob("offline-run-*")]
    assert len(sent) == 2
    assert {path.name.split("-")[-1] for path in sent} == {(folder.path / "wandb.id").read_text().strip()}
