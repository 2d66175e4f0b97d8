"""What a run prints: a line per case as it comes, then means and minima, and why a peer did not take part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import goals
from .case import Case
from .compare import Change, Comparison
from .memory import Peak
from .results import OURS, CaseResult, Run, summarize
from .table import Row


def console() -> Console:
    """Lines as long as they come where nobody looks, such as in a log."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=160)


def milliseconds(seconds: float | None, spread: float | None = None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:.4g}" + ("" if spread is None else f" ±{100 * spread:.0f}%")


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f}%"


class Lines:
    """The table of cases, printed line by line while the run goes on."""

    def __init__(self, cases: Iterable[Case], out: Console) -> None:
        self.out = out
        self.width = max((len(str(case)) for case in cases), default=4)

    def _line(self, name: str, theirs: str, ours: str, ratio: str, best: str, peak: str) -> str:
        return f"{name:<{self.width}}  {theirs:>12}  {ours:>12}  {ratio:>8}  {best:<20} {peak:>7}"

    def head(self) -> None:
        titles = ("ms torch", f"ms {OURS}", "torch/us", "best peer/us", "of peak")
        self.out.print(f"[bold]{self._line('case', *titles)}[/]", soft_wrap=True)

    def add(self, result: CaseResult) -> None:
        name = str(result.case)
        torch, best = result.torch(), result.best()
        cells = [_time(result, torch), _time(result, OURS), times(result.ratio(torch))]
        cells += [f"{times(result.ratio(best))} {best or ''}".strip(), percent(result.of_peak())]
        line = self._line(name, *cells)
        packed = result.packed_over_padded()
        line += f"  packed/padded {packed:.2f}" if packed else ""
        frozen, rival = result.median("frozen"), result.median(best or "")
        line += f"  frozen {times(rival / frozen)}" if frozen and rival else ""
        line += f"  {_rates(result)}" if result.case.device == "cuda" else ""
        line += f"  ran on {result.backend}" if result.backend not in ("cpu", "") else ""
        self.out.print(escape(line), soft_wrap=True)
        for peer, reason in result.wrong.items():
            self.out.print(f"[red]  WRONG {peer}, no speed:[/] {escape(reason)}", soft_wrap=True)


def _rates(result: CaseResult) -> str:
    """Operations of the products per second, of everyone who got a time."""
    rates = ((name, result.median(name)) for name in result.peers)
    return "TFLOP/s: " + ", ".join(f"{name} {result.operations / t / 1e12:.3g}" for name, t in rates if t)


def _time(result: CaseResult, peer: str | None) -> str:
    found = result.peers.get(peer or "")
    return milliseconds(found.median, found.spread) if found else ""


def header(run: Run, out: Console) -> None:
    versions, git = run.about["versions"], run.about["git"]
    names = ("fusedseq", "torch", "onnxruntime", "python")
    out.print(
        f"{run.about['machine']['cpu']}, {run.about['isa']['in_use'] or 'no compiled core'}, "
        f"{run.about['threads']['torch']} threads; "
        + ", ".join(f"{name} {versions[name] or 'missing'}" for name in names)
        + (f"; revision {git['revision'][:10]}{' with changes' if git['changed'] else ''}" if git else ""),
        soft_wrap=True,
    )
    for name, value in run.about["environment"].items():
        out.print(f"  {name}={escape(value)}", soft_wrap=True)


def ceilings(threads: str, values: dict[str, float], out: Console) -> None:
    out.print(
        f"ceilings, {threads} thread{'' if threads == '1' else 's'}: "
        f"{values['fma'] / 1e9:.0f} GFLOP/s multiply-adds on registers, {values['copy'] / 1e9:.0f} GB/s copy, "
        f"{values['read'] / 1e9:.0f} GB/s read from L2",
        soft_wrap=True,
    )


def summary(results: Sequence[CaseResult], out: Console) -> None:
    rows = summarize(results)
    if not rows:
        return
    table = Table(title="how many times faster than torch, and than the best peer", title_justify="left")
    for name in ("family", "mode"):
        table.add_column(name)
    # What all rows have in common is not repeated in each.
    kinds = [name for name in ("dtype", "device") if len({getattr(row, name) for row in rows}) > 1]
    for name in kinds:
        table.add_column(name)
    for name in ("cases", "mean", "least", "best peer: mean", "least"):
        table.add_column(name, justify="right")
    for row in rows:
        values = (row.torch_mean, row.torch_least, row.best_mean, row.best_least)
        kind = [getattr(row, name) for name in kinds]
        table.add_row(row.family, row.mode, *kind, str(row.cases), *(f"{value:.2f}" for value in values))
    out.print(table)
    out.print("Means are geometric; above 1 fusedseq is faster.")


