"""A dataclass's fields are described on the API page by the comments beside them, as `--help` describes them."""

import re
from typing import Any

from griffe import Class, Extension


class FieldComments(Extension):
    """Appends the comments to a dataclass's docstring as its parameters."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Griffe's hook: a class was read."""
        fields = re.findall(r"^    (\w+): .*?  # (.+)$", cls.source, re.MULTILINE)
        if cls.docstring and fields and any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(f"    {name}: {comment}" for name, comment in fields)
