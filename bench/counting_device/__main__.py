"""A process that has the counting device, started by bench/step_cost.py."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.baselines import one_line
from bench.counting_device.epoch import count_epoch
from bench.counting_device.step import count


def main() -> None:
    """Read {arch, batch_size, host_time, epoch, forms: {name: options}} from standard input, write {name: counts} to a file."""
    wanted = json.load(sys.stdin)
    counts: dict[str, Any] = {}
    for name, options in wanted["forms"].items():
        try:
            if wanted["epoch"]:
                counts[name] = count_epoch(wanted["arch"], options)
            else:
                counts[name] = count(wanted["arch"], wanted["batch_size"], options, host_time=wanted["host_time"])
        except Exception as error:  # whatever a compiler raises, the other forms go on
            counts[name] = {"error": one_line(error)}
    Path(sys.argv[1]).write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    main()
