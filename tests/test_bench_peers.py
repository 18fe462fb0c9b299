"""Ladder and peers: what works is timed in turns, what fails is a line, outside scripts are timed by their word or ended."""

import time
from dataclasses import replace

import psutil
import pytest
import torch

from bench import ladder, peers
from bench.levers import default_levers
from bench.loops import Task, ours
from bench.peers import meet, outside_scripts, run_script, stated_rates
from bench.timing import interleaved
from fastcifar.dataset import load_splits
from fastcifar.recipes import reported

CPU = torch.device("cpu")


@pytest.fixture
def task(betons):
    """One step of 16 images."""
    data = load_splits(betons, CPU, limit_train=64, limit_test=20, val_fraction=0.0, seed=0, verify=False)
    return Task("se_resnet18", replace(reported("se_resnet18").recipe, batch_size=16), data, betons, steps=1)


def test_the_ladder_times_every_rung_in_turns_and_names_those_it_lacks(task, monkeypatch):
    def broken(task, levers):
        if levers[-1] == "bf16":
            raise RuntimeError("no such\ninstruction")
        return ours(task, levers)

    monkeypatch.setattr(ladder, "ours", broken)
    made = ladder.climb(task, rounds=2, left_out={"compile"}, say=lambda line: None)
    by_name = {rung.name: rung for rung in made.rungs}
    assert next(iter(by_name)) == "eager fp32 NCHW, DataLoader"
    for name in (ladder.BASELINE_TITLE, "resident data", "channels_last", "fused kernels"):
        assert by_name[name].error is None, by_name[name]
        assert len(by_name[name].images_per_second) == 2
    assert by_name["bf16 autocast"].error == "RuntimeError: no such instruction"
    assert by_name["torch.compile"].error == "left out of this run"
    assert by_name["whole step captured"].error == "not applicable: CUDA graphs need a GPU"
    assert all(not rung.images_per_second for rung in made.rungs if rung.error)


def breaking(build, turns):
    """A loop that works for so many turns and raises then."""

    def broken(*arguments, **keywords):
        build(*arguments, **keywords)
        left = iter(range(turns))

        def turn():
            if next(left, None) is None:
                raise RuntimeError("out of\nmemory")

        return turn

    return broken


def test_a_peer_that_is_dropped_leaves_the_others_their_order():
    def calls(broken):
        called = []
        turns = {name: lambda name=name: called.append(name) for name in "abcd"}
        timings = interleaved(turns | ({"b": breaking(lambda: None, 2)()} if broken else {}), rounds=6, drop=broken)
        return [name for name in called if name != "b"], timings

    (undisturbed, _), (order, timings) = calls(broken=False), calls(broken=True)
    assert order == undisturbed
    assert {name: len(seconds) for name, seconds in timings.seconds.items()} == {"a": 6, "c": 6, "d": 6}
    assert list(timings.errors) == ["b"]
    with pytest.raises(RuntimeError, match="out of"):
        interleaved({"b": breaking(lambda: None, 2)()}, rounds=6)


def test_a_rung_or_peer_that_breaks_in_a_timed_round_is_a_line_and_the_others_have_all_rounds(task, monkeypatch):
    for module in (ladder, peers):
        monkeypatch.setattr(module, "ours", lambda task, levers: lambda: None)
        monkeypatch.setattr(module, "ordinary", breaking(lambda task, built_in=False: None, 3))  # ready, warm, one round
    monkeypatch.setattr(peers, "ffcv", lambda task: lambda: None)
    said = []
    made = ladder.climb(task, rounds=4, say=said.append)
    assert said[-1] == "ladder: eager fp32 NCHW, DataLoader: RuntimeError: out of memory"
    assert (made.rungs[0].error, made.rungs[0].images_per_second) == ("RuntimeError: out of memory", [])
    assert all(len(rung.images_per_second) == 4 for rung in made.rungs[1:] if not rung.error)
    assert any(not rung.error for rung in made.rungs)
    met = meet(task, levers=["resident"], rounds=4, scripts={}, epochs=1, peer_images=0, say=said.append)
    assert [peer.error for peer in met.entries] == [None, *["RuntimeError: out of memory"] * 2, None]
    assert [len(peer.images_per_second) for peer in met.entries] == [4, 0, 0, 4]
    assert "path with resident;" in met.entries[0].note


