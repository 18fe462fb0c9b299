"""Feeds the readers files that are almost right, or hostile, and counts what comes of it.

python -m tests.reliability.fuzz --target all --cases 3000 --seed 0 --out fuzz.json

A case is files and a function that reads them. It may end in two ways: with the right data, or in an InputError. Anything
else is a failure: another exception, wrong data, a file that appeared, a crash, more than ten seconds, or more than twice the
memory that an honest file of the size takes. Cases run in a child process, which is started again after a crash. The same
target, seed and number give the same case again: --first NUMBER --cases 1.
"""

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fastcifar.errors import InputError

SECONDS = 10  # of computing for one case
PATIENCE = 6  # times as many seconds of the clock: other work may share the machine
MEMORY = 2 << 30  # bytes of address space that a child may take beyond its start
# An honest file of S bytes takes about three times that: itself, its bytes in the stream, the array. Twice that is allowed,
# and 32 MB for what libraries set up at their first use, and for the hundred thousand opcodes that every pickle may have.
FREE_BYTES, BYTES_PER_BYTE = 32 << 20, 6


@dataclass(frozen=True)
class Case:
    """Files to be written into an empty folder, and how they are read from there."""

    what: str  # what was done to the files, for the report
    files: dict[str, bytes]
    read: Callable[[Path], object]  # may raise InputError; AssertionError where it read wrong data


@dataclass
class Tally:
    """What came of a target's cases."""

    read: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)  # first words of each refusal -> times
    failures: list[dict[str, Any]] = field(default_factory=list)


def attempt(case: Case, tally: Tally, name: str) -> None:
    """Run one case in an empty folder, which is the working directory meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            for file, content in case.files.items():
                Path(file).parent.mkdir(parents=True, exist_ok=True)
                Path(file).write_bytes(content)
            problem = _outcome(case, Path(folder), tally)
            found = {str(path) for path in Path().rglob("*") if path.is_file()}
        finally:
            os.chdir(before)
    if found != set(case.files):
        problem = f"files appeared or vanished: {sorted(found ^ set(case.files))}"
    if problem:
        tally.failures.append({"case": name, "what": case.what, "problem": problem})


def _outcome(case: Case, folder: Path, tally: Tally) -> str | None:
    """Count how the case ends; return the problem where it may not end so."""
    start, before = time.process_time(), _reset_peak()
    try:
        with warnings.catch_warnings(action="error"):  # what a library says on stderr is not one line of ours
            case.read(folder)
        tally.read += 1
    except InputError as error:
        tally.refused += 1
        text = str(error).replace(str(folder), "")
        tally.reasons[re.sub(r"\d+", "#", text)[:70]] += 1
        if len(text) > 1000 or not " ".join(text.split()):
            return f"a message of {len(text)} characters"
    except Exception:  # whatever the reader let through
        return traceback.format_exc(limit=-4)
    seconds, used = time.process_time() - start, _peak() - before
    tally.slowest_s = max(tally.slowest_s, seconds)
    allowed = FREE_BYTES + BYTES_PER_BYTE * sum(map(len, case.files.values()))
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    return f"{used >> 20} MB instead of {allowed >> 20} MB at most" if used > allowed else None


def _reset_peak() -> int:
    """Forget the largest resident set so far; bytes that are resident now."""
    with suppress(OSError):  # not every container allows it; the peak then only grows, and less is noticed
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10  # type: ignore[index]


def run_here(target: str, seed: int, numbers: range, log: Callable[[str], None] = lambda name: None) -> Tally:
    """Run the cases in this process; `log` is told each one's number before it starts."""
    tally = Tally()
    for number in numbers:
        log(str(number))
        attempt(targets()[target](random.Random(f"{target} {seed} {number}")), tally, f"{target} {seed} {number}")
    return tally


def run_child(target: str, seed: int, numbers: range, folder: Path) -> int:
    """Run the cases in a child process, which leaves the number of its case, its last words and its tally in `folder`."""
    faulthandler.cancel_dump_traceback_later()  # pytest's: the child would wait for its thread, which a fork has not
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    try:
        with open(folder / "words", "w") as words:

            def log(number: str) -> None:
                (folder / "number").write_text(number)
                faulthandler.dump_traceback_later(PATIENCE * SECONDS, exit=True, file=words)

            (folder / "tally").write_text(json.dumps(vars(run_here(target, seed, numbers, log))))
    finally:
        os._exit(0)


def run(target: str, seed: int, first: int, cases: int) -> dict[str, Any]:
    """Run cases `first` to `first + cases - 1` in child processes of at most a thousand; returns the tally as JSON has it."""
    total, number, last = Tally(), first, first + cases
    while number < last:
        with tempfile.TemporaryDirectory() as name:
            folder, stop = Path(name), min(last, number + 1000)
            status = run_child(target, seed, range(number, stop), folder)
            if not (folder / "tally").exists():  # it died: run the cases before that one again, and go on after it
                stop = int((folder / "number").read_text())
                problem = f"the process ended with status {status}\n{(folder / 'words').read_text()}"
                total.failures.append({"case": f"{target} {seed} {stop}", "what": "", "problem": problem})
                run_child(target, seed, range(number, stop), folder)
                stop += 1
            values = json.loads((folder / "tally").read_text())
        total.read += values["read"]
        total.refused += values["refused"]
        total.slowest_s = max(total.slowest_s, values["slowest_s"])
        total.reasons.update(values["reasons"])
        total.failures += values["failures"]
        number = stop
    return {"seed": seed, "first": first, "cases": cases, **vars(total), "reasons": dict(total.reasons.most_common())}


def targets() -> dict[str, Callable[[random.Random], Case]]:
    """Name of a target -> the function that makes a case."""
    from tests.reliability import data_cases, run_cases  # here, since they import this file

    return {**data_cases.TARGETS, **run_cases.TARGETS}


def main() -> None:
    """Run and print a line per target; exit code 1 where there are failures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="all", help=f"all, or one of {', '.join(targets())}")
    parser.add_argument("--cases", type=int, default=1000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--out", type=Path, help="JSON with outcomes, reasons and failures")
    options = parser.parse_args()
    results = {}
    for target in targets() if options.target == "all" else [options.target]:
        result = results[target] = run(target, options.seed, options.first, options.cases)
        failed = len(result["failures"])
        print(f"{target}: {options.cases:,} cases, {result['read']:,} read, {result['refused']:,} refused, {failed:,} failed")
        for failure in result["failures"][:5]:
            print(f"  {failure['case']}: {failure['what']}\n{failure['problem']}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    sys.exit(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    main()
