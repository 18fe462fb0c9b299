"""The site has every page and every public name, and the notebook runs on it."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

import fastcifar
from fastcifar.reporting import TrainingProgress
from tests.conftest import REPOSITORY, run_cli

NOTEBOOK = REPOSITORY / "docs" / "first_network.ipynb"


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"\S+\.(?:md|ipynb)$", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE))
    folders = ("*.md", "docs/*.md", "docs/*.ipynb", "kernels/*.md")
    assert named >= {path.relative_to(REPOSITORY).as_posix() for folder in folders for path in REPOSITORY.glob(folder)}


def test_the_api_page_has_every_public_name():
    described = re.findall(r"^::: fastcifar\.(\w+)$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(described) == fastcifar.__all__


def test_the_notebook_is_committed_without_outputs():
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


def test_training_moves_its_bar_in_a_notebook(monkeypatch):
    drawn = []
    monkeypatch.setattr(TrainingProgress, "REDRAWN_EVERY", float("inf"))
    display_handle = SimpleNamespace(update=lambda bar: drawn.append(bar.tasks[0].completed))
    for name in ("IPython", "IPython.display"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(display=lambda bar, display_id: display_handle))
    with TrainingProgress(Console(force_jupyter=True), epochs=1, done_epochs=0, images_per_epoch=100) as progress:
        progress.advance(40)
        progress.advance(60)
    assert drawn == [100]  # not before its time, but at the end


@pytest.mark.slow
def test_the_site_is_built_strictly_and_its_notebook_run(betons, tmp_path):
    pytest.importorskip("mkdocs", reason="uv sync --group docs")
    small = {"DATA": str(betons), "OPTIONS": "--epochs 1 --batch-size 100"}
    built = run_cli("-m", "mkdocs", "build", "--site-dir", tmp_path, env=small)
    assert built.returncode == 0, built.stdout + built.stderr
    notebook = (tmp_path / "docs" / "first_network.html").read_text()
    assert "epoch 1/1" in notebook
    assert "200/200" in notebook  # the bar at its end
    assert "test accuracy" in notebook
    assert len(re.findall(r'<img [^>]*src="first_network_\d', notebook)) == 4
    assert 'id="fastcifar.Loader.from_folder"' in (tmp_path / "docs" / "api.html").read_text()
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r'<(script|link|img)[^>]*(src|href)="https?:', page.read_text()), page  # nothing is fetched