def test_an_outside_script_that_takes_too_long_is_ended_with_its_workers(task, tmp_path, monkeypatch):
    script, told = tmp_path / "peer.py", tmp_path / "pid"
    script.write_text(
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL)\n"
        f"open({str(told)!r}, 'w').write(str(worker.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(peers, "PATIENCE", 3.0)
    peer = run_script("mine", script, task, epochs=1, peer_images=0)
    assert peer.error is not None
    assert peer.error.startswith("not done after")
    waited = time.time() + 20
    while running(int(told.read_text())) and time.time() < waited:  # the signal is on its way
        time.sleep(0.05)
    assert not running(int(told.read_text()))


def running(pid):
    """Whether a process lives; one that has ended may stay as a zombie where nobody waits for it."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def test_peers_are_timed_beside_ours_and_one_that_crashes_is_a_line(task, tmp_path, monkeypatch):
    def no_ffcv(task):
        raise ImportError("libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(peers, "ffcv", no_ffcv)
    script = tmp_path / "peer.py"
    script.write_text('print("epoch 1"); print(\'{"images_per_second": [100, 110]}\')')
    scripts = outside_scripts((f"mine={script}",))
    met = meet(
        task, levers=default_levers(task.arch, CPU), rounds=2, scripts=scripts, epochs=3, peer_images=0, say=lambda line: None
    )
    by_name = {peer.name: peer for peer in met.entries}
    assert next(iter(by_name)) == "fastcifar"
    for name in ("fastcifar", "ordinary loop", "every built-in lever"):
        assert by_name[name].error is None
        assert len(by_name[name].images_per_second) == 2
    assert by_name["FFCV"].error == "ImportError: libopencv_core.so.406: cannot open shared object file"
    assert by_name["mine"].images_per_second == [100, 110]


def test_an_outside_script_gets_the_data_and_is_timed_by_its_word_or_the_wall(task, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import os, torch\n"
        "data = torch.load('cifar10/train.pt')\n"
        "assert data['images'].dtype == torch.uint8 and tuple(data['images'].shape) == (64, 32, 32, 3), data['images'].shape\n"
        "assert len(data['labels']) == 64 and len(data['classes']) == 10\n"
        "assert os.path.isfile(os.environ['FASTCIFAR_DATA'] + '/train.beton')\n"
        "assert os.environ['FASTCIFAR_EPOCHS'] == '3' and os.environ['FASTCIFAR_IMAGES'] == '64'\n"
        "print('done')\n"
    )
    peer = run_script("mine", script, task, epochs=3, peer_images=0)
    assert peer.error is None, peer
    assert "192 images over the wall time" in peer.note
    script.write_text("raise RuntimeError('needs eight GPUs')")
    assert run_script("mine", script, task, epochs=3, peer_images=0).error == "exit code 1: RuntimeError: needs eight GPUs"
    for line in (
        "",
        "{}",
        "[1]",
        '{"images_per_second": "x"}',
        '{"images_per_second": 0}',
        '{"images_per_second": [NaN]}',
        "12",
    ):
        assert stated_rates(line) is None, line
    assert stated_rates('{"images_per_second": 5, "accuracy": 0.9}') == [5.0]


@pytest.mark.slow
def test_ffcvs_loader_trains_beside_ours_and_leaves_the_threads_alone(task):
    before = torch.get_num_threads()
    met = meet(
        task, levers=default_levers(task.arch, CPU), rounds=2, scripts={}, epochs=1, peer_images=0, say=lambda line: None
    )
    assert [peer.error for peer in met.entries] == [None] * 4
    assert torch.get_num_threads() == before
