"""Builds the wheel: what stands beside fastcifar here becomes a part of it there, so that only one name is installed.

kernels -> fastcifar.kernels, data_prep -> fastcifar.data_prep; imports, and the commands that messages name, follow. bench is
left out.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PARTS = "kernels|data_prep"
REWRITTEN = (
    (re.compile(rf"^( *)from ({PARTS})\b", re.M), r"\1from fastcifar.\2"),
    (re.compile(rf"^( *)import ({PARTS})$", re.M), r"\1from fastcifar import \2"),
    (re.compile(rf'"({PARTS})\.(\w)'), r'"fastcifar.\1.\2'),  # a module's name as text
    (re.compile(rf"python -m ({PARTS})\b"), r"python -m fastcifar.\1"),
    (re.compile(r"python data_prep/write_beton\.py"), "fastcifar data"),
)


class OneNameHook(BuildHookInterface):
    """Hatchling's hook: `initialize` before a wheel is built, `finalize` after it."""

    folder: Path

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        if version == "editable":  # the tree as it stands
            return
        root = Path(self.root)
        for package in ("fastcifar", *PARTS.split("|")):
            for source in sorted([*root.glob(f"{package}/**/*.py"), *root.glob(f"{package}/py.typed")]):
                name = source.relative_to(root / "fastcifar" if package == "fastcifar" else root)
                text = source.read_text(encoding="utf-8")
                for pattern, replacement in REWRITTEN:
                    text = pattern.sub(replacement, text)
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                build_data["force_include"][str(target)] = f"fastcifar/{name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self.folder)
