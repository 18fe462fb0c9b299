#!/usr/bin/env python3
"""A benchmark's results enter; `report.html`, one file that needs no network, and `report.md` leave beside them.

python bench/report.py bench/results/cpu
"""

import re
from dataclasses import dataclass
from pathlib import Path

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from bench.figures import load_results
from bench.schema import Results
from bench.view import build_report
from bench.view.model import Report
from fastcifar.errors import run_command
from fastcifar.files import write_bytes

TEMPLATES = Path(__file__).parent / "templates"
# What Markdown would take for markup in running text. An underscore within a word is none.
MARKUP = re.compile(r"([\\`*~|]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\])\()")


@dataclass(frozen=True)
class Options:
    """Write report.html and report.md beside a results.json."""

    results: tyro.conf.Positional[Path]  # results.json, or the folder it is in


def main() -> None:
    """Read, write, name what was written."""
    options = tyro.cli(Options, prog="python bench/report.py")
    file, results = load_results(options.results)
    for path in write_reports(file, results):
        print(path)


def write_reports(path: Path, results: Results) -> list[Path]:
    """Write both reports into the folder `path`, or beside the file `path`; return their paths. Raises InputError, OSError."""
    folder = path if path.is_dir() else path.parent
    report = build_report(results)
    pages = {"report.html": render_html(report), "report.md": render_markdown(report)}
    for name, page in pages.items():
        write_bytes(folder / name, page.encode())
    return [folder / name for name in pages]


def render_html(report: Report) -> str:
    """The page, with its style and script inside."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(report=report)


def render_markdown(report: Report) -> str:
    """The same tables for README and GitHub."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # not HTML: `finalize` escapes every value, for Markdown and against HTML in it
        finalize=escape_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.md").render(report=report)


def escape_markdown(value: object) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\1", text)


if __name__ == "__main__":
    run_command(main)
