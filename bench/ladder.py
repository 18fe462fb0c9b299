"""An architecture and data enter; the levers of training speed, one added to the other and timed in turns, leave as a ladder.

Every rung trains the same model by the same recipe in the same process, a few steps a turn, in an order drawn anew each round,
so that the gain of a lever is a ratio within rounds. A lever that this device lacks, or that a rung fails with, is listed with
its reason and the rungs above it go on without it.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from bench.levers import BASELINE, LEVERS, why_not
from bench.loops import Task, ordinary, ours
from bench.schema import Ladder, Rung
from bench.timing import interleaved

BASELINE_TITLE = "eager fp32 NCHW, DataLoader"
Say = Callable[[str], None]
WARMUP = 1  # untimed rounds, after the first call that compiles


def climb(task: Task, *, rounds: int, left_out: Collection[str] = (), say: Say = print) -> Ladder:
    """Time the ladder. left_out: levers to do without, though the device has them. say: takes a line a rung."""
    rungs: dict[str, Rung] = {}
    turns: dict[str, Callable[[], object]] = {}
    held: list[str] = []
    for name in (BASELINE, *LEVERS):
        title, what = (LEVERS[name].title, LEVERS[name].what) if name in LEVERS else (BASELINE_TITLE, "2 workers")
        reason = why_not(name, task.device) if name in LEVERS else ""
        if reason or name in left_out:
            rungs[name] = Rung(title, note=what, error=f"not applicable: {reason}" if reason else "left out of this run")
            continue
        levers = held if name == BASELINE else [*held, name]
        try:
            turn = ordinary(task) if name == BASELINE else ours(task, levers)
            turn()  # compiles, starts workers; and shows whether it works at all
        except Exception as error:  # whatever a compiler or a device raises, the other rungs go on
            rungs[name] = Rung(title, note=what, error=one_line(error))
        else:
            rungs[name], turns[name], held = Rung(title, note=what), turn, levers
        say(f"ladder: {title}: {rungs[name].error or 'ready'}")
    timings = interleaved(turns, rounds=rounds, warmup=WARMUP, drop=True)
    for name, seconds in timings.seconds.items():
        rungs[name] = replace(rungs[name], images_per_second=[task.images / one for one in seconds])
    for name, raised in timings.errors.items():
        rungs[name] = replace(rungs[name], error=one_line(raised))
        say(f"ladder: {rungs[name].name}: {rungs[name].error}")
    return Ladder(task.arch, task.recipe.batch_size, list(rungs.values()))


def one_line(error: BaseException) -> str:
    """An exception as one short line: its kind and its first words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
