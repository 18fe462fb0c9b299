#!/usr/bin/env python3
"""The old name of `bench/input_pipelines.py`, which works for this release."""

import sys

from bench.input_pipelines import main
from fastcifar.errors import run_command

if __name__ == "__main__":
    print("bench/pipeline.py is now bench/input_pipelines.py; this name goes with the next release", file=sys.stderr)
    run_command(main)
