"""The wheel: one name, no FFCV, and everything works from it far from this repository."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions

import pytest

from fastcifar.__main__ import COMMANDS, main
from tests.conftest import REPOSITORY, assert_user_error, run_cli

OFFLINE = {"PYTHONPATH": "", "UV_OFFLINE": "1"}


def test_the_command_lists_its_commands_and_corrects_wrong_ones(call, refused):
    text = call(main, "--help")
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "unknown command 'evalate': did you mean evaluate?" in refused(main, "evalate")


@pytest.mark.slow
def test_a_command_is_what_python_m_runs(tmp_path):
    assert_user_error(run_cli("-m", "fastcifar", "evaluate", "--checkpoint", tmp_path / "x.pt"), "x.pt is missing")
    for shell in ("bash", "zsh"):
        written = run_cli("-m", "fastcifar", "--tyro-print-completion", shell)
        assert written.returncode == 0, written.stderr
        assert "--augmentation-seed" in written.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=900)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_only_one_name_is_installed_and_nothing_of_it_needs_ffcv(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        needed = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        sources = "".join(archive.read(name).decode() for name in names if name.endswith(".py"))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastcifar"}
    assert {"fastcifar/py.typed", "fastcifar/kernels/mish/triton.py", "fastcifar/data_prep/write_beton.py"} <= set(names)
    assert not any(name.startswith("fastcifar/bench") for name in names)
    assert "Requires-Dist: torch==" in needed
    asked = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", needed, re.M)
    packages, modules = packages_distributions(), set(re.findall(r"^ *(?:from|import) (\w+)", sources, re.M))
    imported = {name.lower() for module in modules for name in packages.get(module, ())}
    assert set(asked) - imported == {"tensorboard"}  # which torch.utils imports


@pytest.mark.slow
def test_an_installed_wheel_writes_trains_exports_and_predicts_elsewhere(wheel, tmp_path):
    uv = shutil.which("uv", path=f"{os.environ['PATH']}:{REPOSITORY}/.uv/bin")
    if uv is None:
        pytest.skip("no uv, which `make setup` has")
    place = tmp_path / "venv"
    environment = os.environ | OFFLINE

    def run(*command):
        return subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True, timeout=900
        ).stdout

    run(uv, "venv", "--python", sys.executable, place)
    run(uv, "pip", "install", "--no-deps", "--python", place / "bin" / "python", wheel)
    packages = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    assert {path.name.split("-")[0] for path in packages.glob("[!_]*") if path.is_dir()} == {"fastcifar"}
    # The libraries of this environment, but neither FFCV nor this repository.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    for name in ("ffcv", "kernels", "data_prep", "bench"):
        (packages / f"{name}.py").write_text("raise ImportError('not installed')")

    fastcifar, out = place / "bin" / "fastcifar", tmp_path / "runs" / "small"
    run(fastcifar, "data", "--synthetic", "--train-images", 100, "--test-images", 20)
    options = "--arch speed94_half --epochs 1 --batch-size 20 --limit-train 40 --plan default"
    assert "fastcifar.train --resume" not in run(fastcifar, "train", *options.split(), "--out", out)
    assert json.loads((out / "config.json").read_text())["command"].startswith("python -m fastcifar.train --arch speed94")
    text = run(fastcifar, "export", "--checkpoint", out / "best.pt", "--to", "pt2")
    assert "best.pt2" in text
    assert (out / "best.pt2").exists()
    run(fastcifar, "predict", "--checkpoint", out / "best.pt", "--input", "data/beton/test.beton")
    assert len((tmp_path / "submission.csv").read_text().splitlines()) == 21
    code = "import fastcifar, sys; assert 'torch' not in sys.modules; print(fastcifar.load(sys.argv[1]).class_names[0])"
    assert run(place / "bin" / "python", "-c", code, out / "best.pt").strip()
