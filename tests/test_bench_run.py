"""bench/run.py and ablate.py: run folders as they are, resumption, failures as lines, what is timed again and what is not."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

import bench
from bench import ablate, run
from bench.ablate import chosen_study, parse_arm
from bench.results import Ablation, Arm, Timing, environment, read_results, read_run
from bench.roofline import Rates
from bench.run import QUICK, Common, Options, current_names, measure, open_bench
from bench.studies import STUDIES
from fastcifar.command import parse_command
from fastcifar.device import choose_device
from fastcifar.errors import InputError
from fastcifar.launch import Event, Job
from fastcifar.models import ARCHITECTURES
from fastcifar.models.summary import training_flops
from fastcifar.phases import Phases
from fastcifar.run_folder import RunFolder
from fastcifar.train import train
from tests.bench_results import write_run
from tests.conftest import REPOSITORY, run_cli

CPU = choose_device("cpu")
QUIET = Console(quiet=True)
TINY = ("--limit-train", "64", "--limit-test", "20", "--batch-size", "32", "--device", "cpu", "--held-out", "0", "--no-plots",
        "--kernels", "torch", "--epochs", "2")  # fmt: skip


@pytest.fixture
def small(betons, tmp_path, monkeypatch):
    """Options of a run over two architectures; nothing is timed and the device's rates are given."""
    monkeypatch.setattr(run, "measure_rates", lambda device: Rates(1e12, 5e10))
    return replace(
        QUICK, archs=("se_resnet18", "resnet42"), data=betons, out=tmp_path / "bench", limit_train=64, limit_test=20,
        batch_size=16, epochs=2, rounds=2, steps=1, speeds=False, optimizations=False, baselines=False, device="cpu",
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Training replaced by a run folder with made-up figures; the list of names it was asked for, with how it ends."""

    def fake(job):
        trained.names.append(job.name)
        if trained.interrupt_at == len(trained.names):
            raise KeyboardInterrupt
        error = trained.errors.get(job.name, "")
        job.path.parent.mkdir(parents=True, exist_ok=True)
        job.path.with_suffix(".log").write_text(f"x\nfailed: {error}\n" if error else "x\n")
        if not error:
            write_run(job.path, job.command, [1.0] * job.command.settings.epochs, environment(CPU))
        return error

    trained = SimpleNamespace(names=[], errors={}, interrupt_at=None, on=[])

    def events(jobs):
        while jobs:
            yield Event(jobs[0], ended=True, error=fake(jobs.popleft()))

    monkeypatch.setattr(run, "opened", lambda on, *_: trained.on.append(on) or nullcontext(SimpleNamespace(events=events)))
    monkeypatch.setattr("bench.report.draw_svg", lambda name, height, draw: "<svg></svg>")
    return trained


@pytest.fixture
def loops(monkeypatch):
    """bench.baselines and bench.outside replaced; what was timed, and whose rates fail."""

    def timed(names, kind, **keywords):
        loops.calls.append((kind, list(names)))
        return [
            Timing(each, each, error="crashed") if each in loops.broken else Timing(each, each, "", [100.0, 110.0])
            for each in names
        ]

    def script(name, path, task, **keywords):
        (timing,) = timed([name], kind="script")
        return replace(timing, in_turns=False)

    loops = SimpleNamespace(calls=[], broken=set())
    fake = SimpleNamespace(
        Task=lambda arch, recipe, data, folder, steps: SimpleNamespace(arch=arch, steps=steps),
        outside_scripts=lambda named: {argument.split("=")[0]: argument for argument in named},
        architectures=lambda archs, folder, **keywords: archs,
        ladder=lambda task, left_out: ["loader", "resident"],
        baselines=lambda task: ["fastcifar", "ordinary"],
        time_loops=timed,
        run_script=script,
    )
    for module in ("baselines", "outside"):
        monkeypatch.setattr(bench, module, fake, raising=False)
    return loops


@pytest.fixture(scope="module")
def undisturbed(betons, tmp_path_factory):
    """A run folder trained in this process, without interruption."""
    return train(parse_command(["--data", str(betons), "--out", str(tmp_path_factory.mktemp("runs") / "a"), *TINY]), QUIET)


def test_a_run_folder_is_read_as_training_recorded_it(undisturbed, tmp_path):
    rows, summary = undisturbed.read_metrics(), undisturbed.read_summary()
    read = read_run(undisturbed.path.parent, "a")
    assert (read.arch, read.seed, read.batch_size, read.images_per_epoch, read.test_images) == ("se_resnet18", 0, 32, 64, 20)
    assert read.epoch_top1 == [row["eval_accuracy"] for row in rows]
    assert read.train_seconds == [row["train_seconds"] for row in rows]
    assert (read.top1, read.flip_top1) == (summary["final"]["top1"], summary["final_flip_tta_top1"])
    assert 0 <= read.compile_seconds < read.first_step_seconds
    assert read.peak_memory_bytes == summary["peak_memory_bytes"] > 50 * 2**20
    assert read.energy_joules is None  # a CPU has no counter
    broken = shutil.copytree(undisturbed.path, tmp_path / "a")
    (broken / "summary.json").write_text(json.dumps({key: value for key, value in summary.items() if key != "best_accuracy"}))
    with pytest.raises(InputError, match=r"a is not a finished run \(KeyError\('best_accuracy'\)\): delete it"):
        read_run(tmp_path, "a")


@pytest.mark.slow
def test_an_interrupted_training_goes_on_and_ends_as_an_undisturbed_one(betons, tmp_path, monkeypatch):
    def interrupt(status, line):
        if "epoch 1/6" in line:
            raise KeyboardInterrupt

    flags = ("--data", str(betons), *TINY[:-1], "6")
    undisturbed = train(parse_command([*flags, "--out", str(tmp_path / "undisturbed")]), QUIET)
    job = Job(tmp_path, "a", flags)
    with monkeypatch.context() as patch:
        patch.setattr("rich.status.Status.update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job.train(QUIET, "")
    assert 1 <= len(RunFolder(job.path).read_metrics()) < 6  # it goes on until it is killed
    assert read_run(tmp_path, "a") is None
    facts = environment(CPU)["hardware"], [json.loads((betons / f"{s}.json").read_text())["sha256"] for s in ("train", "test")]
    assert not job.finished(*facts)
    assert job.train(QUIET, "") == ""
    assert job.finished(*facts)
    rows = RunFolder(job.path).read_metrics()
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in undisturbed.read_metrics()]


@pytest.mark.parametrize(
    ("shell", "line"),
    [("echo first; echo 'error: lower --peak-lr'; exit 2", "lower --peak-lr"), ("kill -9 $$", "ended by SIGKILL (out of")],
)
def test_a_training_that_fails_or_is_killed_leaves_one_line(shell, line, betons, tmp_path, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **keywords: real(["/bin/sh", "-c", shell], **keywords))
    error = Job(tmp_path, "a", ("--data", str(betons))).train(QUIET, "")
    assert error.startswith(line)
    assert read_run(tmp_path, "a").error == error


@pytest.mark.slow
def test_finished_trainings_are_not_repeated_and_failed_ones_are(small, trained, loops, capsys):
    trained.errors["resnet42-seed0"] = "ended by SIGKILL (out of memory?)"
    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    assert measure(small, small.out, console) == ["resnet42-seed0"]
    said = console.export_text()
    assert said.index("in all about") < said.index("[1/2] se_resnet18-seed0: top-1 25.00%")
    results = read_results(small.out)[1]
    assert {run.name: run.error for run in results.runs if run.error} == trained.errors
    trained.errors.clear()
    assert measure(small, small.out, QUIET) == []
    assert measure(replace(small, seeds=(0, 1), target=42.5), small.out, QUIET) == []
    assert trained.names == ["se_resnet18-seed0", "resnet42-seed0", "resnet42-seed0", "se_resnet18-seed1", "resnet42-seed1"]
    results = read_results(small.out)[1]
    trainings = [f"{arch}-seed{seed}" for arch in ("resnet42", "se_resnet18") for seed in (0, 1)]
    assert [run.name for run in results.runs] == trainings
    assert [variant.arch for variant in results.variants] == ["resnet42", "se_resnet18"]
    assert results.settings["target_top1"] == 0.425
    assert results.data["sha256"].keys() == {"train", "test"}
    assert (small.out / "report.html").exists()
    assert (small.out / "runs.csv").exists()
    for change, words in (
        ({"epochs": 3}, "epochs: 2 before, 3 given"), ({"limit_test": 10}, "limit_test: 20 before, 10 given"),
        ({"flags": "--label-smoothing 0.2"}, "label_smoothing: 0.08 before, 0.2 given"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=rf"begun with other settings \({words}\)"):
            measure(replace(small, **change), small.out, QUIET)


def test_trainings_run_where_on_says(small, trained, loops):
    assert measure(replace(small, on="auto"), small.out, QUIET) == []
    assert measure(small, small.out, QUIET) == []  # nothing is left: no cluster is asked
    assert trained.on == ["auto"]


def test_a_run_folder_begun_elsewhere_is_refused(small, trained, loops):
    measure(small, small.out, QUIET)
    config = small.out / "runs/se_resnet18-seed0/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hardware": "another"}))
    with pytest.raises(InputError, match="hardware: another before"):
        measure(small, small.out, QUIET)
    results = small.out / "results.json"
    values = json.loads(results.read_text())
    values["environment"]["versions"]["torch"] = "1.0"
    results.write_text(json.dumps(values))
    with pytest.raises(InputError, match="other torch"):
        measure(small, small.out, QUIET)


def test_what_takes_turns_is_timed_once_and_again_for_what_failed(small, trained, loops):
    wanted = replace(small, speeds=True, optimizations=True, baselines=True)
    archs = ["resnet42", "se_resnet18"]
    first = [("architecture", archs), ("optimization step", ["loader", "resident"]), ("baseline", ["fastcifar", "ordinary"])]
    loops.broken = {"resident"}
    assert measure(wanted, small.out, QUIET) == ["optimizations: resident"]
    assert loops.calls == first
    loops.broken, loops.calls[:] = set(), []
    assert measure(wanted, small.out, QUIET) == []
    assert loops.calls == first[1:2]
    results = read_results(small.out)[1]
    assert [timing.images_per_second for timing in results.speeds.timings] == [[100.0, 110.0]] * 2
    assert results.environment["load"].keys() == {"at the start", *(f"before the {name}" for name in run.KINDS)}
    loops.calls[:] = []
    assert measure(replace(wanted, archs=("se_resnet18",)), small.out, QUIET) == []
    assert loops.calls == []  # fewer architectures lose no speed of others
    assert measure(replace(wanted, archs=("light_resnet18",), rounds=3), small.out, QUIET) == []
    assert loops.calls[0] == ("architecture", ["resnet42", "light_resnet18", "se_resnet18"])
    assert trained.names == ["se_resnet18-seed0", "resnet42-seed0", "light_resnet18-seed0"]


def test_a_failed_or_dropped_outside_script_repeats_nothing_else(small, trained, loops):
    loops.broken = {"mine"}
    wanted = replace(small, baselines=True, baseline=("mine=a.py", "other=b.py"))
    assert measure(wanted, small.out, QUIET) == ["baselines: mine"]
    loops.broken, loops.calls[:], trained.names[:] = set(), [], []
    assert measure(wanted, small.out, QUIET) == []
    assert loops.calls == [("script", ["mine"])]
    assert measure(replace(wanted, baseline=()), small.out, QUIET) == []
    assert (len(loops.calls), trained.names) == (1, [])
    timings = read_results(small.out)[1].baselines.timings
    assert [(timing.name, timing.in_turns) for timing in timings] == [
        ("fastcifar", True), ("ordinary", True), ("mine", False), ("other", False),
    ]  # fmt: skip
    alone = small.out.with_name("alone")  # without the other loops
    assert measure(replace(small, baseline=("mine=a.py",)), alone, QUIET) == []
    assert [timing.name for timing in read_results(alone)[1].baselines.timings] == ["mine"]


def test_ctrl_c_leaves_what_is_finished(small, trained, loops, capsys, call):
    trained.interrupt_at = 2
    arguments = ["--quick", "--archs", *small.archs, "--data", small.data, "--out", small.out, "--limit-train", 64,
                 "--limit-test", 20, "--batch-size", 16, "--epochs", 2, "--no-ladder", "--no-peers", "--no-speeds",
                 "--device", "cpu"]  # fmt: skip
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        call(run.main, *arguments)
    assert "--no-ladder is now --no-optimizations" in capsys.readouterr().err
    assert [each.name for each in read_results(small.out)[1].runs] == ["se_resnet18-seed0"]


@pytest.mark.parametrize(
    ("given", "current"),
    [
        (["--peer", "a=b", "--peer=c=d", "--peer-arch", "x"], ["--baseline", "a=b", "--baseline=c=d", "--baseline-arch", "x"]),
        (["--peer-images", "5", "--no-peers"], ["--no-baselines"]),
        (["--levers", "bf16", "kernels", "--quick"], ["--quick", "--flags=--precision bf16 --no-compile --kernels auto"]),
        (["--levers=compile"], ["--flags=--precision fp32 --compile --kernels torch"]),
        (["--epochs", "3"], ["--epochs", "3"]),
    ],
)  # fmt: skip
def test_the_last_releases_names_keep_working_with_a_line(given, current, capsys):
    assert current_names(given) == current
    renamed = [argument for argument in given if argument.startswith(("--peer", "--lever", "--no-p"))]
    assert len(capsys.readouterr().err.splitlines()) == len(renamed)
    with pytest.raises(InputError, match="unknown lever 'turbo'"):
        current_names(["--levers", "turbo"])


def test_the_small_version_covers_everything():
    assert set(QUICK.archs) == set(ARCHITECTURES)
    assert (QUICK.speeds, QUICK.optimizations, QUICK.baselines, Options().limit_train) == (True, True, True, 0)
    assert training_flops("se_resnet18") == 834_149_376  # as the roofline's
    gflop_of_all = sum(training_flops(arch) for arch in ARCHITECTURES) / 1e9
    images = QUICK.epochs * QUICK.limit_train + (QUICK.epochs + 2) * QUICK.limit_test / 3
    assert gflop_of_all * images / 300 < 260  # seconds at 300 GFLOP/s, what two cores train at


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"archs": ()}, "archs must be at least one"), ({"seeds": (-1,)}, "seeds must be"), ({"epochs": 0}, "epochs must be"),
        ({"rounds": 1}, "rounds must be at least 2"), ({"target": 100.0}, "target must be"), ({"batch_size": 1}, "batch_size"),
        ({"archs": ("se_resnet81",)}, "did you mean se_resnet18"), ({"batch_size": 512}, "batch_size 512 is larger"),
        ({"flags": "--epochs 5"}, "--epochs is the benchmark's to set"),
        ({"flags": "--cutuot 5"}, "unknown option --cutuot: did you mean --cutout?"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_trained(changes, message, small, trained, loops):
    with pytest.raises(InputError, match=message.replace("?", r"\?")) as error:
        measure(replace(small, **changes), small.out, QUIET)
    assert "\n" not in str(error.value)
    assert trained.names == []


@pytest.mark.parametrize(
    ("text", "name", "flags"),
    [
        ("full:", "full", ""),
        ("no_se: --no-squeeze-excitation", "no_se", "--no-squeeze-excitation"),
        ("a:--flag x:y=1", "a", "--flag x:y=1"),
        ("full=", "full", ""),
        ("x=squeeze_excitation=false,cutout=0,milestones=[3,5],mixup_alpha_end=null", "x",
         "--no-squeeze-excitation --cutout 0 --milestones 3 5 --mixup-alpha-end None"),
    ],
)  # fmt: skip
def test_an_arm_is_a_name_and_flags(text, name, flags):
    assert parse_arm(text) == Arm(name, flags)


@pytest.mark.slow  # a hundred command lines are parsed
def what_trains(command):
    """Its architecture and settings, the phases as they fall on its epochs."""
    recipe = command.settings
    return command.arch, str(replace(recipe, phases=Phases())), str([recipe.phase(epoch) for epoch in range(recipe.epochs)])


def test_every_study_is_a_list_of_commands_that_train_something_else(betons):
    for name, study in STUDIES.items():
        options = ablate.Options(study=name, data=betons, device="cpu")
        commands = [ablate.trainings_of(options, betons, study, arm, CPU)[0].command for arm in study.arms]
        assert len({what_trains(command) for command in commands}) == len(commands)
        assert len({ablate.file_name(arm.name) for arm in study.arms}) == len(study.arms)
        if not study.flags:
            assert all(command.settings.epochs == options.epochs for command in commands)
    arm = Arm("other recipe", "--recipe light_resnet18 --arch se_resnet18")
    command = ablate.trainings_of(options, betons, STUDIES["report_d"], arm, CPU)[0].command
    assert (command.arch, command.recipe_name) == ("se_resnet18", "light_resnet18")


@pytest.mark.slow
def test_images_that_grow_do_so_after_the_epochs_that_their_arms_name(betons):
    options, study = ablate.Options(study="speed_half", data=betons, device="cpu"), STUDIES["speed_half"]
    growing = [arm for arm in study.arms if " px for " in arm.name]
    assert len(growing) > 10
    for arm in growing:
        recipe = ablate.trainings_of(options, betons, study, arm, CPU)[0].command.settings
        pixels, epochs = (list(map(int, re.findall(r"\d+", part))) for part in arm.name.split(" px for "))
        if " of " in arm.name:
            pixels, epochs = [*pixels, 32], [epochs[0], epochs[1] - epochs[0]]  # the rest are as they are
        wanted = [size for size, count in zip(pixels, epochs, strict=True) for _ in range(count)]
        assert [recipe.phase(epoch).size for epoch in range(recipe.epochs)] == wanted, arm


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either --study"), ({"study": "report_d", "arms": ("a:",)}, "give either --study"),
        ({"arms": ("a b:", "a_b:")}, "two of the same name"),
        *(({"arms": (text,)}, "--arms takes 'NAME: FLAGS'") for text in ("full", "=cutout=0", ": --cutout 0", "x=cutout")),
    ],
)  # fmt: skip
def test_a_study_or_arms_are_needed_and_arms_have_names_of_their_own(given, message):
    with pytest.raises(InputError, match=message):
        chosen_study(ablate.Options(**given))


def test_an_ablation_goes_on_and_joins_the_results_of_its_folder(small, trained, loops, tmp_path):
    measure(small, small.out, QUIET)
    arms = [Arm("full"), Arm("no se", "--no-squeeze-excitation", "worse")]
    study = Ablation("two", "two arms", "se_resnet18", arms=arms)
    options = ablate.Options(
        arms=("x:",), data=small.data, epochs=2, seeds=(0, 1), limit_train=64, limit_test=20, batch_size=16, device="cpu"
    )
    trained.names.clear()
    trained.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(options, study, small.out, QUIET)
    trained.interrupt_at = None
    assert ablate.ablate(options, study, small.out, QUIET) == []
    names = [f"two/{arm}-seed{seed}" for arm in ("full", "no_se") for seed in (0, 1)]
    assert trained.names == [*names[:3], *names[2:]]
    results = read_results(small.out)[1]
    in_order = ["resnet42-seed0", "se_resnet18-seed0", *sorted(names, key=lambda name: (name[-1], name))]
    assert [run.name for run in results.runs] == in_order
    (ablation,) = results.ablations
    assert (ablation.title, ablation.seeds) == ("two arms", [0, 1])
    assert (ablation.arms[1].runs, ablation.arms[1].claim) == (names[2:], "worse")
    assert "two arms" in (small.out / "report.md").read_text()
    trained.names.clear()
    assert ablate.ablate(replace(options, seeds=(1, 2), arms_only="^n"), study, small.out, QUIET) == []
    assert trained.names == ["two/no_se-seed2"]
    (ablation,) = read_results(small.out)[1].ablations
    assert ablation.seeds == [0, 1, 2]
    assert ablation.arms[0].runs == ["two/full-seed0", "two/full-seed1", "two/full-seed2"]  # the last is not there
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- two -->\nold\n<!-- /two -->\nafter\n")
    for _ in range(2):  # the second time in place of the first
        ablate.write_table(page, "two", small.out)
        text = page.read_text()
        assert text.startswith("before\n<!-- two -->\n")
        assert text.endswith("<!-- /two -->\nafter\n")
        assert text.count("| no se --no-squeeze-excitation | 25.00 ± 0.00 |") == 1
    page.write_text("")
    with pytest.raises(InputError, match="has no lines <!-- two --> and"):
        ablate.write_table(page, "two", small.out)
    with pytest.raises(InputError, match="no finished training of three"):
        ablate.write_table(page, "three", small.out)
    with pytest.raises(InputError, match="arms_only 'x' finds none of full, no se"):
        ablate.ablate(replace(options, arms_only="x"), study, small.out, QUIET)
    with pytest.raises(InputError, match="arms_only must be a regular expression"):
        replace(options, arms_only="(")
    changed = replace(study, arms=[arms[0], Arm("no se", "--cutout 0")])
    with pytest.raises(InputError, match="squeeze_excitation: False before, True given"):
        ablate.ablate(options, changed, small.out, QUIET)


def test_a_broken_run_folder_is_left_out_with_a_line(small, trained, loops):
    measure(small, small.out, QUIET)
    (small.out / "runs/resnet42-seed0/metrics.jsonl").write_text("{")
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    bench_ = open_bench(Common(data=small.data, limit_train=64, limit_test=20, device="cpu"), small.out, [], {}, console)
    bench_.save()
    assert [run.name for run in bench_.results.runs] == ["se_resnet18-seed0"]
    (said,) = console.export_text().splitlines()
    assert "left out" in said
    assert "line 1 is not an epoch's metrics" in said


@pytest.mark.slow  # four processes one after the other
def test_killed_in_the_middle_nothing_is_left_running_and_the_same_command_goes_on(betons, tmp_path):
    out = tmp_path / "bench"
    arguments = [
        "bench/run.py", "--quick", "--data", betons, "--out", out, "--archs", "se_resnet18", "--epochs", "6",
        "--limit-train", "64", "--limit-test", "20", "--batch-size", "32", "--device", "cpu",
        "--no-speeds", "--no-optimizations", "--no-baselines",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    waited = time.time() + 900
    while not (out / "runs/se_resnet18-seed0/last.pt").exists() and process.poll() is None and time.time() < waited:
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert children
    assert not psutil.wait_procs(children, timeout=60)[1]
    again = run_cli(*arguments)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "[1/1] se_resnet18-seed0" in again.stdout
    assert len(read_results(out)[1].runs[0].train_seconds) == 6
