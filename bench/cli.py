"""`fusedseq bench`, also `python -m fusedseq.bench`: run cases, draw and compare results, print the models' table."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .cases import SETS
from .choice import UsageError, add_choice, chosen, need, positive, runnable
from .peers import DEFAULT_PEERS, PEERS
from .results import ResultError

if TYPE_CHECKING:
    from rich.console import Console

    from .compare import Comparison
    from .memory import Peak

RUN_HELP = """\
other commands:
  fusedseq bench plot RESULT.json --out DIR   pictures of a result
  fusedseq bench compare A B                  two results, or two git revisions measured in turns
  fusedseq bench goals RESULT.json ...        attention's goals beside what was measured
  fusedseq bench memory --out DIR             peak memory of attention over the length of the sequence
  fusedseq bench table                        models x training samples per second x peak memory

examples:
  fusedseq bench                              the sets grid and quick
  fusedseq bench --set cells streaming --peers fusedseq torch
  fusedseq bench --set attention              all of attention and the Transformer's modules, beside their goals
  fusedseq bench --case "LSTM training B64" --dtype bfloat16 --json out/bf16.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name, rest = (arguments[0], arguments[1:]) if arguments[:1] and arguments[0] in COMMANDS else ("run", arguments)
    # torch says this once per process about its own kernel; the cases with projection are about just that.
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    try:
        return COMMANDS[name](rest)
    except (UsageError, ResultError) as error:
        print(f"fusedseq bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedseq bench",
        usage="fusedseq bench [options] | plot | compare | goals | memory | table",
        description="Times fusedseq beside its peers, in turns, after checking that all give the same results.",
        epilog=RUN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_choice(parser)
    peers = [*PEERS, "all"]
    said = f"of {', '.join(peers)} (default: {' '.join(DEFAULT_PEERS)})"
    parser.add_argument("--peers", nargs="+", choices=peers, default=DEFAULT_PEERS, metavar="PEER", help=said)
    out = parser.add_argument_group("results")
    out.add_argument("--list", action="store_true", help="print the chosen cases and their sets, and run nothing")
    out.add_argument("--list-sets", action="store_true", help="print the sets, and run nothing")
    out.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    out.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each case and peer")
    return parser


def run(arguments: Sequence[str]) -> int:
    options = run_parser().parse_args(arguments)
    need("rich", "printing results")
    from . import report
    from .results import save, save_csv
    from .run import begin, ceilings, run_cases

    out = report.console()
    if options.list_sets:
        report.sets(SETS, out)
        return 0
    cases = chosen(options)
    if options.list:
        report.listing(cases, out)
        return 0
    kept = runnable(cases, options)
    for path in (options.json, options.csv):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    peers = [name for name in PEERS if name in options.peers or "all" in options.peers]

    result = begin({"sets": options.sets, "peers": peers, "budget": options.budget})
    report.header(result, out)
    for threads in sorted({case.threads or torch.get_num_threads() for case in kept}):
        report.ceilings(str(threads), ceilings(result, threads), out)
    lines = report.Lines(kept, out)
    lines.head()
    with progress(out, len(kept)) as (told, advance):
        for one in run_cases(result, kept, peers, options.budget, told):
            lines.add(one)
            advance()
            # What has been measured stays if the run is broken off.
            if options.json:
                save(result, options.json)
            if options.csv:
                save_csv(result, options.csv)
    out.print()
    report.summary(result.results, out)
    report.goal_rows(result.results, out)
    report.refusals(result.results, out)
    if len(kept) < len(cases):
        out.print(f"\nleft out: {len(cases) - len(kept)} large cases, meant for a GPU; --large runs them here")
    return 1 if report.wrong(result.results, out) else 0


@contextlib.contextmanager
def progress(out: Console, total: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """What is being worked on, and how far along, on a terminal only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not out.is_terminal:
        yield lambda text: None, lambda: None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


def plot(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="fusedseq bench plot", description="Pictures of a result, as PNG and SVG.")
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="written by `fusedseq bench --json`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the pictures")
    options = parser.parse_args(arguments)
    need("matplotlib", "drawing pictures")
    from .plot import plot as draw
    from .results import load

    written = draw(load(options.result), options.out)
    if not written:
        raise UsageError(f"{options.result}: nothing to draw: no case was timed")
    print("\n".join(map(str, written)))
    return 0


def compare(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedseq bench compare",
        description="Says what changed from A to B by more than noise. A and B are both results, or both git revisions "
        "(`.` is the package as installed), which are then built and timed in turns.",
    )
    parser.add_argument("a", metavar="A", help="RESULT.json, a git revision, or .")
    parser.add_argument("b", metavar="B", help="the same kind")
    said = "exit with 1 if a case takes over PCT percent longer in B, and by more than noise"
    parser.add_argument("--fail-slower", type=float, metavar="PCT", help=said)
    add_choice(parser, ("grid",))
    options = parser.parse_args(arguments)
    need("rich", "printing results")
    from . import report

    out = report.console()
    files = [name.endswith(".json") or (name != "." and Path(name).is_file()) for name in (options.a, options.b)]
    if files[0] != files[1]:
        raise UsageError("A and B: expected two results or two git revisions, got one of each")
    found = _compare_results(options, out) if files[0] else _compare_revisions(options, out)
    report.comparison(found, out)
    if not found.changes:
        raise UsageError("A and B have no case in common that was timed in both")
    slower = [] if options.fail_slower is None else found.slower(options.fail_slower)
    for change in slower:
        out.print(f"[red]over {options.fail_slower:g}% slower:[/] {change.case}", soft_wrap=True)
    return 1 if slower else 0


def _compare_results(options: argparse.Namespace, out: Console) -> Comparison:
    from . import report
    from .compare import Comparison, match
    from .compare import compare as judge
    from .results import load

    a, b = load(Path(options.a)), load(Path(options.b))
    report.differences(a, b, out)
    both, alone = match(a.results, b.results)
    found = judge(both, in_turns=False)
    lines = report.ChangeLines([change.case for change in found.changes], out)
    lines.head()
    for change in found.changes:
        lines.add(change)
    return Comparison(found.changes, alone + found.apart)


def _compare_revisions(options: argparse.Namespace, out: Console) -> Comparison:
    from . import report
    from .compare import Comparison
    from .compare import compare as judge
    from .revisions import RevisionError, built, measure, resolve

    cases = runnable(chosen(options), options)
    found = Comparison([], [])
    try:
        commits = [resolve(name) for name in (options.a, options.b)]
        with built(commits, out.print) as places:
            lines = report.ChangeLines(cases, out)
            lines.head()
            sites = [(name, places[commit]) for name, commit in zip((options.a, options.b), commits, strict=True)]
            with progress(out, len(cases)) as (told, advance):
                for pair in measure(sites, cases, options.budget, told):
                    one = judge([pair], in_turns=True)
                    for change in one.changes:
                        lines.add(change)
                    found = Comparison(found.changes + one.changes, found.apart + one.apart)
                    advance()
    except RevisionError as error:
        raise UsageError(str(error)) from None
    return found


def goals(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedseq bench goals",
        description="The sets with a goal, one line for each, and every case in which a peer is faster.",
    )
    said = "written by `fusedseq bench --json`; of a case in several, the last counts"
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help=said)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all the cases, one line for each case and peer")
    options = parser.parse_args(arguments)
    need("rich", "printing results")
    from . import report
    from .goals import rows
    from .results import load, merge, save_csv

    run = merge([load(path) for path in options.results])
    if not rows(run.results):
        raise UsageError(
            f"{', '.join(map(str, options.results))}: no case of a set with a goal was timed beside a peer"
        )
    report.goal_rows(run.results, report.console())
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        save_csv(run, options.csv)
    return 0


MEMORY_PEERS = ("fusedseq", "torch", "eager")


def memory(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedseq bench memory",
        description="Peak memory of a call beyond its inputs, each peer of each case in fresh processes; a picture of "
        "it over the length of the sequence, as PNG and SVG.",
    )
    add_choice(parser, ("attention-memory",), budget=False)
    said = f"of {', '.join(PEERS)} (default: {' '.join(MEMORY_PEERS)})"
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=MEMORY_PEERS, metavar="PEER", help=said)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    options = parser.parse_args(arguments)
    need("rich", "printing results")
    if options.out:
        need("matplotlib", "drawing pictures")
    from . import report
    from .memory import peaks
    from .run import begin

    cases = runnable(chosen(options), options)
    if options.out and any("L" not in case.fields() or "dropout" not in case.fields() for case in cases):
        raise UsageError("argument --out: expected cases of attention, which have a length L; others are only printed")
    out = report.console()
    about = begin({"sets": options.sets, "peers": list(options.peers)})
    report.header(about, out)
    peers = [name for name in PEERS if name in options.peers]
    found: list[Peak] = []
    with progress(out, len(cases)) as (told, advance):
        for case in cases:
            found += peaks([case], peers, told)
            advance()
    report.memory_rows(found, out)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**about.about, "memory": [one.as_json() for one in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if not any(one.bytes for one in found):
        raise UsageError("nothing was measured; the reasons are above")
    if options.out:
        from .plot import plot_memory

        print("\n".join(map(str, plot_memory(about, found, options.out))))
    return 0


def table(arguments: Sequence[str]) -> int:
    from .table import MODELS, Sizes, rows

    parser = argparse.ArgumentParser(
        prog="fusedseq bench table",
        description="Training of small forecasters: samples per second, measured in turns, and peak memory, each in a "
        "fresh process, of torch.nn beside fusedseq.",
    )
    standard = Sizes()
    said = f"of {', '.join(MODELS)} (default: all)"
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=said)
    for flag, name, what in (
        ("--batch", "B", "sequences in a batch"),
        ("--length", "T", "time steps"),
        ("--inputs", "I", "features of a step"),
        ("--hidden", "H", "hidden size"),
        ("--layers", "layers", "layers"),
        ("--steps", "steps", "training steps over which peak memory is taken"),
    ):
        value = getattr(standard, name)
        said = f"{what} (default: {value})"
        parser.add_argument(flag, type=positive(int), default=value, metavar="N", dest=name, help=said)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    said = "time for each model's speed (default: 4)"
    parser.add_argument("--budget", type=positive(float), default=4.0, metavar="SECONDS", help=said)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table and the machine")
    options = parser.parse_args(arguments)
    need("rich", "printing results")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("argument --device: cuda was asked for, but torch finds no GPU")
    from . import gpu, report
    from .run import begin

    sizes = Sizes(**{name: getattr(options, name) for name in ("B", "T", "I", "H", "layers", "steps", "device")})
    out = report.console()
    about = begin({"sizes": str(sizes), "budget": options.budget})
    report.header(about, out)
    with progress(out, len(options.model)) as (told, advance):
        found = []
        for row in rows(options.model, sizes, options.budget, told):
            found.append(row)
            advance()
    report.models(found, f"training, {sizes}, AdamW", out)
    if options.device == "cuda" and gpu.load()[0] is None:
        out.print(f"utilisation and power are missing: {gpu.load()[1]}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**about.about, "rows": [row.as_json() for row in found]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if any(row.wrong for row in found) else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "plot": plot,
    "compare": compare,
    "goals": goals,
    "memory": memory,
    "table": table,
}