def goal_rows(results: Sequence[CaseResult], out: Console) -> None:
    """A line for each set with a goal, and one for each case in which a peer is faster."""
    rows = goals.rows(results)
    if not rows:
        return
    out.print()
    width = max(len(row.about) for row in rows)
    out.print("[bold]how many times faster than the best peer: geometric mean (least), goal[/]")
    out.print(f"[bold]{'set':<17}  {'':<{width}}  {'forward':<31}  forward + backward[/]", soft_wrap=True)
    for row in rows:
        halves = [f"{_half(row, mode):<31}" for mode in ("inference", "training")]
        line = f"{row.name:<17}  {row.about:<{width}}  {'  '.join(halves)}".rstrip()
        out.print(escape(line), soft_wrap=True)
    for result, best, ratio in goals.slower(results):
        mine, theirs = milliseconds(result.median(OURS)), milliseconds(result.median(best))
        out.print(
            f"[red]slower than {best}:[/] {result.case}: {ratio:.2f}x ({mine} ms, {theirs} ms)", soft_wrap=True
        )  # fmt: skip


def _half(row: goals.GoalRow, mode: str) -> str:
    half = row.halves.get(mode)
    if half is None:
        return ""
    unit = f" {row.unit}" if row.unit else ""
    text = f"{half.mean:.2f} ({half.least:.2f}){unit}"
    if half.goal is None:
        return text
    return f"{text}, >= {half.goal:g}: {'met' if half.met else 'missed'}"


def refusals(results: Sequence[CaseResult], out: Console) -> None:
    counts: dict[tuple[str, str], int] = {}
    for result in results:
        for name, peer in result.peers.items():
            if peer.status == "refused":
                counts[name, peer.reason or ""] = counts.get((name, peer.reason or ""), 0) + 1
    if counts:
        out.print("\npeers that did not take a case:")
    for (name, reason), count in counts.items():
        out.print(f"  {name}, {count} case{'' if count == 1 else 's'}: {escape(reason)}", soft_wrap=True)


def wrong(results: Sequence[CaseResult], out: Console) -> int:
    """Names every peer that failed the gate; how many."""
    found = [(result.case, peer) for result in results for peer in result.wrong]
    if found:
        out.print(f"\n[red]{len(found)} wrong result{'' if len(found) == 1 else 's'}:[/]")
    for case, peer in found:
        out.print(f"  {case}: {peer}", soft_wrap=True)
    return len(found)


def listing(cases: dict[Case, list[str]], out: Console) -> None:
    width = max((len(str(case)) for case in cases), default=4)
    for case, sets in cases.items():
        note = "  (large: meant for a GPU)" if case.large and case.device == "cpu" else ""
        out.print(f"{case!s:<{width}}  {' '.join(sets)}{note}", soft_wrap=True)


def memory_rows(found: Sequence[Peak], out: Console) -> None:
    """A line for each case, a column for each peer."""
    peers = list(dict.fromkeys(one.peer for one in found))
    table = Table(title="peak memory of a call beyond its inputs, MB (10^6 bytes)", title_justify="left")
    table.add_column("case")
    for name in peers:
        table.add_column(name, justify="right")
    for case in dict.fromkeys(one.case for one in found):
        of = {one.peer: one.bytes for one in found if one.case == case}
        cells = ["" if (size := of.get(name)) is None else f"{size / 1e6:,.1f}" for name in peers]
        table.add_row(str(case), *cells)
    out.print(table)
    reasons = {(one.peer, one.reason): None for one in found if one.reason}
    for name, reason in reasons:
        out.print(f"  {name}: {escape(reason or '')}", soft_wrap=True)


def sets(known: dict[str, Any], out: Console) -> None:
    for name, one in known.items():
        out.print(f"{name:<20} {len(list(one.make())):>4} cases  {one.about}", soft_wrap=True)


