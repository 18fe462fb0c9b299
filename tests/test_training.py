"""Training end to end on small data: it learns, resumes to the bit, keeps a complete folder, and refuses what is wrong."""

import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastcifar.augmentation import Augmentation
from fastcifar.beton import Manifest
from fastcifar.checkpoint import load_checkpoint
from fastcifar.command import parse_command
from fastcifar.errors import InputError, Stopped
from fastcifar.evaluate import Evaluator, Options, measure
from fastcifar.loggers import TensorBoard
from fastcifar.models import ARCHITECTURES, build_model, count_parameters
from fastcifar.recipes import RECIPES
from fastcifar.run_folder import RunFolder
from fastcifar.step import TrainStep
from fastcifar.train import count_spikes, main, train
from tests.kernel_checks import sample

CPU = torch.device("cpu")
FILES = {
    "config.json", "metrics.jsonl", "summary.json", "last.pt", "best.pt", "loss.png", "accuracy.png", "best_accuracy.png",
    "learning_rate.png", "confusion_matrix.png",
}  # fmt: skip

TIMELESS = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "learning_rates", "epoch")

# Everything a resume has to bring back besides weights and momentum.
WITH_AVERAGE = ["--ema-decay", "0.9", "--optimizer", "adamw"]
WITH_MUON = ["--average-from", "1", "--optimizer", "muon", "--vector-momentum", "0.5"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """An architecture of this file's own for what does not depend on it: report C's blocks, but narrow and few."""
    row = replace(ARCHITECTURES["light_resnet18"], widths=(4, 8, 8, 16), blocks=(1, 1, 1, 1))
    monkeypatch.setitem(ARCHITECTURES, "narrow", row)


def run(betons, out, *arguments, arch="narrow", recipe="se_resnet18"):
    """Train in this process on the small data."""
    options = ("--arch", arch, "--recipe", recipe, "--data", str(betons), "--out", str(out), "--no-plots", *arguments)
    defaults = {"--batch-size": "20", "--limit-train": "100", "--limit-test": "20"}
    chosen = [part for pair in defaults.items() if pair[0] not in arguments for part in pair]
    return train(parse_command([*options, *chosen]), Console(quiet=True))


@pytest.fixture
def finished(betons, tmp_path):
    """The folder of a run of one epoch."""
    return run(betons, tmp_path / "run", "--epochs", "1", "--limit-train", "40")


def weights(folder, name="last.pt"):
    return load_checkpoint(folder / name, CPU).model


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_its_architecture(betons, tmp_path, recipe):
    """One step of the whole recipe: the weights move, the losses are finite (`train` sees to that)."""
    arch = recipe.removesuffix("_text")
    options = ("--epochs", "1", "--limit-train", "7", "--batch-size", "4", "--limit-test", "4", "--max-parameters", "0")
    folder = run(betons, tmp_path / "run", *options, arch=arch, recipe=recipe)
    torch.manual_seed(0)
    start = dict(build_model(arch).named_parameters())
    trained = weights(folder.path)
    moving = [name for name, weight in start.items() if weight.requires_grad and name.endswith("weight")]
    assert all(not torch.equal(trained[name], start[name]) for name in moving)
    assert folder.read_metrics()[0]["train_loss"] > 0


@pytest.mark.parametrize("arch", ["se_resnet18", pytest.param("dropout_resnet24", marks=pytest.mark.slow)])
def test_networks_learn(betons, tmp_path, arch):
    options = ("--epochs", "3", "--limit-train", "80", "--mix-probability", "0", "--peak-lr", "0.01", "--eval-every", "3")
    losses = [row["train_loss"] for row in run(betons, tmp_path / "run", *options, arch=arch, recipe=arch).read_metrics()]
    assert losses[-1] < losses[0] - 0.1, losses


def test_a_run_folder_is_complete_and_says_what_it_is(betons, tmp_path, call, refused):
    command = ("--data", betons, "--out", tmp_path / "run", "--epochs", "2", "--batch-size", "20", "--limit-train", "20")
    printed = call(main, *command)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= FILES
    assert len(names - FILES) == 1  # and one file of TensorBoard events
    assert "epoch 2/2" in printed
    assert "report D" in printed
    assert "\x1b" not in printed  # plain lines where there is no terminal
    summary = RunFolder(tmp_path / "run").read_summary()
    assert summary["arch"] == "se_resnet18"
    assert summary["parameters"] == 2_818_122
    assert "most reports' habit" in summary["best_chosen_on"]
    assert sum(map(sum, summary["final"]["confusion"])) == summary["final"]["images"] == 50
    assert summary["versions"]["torch"].startswith("2.")
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["first_step_seconds"] > 0
    again = refused(main, *command)
    assert str(tmp_path / "run") in again
    assert "--resume" in again


def test_the_same_seed_gives_the_same_bits_and_another_does_not(betons, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(betons, tmp_path / name, "--epochs", "1", "--seed", seed)
    assert_equal_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(weights(tmp_path / "a")["classifier.weight"], weights(tmp_path / "c")["classifier.weight"])


def test_a_summed_loss_is_the_mean_at_a_rate_as_many_times_higher(betons, tmp_path):
    """To the bit, since the batch is a power of two."""
    options = ("--epochs", "1", "--batch-size", "16", "--weight-decay", "0", "--precision", "fp32", "--mix-probability", "0")
    mean = run(betons, tmp_path / "mean", *options, "--peak-lr", "0.16", "--final-lr", "0")
    summed = run(betons, tmp_path / "sum", *options, "--peak-lr", "0.01", "--final-lr", "0", "--loss-reduction", "sum")
    assert_equal_weights(weights(mean.path), weights(summed.path))
    losses = [[row["train_loss"] for row in folder.read_metrics()] for folder in (mean, summed)]
    assert losses[0] == losses[1]


def test_images_have_the_size_of_their_phase_and_flops_follow_it(betons, tmp_path, monkeypatch):
    seen, original = [], TrainStep.loss
    monkeypatch.setattr(TrainStep, "loss", lambda step, x, *rest: seen.append(x.shape[2:]) or original(step, x, *rest))
    options = ("--epochs", "3", "--schedule-epochs", "6", "--warmup-epochs", "0", "--sizes", "16", "40", "--size-epochs", "2")
    folder = run(betons, tmp_path / "run", *options)
    assert seen == [(16, 16)] * 5 + [(40, 40)] * 10
    rows, summary = folder.read_metrics(), folder.read_summary()
    flops = [row["flops"] for row in rows]
    assert flops[1] == flops[2] == pytest.approx(6.25 * flops[0], rel=0.01)
    assert flops[0] > 100 * 6 * 4 * 3 * 9 * 16**2  # the stem alone, forward and backward but for the images' gradient
    assert summary["flops"] == sum(flops)


@pytest.mark.slow  # the compiler's front end, which alone decides about shapes; no code is generated
def test_each_phase_is_compiled_for_its_own_shapes(betons, tmp_path, monkeypatch):
    import torch._dynamo

    compiler, graphs = torch.compile, []

    def noted(graph, inputs):
        assert all(isinstance(x, torch.Tensor) for x in inputs)  # a dynamic size would be one too
        graphs.append([tuple(x.shape[2:]) for x in inputs if x.ndim == 4 and len(x) == 20])
        return graph

    def compile_without_code(function, *, dynamic, fullgraph, options):
        return compiler(function, dynamic=dynamic, fullgraph=fullgraph, backend=noted)

    monkeypatch.setattr(torch, "compile", compile_without_code)
    torch._dynamo.reset()
    phases = ("--schedule-epochs", "4", "--warmup-epochs", "0", "--sizes", "16", "24", "40", "--size-epochs", "1", "2")
    frozen = ("--frozen", "stem.*", "--frozen-from", "3", "--precision", "fp32", "--kernels", "torch", "--epochs", "4")
    options = (*phases, *frozen, "--head-dropout", "0")
    compiled, plain = (run(betons, tmp_path / name, *options, name) for name in ("--compile", "--no-compile"))
    assert [sizes for sizes in graphs if sizes] == [[(16, 16)], [(24, 24)], [(40, 40)], [(40, 40)]]
    for name, weight in weights(plain.path).items():
        torch.testing.assert_close(weights(compiled.path)[name], weight)


def test_filters_biases_and_head_each_train_by_their_own_momentum(betons, tmp_path):
    muon = ("--optimizer", "muon", "--momentum", "0.6", "--vector-momentum", "0.85")
    folder = run(betons, tmp_path / "run", "--epochs", "1", *muon)
    groups = load_checkpoint(folder.last, CPU).optimizer["param_groups"]
    assert {(group["orthogonal"], group["momentum"]) for group in groups} == {(True, 0.6), (False, 0.85)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parameters_stay_as_they_are_and_the_others_do_not(betons, tmp_path, precision):
    frozen = ("--schedule-epochs", "2", "--warmup-epochs", "0", "--frozen", "stem.0.*", "stages.1.*", "--frozen-from", "1")
    options = ("--epochs", "2", "--precision", precision, "--clip-gradient-norm", "1", *frozen)
    before = weights(run(betons, tmp_path / "cut", *options, "--stop-after", "1").path)
    after = weights(train(parse_command(["--resume", str(tmp_path / "cut")]), Console(quiet=True)).path)
    folder = run(betons, tmp_path / "whole", *options)
    assert_equal_weights(weights(folder.path), after)
    assert folder.read_summary()["parameters"] == count_parameters(build_model("narrow"))
    parameters = [name for name, _ in build_model("narrow").named_parameters() if name.endswith("weight")]
    same = {name for name in parameters if torch.equal(before[name], after[name])}
    assert same == {name for name in parameters if name.startswith(("stem.0.", "stages.1."))}


def test_epochs_are_evaluated_by_the_views_that_the_recipe_names(betons, tmp_path):
    plain, views = ("--epochs", "1", "--precision", "fp32"), ("--eval-tta", "flip_translate", "--centre-weight", "0.5")
    folder = run(betons, tmp_path / "run", *plain, *views)
    (row,) = folder.read_metrics()
    options = Options(folder.last, data=betons, limit=20, precision="fp32", tta="flip_translate")
    assert row["eval_loss"] == measure(replace(options, centre_weight=0.5))["loss"]
    assert row["eval_loss"] != measure(options)["loss"]
    assert folder.read_summary()["eval_tta"] == "flip_translate"


@pytest.mark.parametrize("arguments", sample([WITH_AVERAGE, [], WITH_MUON], every=3, gpu=False))
def test_an_interrupted_and_resumed_run_ends_with_the_same_bits(betons, tmp_path, monkeypatch, arguments):
    options = ["--epochs", "4", *arguments]
    whole = run(betons, tmp_path / "whole", *options)

    original = RunFolder.save_epoch

    def save_epoch(self, rows, checkpoint):
        if len(rows) == 3:
            self.write_metrics(rows)  # what a kill between the two files leaves
            raise KeyboardInterrupt
        original(self, rows, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_epoch", save_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(betons, tmp_path / "cut", *options)
    assert load_checkpoint(tmp_path / "cut" / "last.pt", CPU).epoch == 2
    resumed = train(parse_command(["--resume", str(tmp_path / "cut")]), Console(quiet=True))

    before, after = (load_checkpoint(folder.last, CPU) for folder in (whole, resumed))
    assert_equal_weights(before.model, after.model)
    if before.average is not None:
        assert_equal_weights(before.average, after.average)
    assert (before.best_accuracy, before.best_epoch) == (after.best_accuracy, after.best_epoch)
    a, b = ([{key: row[key] for key in TIMELESS} for row in folder.read_metrics()] for folder in (whole, resumed))
    assert a == b
    assert resumed.read_summary()["final"] == whole.read_summary()["final"]


@pytest.mark.parametrize("recipe", ["light_resnet18", "resnet42"])
def test_a_streamed_run_ends_with_the_resident_runs_bits(betons, tmp_path, recipe):
    resident, streamed = (
        run(betons, tmp_path / name, "--epochs", "1", *extra, recipe=recipe) for name, extra in (("a", []), ("b", ["--stream"]))
    )
    assert_equal_weights(weights(resident.path), weights(streamed.path))
    assert resident.read_summary()["final"] == streamed.read_summary()["final"]


@pytest.mark.parametrize("recipe", ["dropout_resnet24", "robust_resnet64"])
def test_pytorchs_augmentation_ends_with_numbas_bits(betons, tmp_path, recipe):
    forms = {"numba": ("*", "torch", "augment", "auto"), "torch": ("torch",)}
    folders = [run(betons, tmp_path / name, "--epochs", "1", "--kernels", *form, recipe=recipe) for name, form in forms.items()]
    assert_equal_weights(*(weights(folder.path) for folder in folders))


# of 5 steps: after the last one evaluation is still to come
@pytest.mark.parametrize(("step", "number"), sample([3, 1, 5], [signal.SIGINT, signal.SIGTERM], every=6, gpu=False))
def test_a_signal_saves_inside_the_epoch_and_a_resume_ends_with_the_same_bits(betons, tmp_path, monkeypatch, step, number):
    recipe = "light_resnet18"  # dropout and stochastic depth draw from PyTorch's generators
    options = ("--epochs", "3", "--held-out", "0", "--limit-train", "104", *WITH_AVERAGE)
    whole = run(betons, tmp_path / "whole", *options, recipe=recipe)
    original = TrainStep.__call__

    def signalled(self):
        original(self)
        if self.number == step and self.average is not None and len(list(tmp_path.glob("cut/last.pt"))):
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", signalled)
        with pytest.raises(Stopped, match=f"saved in epoch 2 after step {step} of 5") as stopped:
            run(betons, tmp_path / "cut", *options, recipe=recipe)
    assert stopped.value.number == number
    checkpoint = load_checkpoint(tmp_path / "cut" / "last.pt", CPU)
    assert (checkpoint.epoch, checkpoint.within["step"]) == (1, step)
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)  # as before
    resumed = train(parse_command(["--resume", str(tmp_path / "cut")]), Console(quiet=True))
    before, after = (load_checkpoint(folder.last, CPU) for folder in (whole, resumed))
    assert_equal_weights(before.model, after.model)
    assert_equal_weights(before.average, after.average)
    a, b = ([{key: row[key] for key in TIMELESS} for row in folder.read_metrics()] for folder in (whole, resumed))
    assert a == b
    assert resumed.read_summary()["final"] == whole.read_summary()["final"]


def test_a_signal_during_evaluation_is_heeded_at_once(betons, tmp_path, monkeypatch):
    options = ("--epochs", "2")
    whole = run(betons, tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60))
        with pytest.raises(Stopped, match="saved in epoch 1 after step 5 of 5"):
            run(betons, tmp_path / "cut", *options)
    resumed = train(parse_command(["--resume", str(tmp_path / "cut")]), Console(quiet=True))
    assert_equal_weights(weights(whole.path), weights(resumed.path))
    assert resumed.read_summary()["final"] == whole.read_summary()["final"]


def test_one_process_at_a_time_and_only_while_the_folder_is_there(betons, tmp_path, monkeypatch):
    folder = run(betons, tmp_path / "run", "--epochs", "2", "--stop-after", "1")
    with folder.held(new=False), pytest.raises(InputError, match="in use: another process"):
        train(parse_command(["--resume", str(folder.path)]), Console(quiet=True))
    with folder.held(new=False), pytest.raises(InputError, match="in use: another process"):
        run(betons, folder.path, "--epochs", "1")

    def removed(self, epoch, curves):
        shutil.rmtree(folder.path)

    monkeypatch.setattr(TensorBoard, "log", removed)
    with pytest.raises(InputError, match="was removed or emptied while its run went on"):
        train(parse_command(["--resume", str(folder.path)]), Console(quiet=True))
    assert not folder.path.exists()


def test_what_a_kill_leaves_can_be_started_or_resumed(betons, tmp_path, finished):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json.abc.partial").write_bytes(b"{")  # killed while config.json was written
    run(betons, empty, "--epochs", "1", "--limit-train", "40")
    assert not list(empty.glob("*.partial"))
    assert_equal_weights(weights(empty), weights(finished.path))

    finished.last.unlink()  # killed in the first epoch, between metrics.jsonl and last.pt
    train(parse_command(["--resume", str(finished.path)]), Console(quiet=True))
    assert_equal_weights(weights(empty), weights(finished.path))

    longer = run(betons, tmp_path / "longer", "--epochs", "2", "--limit-train", "40")
    longer.last.unlink()
    with pytest.raises(InputError, match=r"last\.pt is missing, though the run has epochs"):
        train(parse_command(["--resume", str(longer.path)]), Console(quiet=True))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_can_be_skipped_and_leaves_no_trace(betons, tmp_path, monkeypatch, where):
    original = TrainStep.loss

    def poisoned(self, images, labels, partner_labels, lam):
        before.append({name: value.clone() for name, value in self.model.state_dict().items()})
        loss, hits = original(self, images, labels, partner_labels, lam)
        if len(seen) == 2:
            weight = self.model.classifier.weight
            loss = loss * math.nan if where == "loss" else loss + (weight.flatten()[0] - weight.flatten()[0].detach()).sqrt()
        seen.append(float(loss.detach()))
        return loss, hits

    seen, before = [], []
    monkeypatch.setattr(TrainStep, "loss", poisoned)
    row = run(betons, tmp_path / "run", "--epochs", "1", "--skip-nonfinite").read_metrics()[0]
    assert row["skipped_steps"] == 1
    assert_equal_weights(before[2], before[3])  # batch norm's averages included
    assert not torch.equal(before[1]["classifier.weight"], before[2]["classifier.weight"])
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    kept = [loss for at, loss in enumerate(seen) if at != 2]
    assert row["train_loss"] == pytest.approx(sum(kept) / len(kept))
    seen.clear()
    with pytest.raises(InputError, match=r"infinite|became nan"):
        run(betons, tmp_path / "stops", "--epochs", "1")


def test_the_average_follows_the_weights(betons, tmp_path):
    folder = run(betons, tmp_path / "run", "--epochs", "1", *WITH_AVERAGE)
    torch.manual_seed(0)
    start = build_model("narrow").state_dict()
    checkpoint = load_checkpoint(folder.last, CPU)
    for name in ("classifier.weight", "stem.0.weight" if "stem.0.weight" in start else next(iter(start))):
        assert not torch.equal(checkpoint.average[name], checkpoint.model[name])
        assert not torch.equal(checkpoint.average[name], start[name])


def test_mixing_is_told_how_far_training_is(betons, tmp_path, monkeypatch):
    original, told = Augmentation.plan_mixing, []

    def listen(self, **given):
        told.append(given["progress"])
        return original(self, **given)

    monkeypatch.setattr(Augmentation, "plan_mixing", listen)
    run(betons, tmp_path / "run", "--epochs", "4", "--limit-train", "40")
    assert told == [0, 0.25, 0.5, 0.75]


def test_loss_spikes_are_counted():
    assert count_spikes([1.0, 1.1, 0.9, 2.2], classes=10) == 0  # below ln 10
    assert count_spikes([1.0, 1.1, 0.9, 2.4], classes=10) == 1
    assert count_spikes([2.3, 2.31, 2.4], classes=10) == 0  # a network that has not begun to learn


def test_resume_refuses_what_would_change_the_run_and_accepts_a_finished_one(finished, tmp_path):
    folder = finished
    with pytest.raises(InputError, match=r"leave out what changes it \(epochs\)"):
        parse_command(["--resume", str(folder.path), "--epochs", "2"])
    before = folder.last.read_bytes()
    train(parse_command(["--resume", str(folder.path)]), Console(quiet=True))
    assert folder.last.read_bytes() == before
    with pytest.raises(InputError, match=r"config\.json is missing"):
        parse_command(["--resume", str(tmp_path / "nowhere")])


def test_best_is_chosen_on_held_out_images_when_asked(betons, tmp_path):
    folder = run(betons, tmp_path / "run", "--epochs", "2", "--val-fraction", "0.25")
    summary, rows = folder.read_summary(), folder.read_metrics()
    assert summary["best_chosen_on"] == "images held out from training"
    assert summary["train_images"] == 75
    assert rows[0]["eval_split"] == "held-out"
    best = max(rows, key=lambda row: (row["eval_accuracy"], -row["epoch"]))
    assert (summary["best_epoch"], summary["best_accuracy"]) == (best["epoch"], best["eval_accuracy"])
    assert load_checkpoint(folder.best, CPU).epoch == best["epoch"]


def test_stop_after_trains_the_first_epochs_of_the_whole_schedule_and_a_resume_goes_on(betons, tmp_path):
    options = {"recipe": "mish_se_resnet18"}
    whole = run(betons, tmp_path / "whole", "--epochs", "3", **options)
    part = run(betons, tmp_path / "part", "--epochs", "3", "--stop-after", "1", **options)
    summary = part.read_summary()
    assert (summary["epochs_trained"], summary["epochs"]) == (1, 3)
    assert [row["train_loss"] for row in part.read_metrics()] == [whole.read_metrics()[0]["train_loss"]]
    with pytest.raises(InputError, match=r"beyond the 3 epochs of the schedule: lower --stop-after"):
        parse_command(["--resume", str(part.path), "--stop-after", "4"])
    train(parse_command(["--resume", str(part.path), "--stop-after", "2"]), Console(quiet=True))
    assert part.read_summary()["epochs_trained"] == 2
    with pytest.raises(InputError, match=r"already has 2 epochs, more than --stop-after 1"):
        train(parse_command(["--resume", str(part.path), "--stop-after", "1"]), Console(quiet=True))
    train(parse_command(["--resume", str(part.path)]), Console(quiet=True))
    assert_equal_weights(weights(whole.path), weights(part.path))
    assert part.read_summary()["final"] == whole.read_summary()["final"]


def test_a_recipe_that_holds_images_out_is_followed(betons, tmp_path):
    folder = run(betons, tmp_path / "run", "--epochs", "1", recipe="resnet42")
    assert folder.read_summary()["train_images"] == 90
    assert folder.read_metrics()[0]["eval_split"] == "held-out"


def test_clipping_by_value_is_pytorchs(betons, tmp_path, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_value_

    def spy(parameters, value):
        parameters = list(parameters)
        clip(parameters, value)
        seen.append((value, max(float(p.grad.abs().max()) for p in parameters)))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_value_", spy)
    run(betons, tmp_path / "run", "--epochs", "1", "--clip-gradient-value", "0.001")
    assert {value for value, _ in seen} == {0.001}
    assert max(largest for _, largest in seen) == pytest.approx(0.001)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(betons, tmp_path, monkeypatch):
    saved = RunFolder.save_epoch

    def save_then_poison(self, rows, checkpoint):
        saved(self, rows, checkpoint)
        if len(rows) == 1:
            checkpoint.model["classifier.weight"].fill_(math.inf)  # the state's own tensors

    monkeypatch.setattr(RunFolder, "save_epoch", save_then_poison)
    with pytest.raises(InputError, match=r"epoch 2, step 1 of 5 .*checkpoint of epoch 1 is kept"):
        run(betons, tmp_path / "run", "--epochs", "3")
    kept = load_checkpoint(tmp_path / "run" / "last.pt", CPU)
    assert kept.epoch == 1
    assert all(tensor.isfinite().all() for tensor in kept.model.values())
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_update_that_breaks_the_network_after_the_last_loss_saves_nothing(betons, tmp_path, monkeypatch):
    options = ("--limit-train", "20", "--epochs", "1")
    with pytest.raises(InputError, match=r"the test loss became nan after epoch 1; no checkpoint was written yet"):
        run(betons, tmp_path / "huge", *options, "--peak-lr", "1e38")

    step = torch.optim.SGD.step

    def breaks(self, *arguments, **keywords):
        step(self, *arguments, **keywords)
        self.param_groups[0]["params"][0].data[0] = math.nan

    monkeypatch.setattr(torch.optim.SGD, "step", breaks)
    with pytest.raises(
        InputError, match=r"weights became infinite in the last step of epoch 1 .*no checkpoint was written yet"
    ):
        run(betons, tmp_path / "nan", *options)
    assert not list(tmp_path.rglob("*.pt"))


def test_a_resume_on_other_data_is_refused(betons, finished, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for split, source in (("train", "test"), ("test", "train")):
        shutil.copy(betons / f"{source}.beton", other / f"{split}.beton")
        replace(Manifest.load(betons / f"{source}.beton"), split=split).save(other / f"{split}.beton")
    with pytest.raises(InputError, match="trained on other files"):
        train(parse_command(["--resume", str(finished.path), "--data", str(other)]), Console(quiet=True))
    moved = shutil.copytree(betons, tmp_path / "moved")
    train(parse_command(["--resume", str(finished.path), "--data", str(moved)]), Console(quiet=True))


REFUSED = {
    "kernels triton needs a CUDA device.*--kernels auto": ("--device", "cpu", "--kernels", "triton"),
    "compile_mode must be default without --compile, got tuned": ("--no-compile", "--compile-mode", "tuned"),
    "kernels must be auto, torch or triton without --compile, got fusable": ("--no-compile", "--kernels", "fusable"),
    "batch_size 5,000.*200 images.*--batch-size": ("--batch-size", "5000"),
    "se_resnet81.*did you mean se_resnet18": ("--arch", "se_resnet81"),
    "cutout must be 0..32 pixels for images of 32, got 40": ("--cutout", "40"),
    r"train\.beton is missing.*write_beton\.py": ("--data", "nowhere"),
    "val_fraction 0.2.*holds out 0.1.*--val-fraction": ("--arch", "light_resnet18", "--val-fraction", "0.2"),
    "stop_after 201.*200 epochs.*--stop-after": ("--arch", "dropout_resnet24", "--stop-after", "201"),
    "restart_epochs must be at least.*got 0": ("--arch", "mish_se_resnet18", "--restart-epochs", "0"),
    "11,173,962 parameters.*--max-parameters 0": ("--arch", "resnet18"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_unreasonable_options_are_refused_with_one_line(betons, tmp_path, refused, message):
    data = () if "--data" in REFUSED[message] else ("--data", betons)
    assert re.search(message, refused(main, *data, "--out", tmp_path / "run", *REFUSED[message]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["best.pt", "metrics.jsonl", "last.pt"])
def test_a_disk_that_fills_up_while_saving_leaves_whole_files(finished, monkeypatch, fails):
    folder = finished
    checkpoint, rows = load_checkpoint(folder.last, CPU), folder.read_metrics()
    if fails == "last.pt":  # of the best epoch it would be a second name of best.pt
        checkpoint = replace(checkpoint, best_epoch=0)
    before = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    write = Path.write_bytes

    def fills_up(self, content):
        if self.name.startswith(fails):
            write(self, content[: len(content) // 2])
            raise OSError(28, "No space left on device", str(self))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fills_up)
        with pytest.raises(OSError, match="No space left") as raised:
            folder.save_epoch(rows, checkpoint)
    assert raised.value.filename == str(folder.path / fails)
    after = {path.name: path.read_bytes() for path in folder.path.iterdir()}
    assert after.keys() == before.keys()  # no temporary file
    assert after[fails] == before[fails]
    assert load_checkpoint(folder.last, CPU).epoch == 1


def test_recipe_fields_reach_the_run(betons, tmp_path):
    folder = run(
        betons, tmp_path / "run", "--epochs", "1", "--clip-gradient-norm", "0.5", "--no-decay-norm-and-bias",
        "--precision", "fp32", "--no-squeeze-excitation", "--limit-train", "20", arch="se_resnet18", recipe="mish_se_resnet18",
    )  # fmt: skip
    config = json.loads((folder.path / "config.json").read_text())
    assert config["recipe"]["weight_decay"] == 1e-3  # report E's
    assert config["recipe"]["batch_size"] == 20  # overridden
    assert config["arch"] == "se_resnet18"
    groups = load_checkpoint(folder.last, CPU).optimizer["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-3, 0.0]
    assert folder.read_summary()["parameters"] == 2_797_642
