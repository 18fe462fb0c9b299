"""The ladder, the peers and the ablations enter; bars with intervals, gains and tests leave."""

from collections.abc import Sequence

from bench.figures import broke, in_turns, worked
from bench.intervals import (
    MIN_ROUNDS,
    Change,
    Difference,
    Interval,
    Mean,
    change_apart,
    change_in_turns,
    describe_mean,
    describe_median,
    holm,
    paired,
)
from bench.schema import Ablation, Ladder, Peer, Peers, Rung
from bench.view.model import Bar, Bars, Value, Whisker
from bench.view.wording import (
    NONE,
    between,
    count,
    factor,
    factor_detail,
    over_seeds,
    points,
    probability,
    seeds_detail,
    significant,
    verdict,
)

LEVEL = 0.05  # of a claimed difference, after Holm's correction


def ladder_bars(ladder: Ladder) -> Bars | None:
    """Each rung against the one before it that worked, and against the first."""
    measured = [rung for rung in ladder.rungs if worked(rung)]
    if not measured:
        return None
    longest = _longest(measured)
    bars, before = [], None
    for rung in ladder.rungs:
        if rung not in measured:
            bars.append(_failed(rung))
            continue
        values = [_rate(rung), Value(NONE), Value(NONE)]
        if before is not None:
            values[1:] = [_gain(rung, before), _gain(rung, measured[0])]
        bars.append(Bar(rung.name, rung.note, _reach(rung, longest), values))
        before = rung
    rounds = len(measured[0].images_per_second)
    intro = (
        f"Training of {ladder.arch}, batch {ladder.batch_size:,}: each rung adds one lever to all those above it. "
        f"All rungs took turns in one process, {count(rounds, 'round')} in an order drawn anew; a gain is the median over "
        "rounds of the ratio within a round."
    )
    columns = ["Images/s", "Against the rung above", "Against the first"]
    return Bars("ladder", "The ladder", intro, "Rung", columns, bars, notes=_round_notes(rounds))


def peer_bars(peers: Peers) -> Bars | None:
    """Ours, the first entry, against each other way to train the same model."""
    measured = [peer for peer in peers.entries if worked(peer)]
    if not measured:
        return None
    ours, longest = peers.entries[0], _longest(measured)
    bars = []
    for peer in peers.entries:
        if peer not in measured:
            bars.append(_failed(peer))
            continue
        against = _change(peer_change(ours, peer)) if peer is not ours and ours in measured else Value(NONE)
        if not in_turns(ours, peer) and ours in measured:
            against = Value(against.text, f"{against.detail}, timed apart", against.sort)
        bars.append(Bar(peer.name, peer.note, _reach(peer, longest), [_rate(peer), against]))
    rounds = len(measured[0].images_per_second)
    intro = (
        f"Whole training loops of {peers.arch}, batch {peers.batch_size:,}, on the same data and device, in turns, "
        f"{count(rounds, 'round')}. The ratio is ours over the peer's within a round, its median over rounds."
    )
    columns, notes = ["Images/s", f"{ours.name} against it"], _round_notes(rounds)
    if any(not in_turns(measured[0], peer) for peer in measured):
        notes.append(
            "Timed apart: in a process of its own, not in turns; the ratio is of geometric means, its interval Welch's."
        )
    return Bars("peers", "Beside other ways to train it", intro, "Training loop", columns, bars, notes=notes)


def peer_change(ours: Peer, peer: Peer) -> Change:
    """How many times as fast ours is: by rounds where both took turns."""
    compare = change_in_turns if in_turns(ours, peer) else change_apart
    return compare(ours.images_per_second, peer.images_per_second)


def ablation_bars(ablation: Ablation, anchor: str) -> Bars | None:
    """Accuracy of each arm over seeds, and its paired difference from the first arm with Holm-corrected p values."""
    if not any(top1 is not None for arm in ablation.arms for top1 in arm.top1):
        return None
    full = ablation.arms[0]
    differences = [None, *(_difference(arm.top1, full.top1) for arm in ablation.arms[1:])]
    corrected = holm([difference.p if difference else None for difference in differences])
    reach = _reach_of(differences)
    claims = any(arm.claim for arm in ablation.arms)
    bars = []
    for arm, difference, p in zip(ablation.arms, differences, corrected, strict=True):
        done = [top1 for top1 in arm.top1 if top1 is not None]
        note = ", ".join(f"{name}={value}" for name, value in arm.overrides.items())
        if not done:
            bars.append(Bar(arm.name, note, None, [], error="no run finished", failed=True))
            continue
        mean = describe_mean(done)
        interval = mean.interval
        bar = Whisker(mean.mean, *(_clip(interval) if interval else ()))
        values = [Value(over_seeds(mean), _arm_detail(mean, len(ablation.seeds)), mean.mean), _tested(difference, p)]
        if claims:
            values.append(Value(arm.claim or NONE))
        bars.append(Bar(arm.name, note, bar, values, _delta(difference, reach)))
    largest = max(bar.bar.centre for bar in bars if bar.bar)
    bars = [_scaled(bar, min(1.0, 1.25 * largest)) for bar in bars]
    intro = (
        f"{ablation.arch}, {count(ablation.epochs, 'epoch')} of {ablation.images_per_epoch:,} images, "
        f"{count(len(ablation.seeds), 'seed')}; test accuracy after the last epoch, mean ± standard deviation, in brackets "
        f"95 % t intervals. Every other arm is compared with {full.name}, seed by seed (paired t test)."
    )
    notes = [
        "p values are Holm's, corrected for the number of comparisons; a difference is called shown below 0.05. "
        "Its interval is the uncorrected 95 % one."
        if any(p is not None for p in corrected)
        else "Too few seeds for intervals and tests: differences are those of single runs."
    ]
    if any(abs(bound) > reach for bound in _ends(differences)):
        notes.append("Intervals wider than the axis are drawn up to its ends; their figures stand beside them.")
    ends = (f"{points(-reach)}", f"{points(reach)} points") if reach else ("", "")
    columns = ["Top-1, %", f"Against {full.name}, points", *(["The report's"] if claims else [])]
    title, delta = f"Ablation – {ablation.name}", "Difference" if reach else ""
    return Bars(anchor, title, intro, "Configuration", columns, bars, delta, 0.5, ends, notes)