class ChangeLines:
    """The table of a comparison, line by line."""

    def __init__(self, cases: Iterable[Case], out: Console) -> None:
        self.out = out
        self.width = max((len(str(case)) for case in cases), default=4)

    def head(self) -> None:
        self.out.print(
            f"[bold]{'case':<{self.width}}  {'ms A':>9}  {'ms B':>9}  {'B faster':>9}  noise[/]", soft_wrap=True
        )

    def add(self, change: Change) -> None:
        times = f"{milliseconds(change.a):>9}  {milliseconds(change.b):>9}"
        colour = {"faster": "green", "slower": "red", "": "none"}[change.flag]
        ratio = f"[{colour}]{change.ratio:>8.3f}x  ±{percent(change.noise)} {change.flag}".rstrip()
        self.out.print(f"{change.case!s:<{self.width}}  {times}  {ratio}[/]", soft_wrap=True)


def comparison(found: Comparison, out: Console) -> None:
    reasons: dict[str, list[Case]] = {}
    for case, why in found.apart:
        reasons.setdefault(why, []).append(case)
    for why, cases in reasons.items():
        out.print(f"not compared, {escape(why)}: {_some(cases)}", soft_wrap=True)
    if found.changes:
        table = Table(title="how many times faster B is", title_justify="left")
        for name in ("family", "mode"):
            table.add_column(name)
        for name in ("cases", "mean"):
            table.add_column(name, justify="right")
        for (family, mode), (count, mean) in found.means().items():
            table.add_row(family, mode, str(count), f"{mean:.3f}")
        out.print(table)
        out.print("Means are geometric.")
    flags = [change.flag for change in found.changes]
    out.print(
        f"{flags.count('faster')} faster, {flags.count('slower')} slower, {flags.count('')} unchanged within noise",
        soft_wrap=True,
    )


def _some(cases: Sequence[Case], most: int = 4) -> str:
    more = f" and {len(cases) - most} more" if len(cases) > most else ""
    return ", ".join(map(str, cases[:most])) + more


def differences(a: Run, b: Run, out: Console) -> None:
    """What the two results do not have in common besides fusedseq."""
    for name, of_a, of_b in (
        ("machine", a.about["machine"]["cpu"], b.about["machine"]["cpu"]),
        ("instruction set", a.about["isa"]["in_use"], b.about["isa"]["in_use"]),
        ("torch", a.about["versions"]["torch"], b.about["versions"]["torch"]),
        ("environment", a.about["environment"], b.about["environment"]),
    ):
        if of_a != of_b:
            out.print(f"A and B differ in {name}: {escape(str(of_a))} and {escape(str(of_b))}", soft_wrap=True)


def models(rows: Sequence[Row], title: str, out: Console) -> None:
    """The table of models. What ran on a GPU has two more columns."""
    watched = any(entry.gpu for row in rows for entry in row.entries.values())
    made = Table(title=title, title_justify="left")
    made.add_column("model")
    columns = [
        "parameters",
        "samples/s torch.nn",
        "samples/s fusedseq",
        "faster",
        "MB torch.nn",
        "MB fusedseq",
        "of it",
    ]
    columns += ["GPU busy, watts torch.nn", "GPU busy, watts fusedseq"] if watched else []
    for name in columns:
        made.add_column(name, justify="right")
    for row in rows:
        if row.wrong is not None:
            made.add_row(row.model, f"{row.parameters:,}", "[red]WRONG: no speed[/]")
            continue
        pair = [row.entries[name] for name in ("torch", "fusedseq")]
        cells = [f"{entry.samples_per_second:,.0f} ±{percent(entry.spread)}" for entry in pair]
        cells += [times(row.faster), *(f"{entry.peak_bytes / 1e6:,.1f}" for entry in pair), percent(row.memory)]
        cells += (
            [f"{e.gpu['utilisation']:.0f}%, {e.gpu['watts']:.0f}" if e.gpu else "" for e in pair] if watched else []
        )
        made.add_row(row.model, f"{row.parameters:,}", *cells)
    out.print(made)
    out.print("Samples are sequences. MB (10^6 bytes) is the growth of a fresh process over its state before training.")
    for row in rows:
        if row.wrong is not None:
            out.print(f"[red]WRONG {row.model}:[/] {escape(row.wrong)}", soft_wrap=True)
