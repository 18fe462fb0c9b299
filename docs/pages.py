"""The site's pages are the repository's files under their own paths; the notebook is run, and shown with what came out."""

from collections.abc import Iterator
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
SHOWN = ("*.md", "kernels/README.md", "docs/**/*.md", "docs/**/*.png", "docs/*.css", "bench/results/**/*.md")
NOTEBOOKS = "docs/*.ipynb"


class Notebook(File):
    """A notebook whose content is Markdown."""

    def is_documentation_page(self) -> bool:
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs' hook: the files of the site, those of its theme among them."""
    site = Files([file for file in files if file.src_dir != config.docs_dir])
    for path in (path for pattern in SHOWN for path in ROOT.glob(pattern)):
        site.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in ROOT.glob(NOTEBOOKS):
        for file in run(path, config):
            site.append(file)
    return site


def run(path: Path, config: MkDocsConfig) -> Iterator[File]:
    """Run a notebook in its folder; its page and the pictures on it. Raises CellExecutionError with the cell that failed."""
    name, notebook = path.relative_to(ROOT).as_posix(), nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    page, resources = MarkdownExporter().from_notebook_node(notebook, resources={"unique_key": path.stem})
    yield Notebook.generated(config, name, content=page)
    for picture, content in resources["outputs"].items():
        yield File.generated(config, f"{path.parent.name}/{picture}", content=content)