def _arm_detail(mean: Mean, seeds: int) -> str:
    """Its interval, and the number of seeds where some failed."""
    return seeds_detail(mean) + (f", {mean.n} of {seeds} seeds" if 1 < mean.n < seeds else "")


def _rate(entry: Rung | Peer) -> Value:
    rate = describe_median(entry.images_per_second)
    return Value(significant(rate.median), between(rate.interval, significant) if rate.interval else "", rate.median)


def _gain(rung: Rung, other: Rung) -> Value:
    return _change(change_in_turns(rung.images_per_second, other.images_per_second))


def _change(change: Change) -> Value:
    words = f" {verdict(change)}" if change.interval else ""
    return Value(factor(change), factor_detail(change) + words, change.ratio)


def _longest(entries: Sequence[Rung | Peer]) -> float:
    """The right end of the axis, images per second: the highest median or end of its interval."""
    rates = [describe_median(entry.images_per_second) for entry in entries]
    return max(rate.interval.high if rate.interval else rate.median for rate in rates)


def _reach(entry: Rung | Peer, longest: float) -> Whisker:
    rate = describe_median(entry.images_per_second)
    ends = [bound / longest for bound in rate.interval] if rate.interval else []
    return Whisker(rate.median / longest, *ends)


def _failed(entry: Rung | Peer) -> Bar:
    error = f"failed: {entry.error}" if broke(entry) else entry.error or "not measured"
    return Bar(entry.name, entry.note, None, [], error=error, failed=broke(entry))


def _round_notes(rounds: int) -> list[str]:
    if rounds < MIN_ROUNDS:
        return [f"{count(rounds, 'round')}: below {MIN_ROUNDS} no 95 % interval of a median exists, so none is shown."]
    return ["In brackets 95 % bootstrap intervals over rounds; a gain is called faster or slower when its interval excludes 1."]


def _difference(top1: list[float | None], full: list[float | None]) -> Difference | None:
    pairs = [(a, b) for a, b in zip(top1, full, strict=True) if a is not None and b is not None]
    return paired([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None


def _tested(difference: Difference | None, p: float | None) -> Value:
    if difference is None:
        return Value(NONE)
    if difference.interval is None or p is None:
        why = "one pair: no interval" if difference.n == 1 else f"{difference.n} equal differences: no interval"
        return Value(points(difference.mean), why, difference.mean)
    words = (
        ("▲\N{NO-BREAK SPACE}better" if difference.mean > 0 else "▼\N{NO-BREAK SPACE}worse")
        if p < LEVEL
        else "no difference shown"
    )
    detail = f"{between(difference.interval, points)}, {count(difference.n, 'pair')}, {probability(p)}, {words}"
    return Value(points(difference.mean), detail, difference.mean)


def _reach_of(differences: Sequence[Difference | None]) -> float:
    """Half the width of the differences' axis: holds every mean, and every interval that is not absurdly wide."""
    means = [abs(difference.mean) for difference in differences if difference]
    return 1.1 * max([*(min(abs(end), 4 * max(means)) for end in _ends(differences)), *means], default=0.0)


def _ends(differences: Sequence[Difference | None]) -> list[float]:
    return [bound for difference in differences if difference and difference.interval for bound in difference.interval]


def _delta(difference: Difference | None, reach: float) -> Whisker | None:
    if difference is None or not reach:
        return None
    ends = [min(max(0.5 + bound / (2 * reach), 0.0), 1.0) for bound in difference.interval] if difference.interval else []
    return Whisker(0.5 + difference.mean / (2 * reach), *ends)


def _clip(interval: Interval) -> tuple[float, float]:
    return max(interval.low, 0.0), min(interval.high, 1.0)


def _scaled(bar: Bar, full: float) -> Bar:
    if bar.bar is None:
        return bar
    ends = [min(bound / full, 1.0) for bound in (bar.bar.low, bar.bar.high) if bound is not None]
    return Bar(bar.label, bar.note, Whisker(bar.bar.centre / full, *ends), bar.values, bar.delta, bar.error)
