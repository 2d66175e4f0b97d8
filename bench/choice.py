"""The options that say which cases run, with what and for how long; shared by the commands."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence

import torch

from .case import DEVICES, DTYPES, MODES, Case
from .cases import DEFAULT_SETS, FAMILIES, GROUPS, SETS, select

EXTRA = 'pip install "fusedseq[bench]"'


class UsageError(Exception):
    """Something that the caller can put right; shown as one line."""


def need(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{what} needs {module}, which is not installed: {EXTRA}")


def add_choice(
    parser: argparse.ArgumentParser, default_sets: Sequence[str] = DEFAULT_SETS, budget: bool = True
) -> None:
    """The options that say which cases run, with what and, with `budget`, for how long."""
    what = parser.add_argument_group("what to run")
    which = {
        "--set": ("sets", "SET", [*SETS, *GROUPS], list(default_sets)),
        "--family": ("families", "FAMILY", FAMILIES, list(FAMILIES)),
        "--mode": ("modes", "MODE", MODES, list(MODES)),
        "--dtype": ("dtypes", "DTYPE", DTYPES, ["float32"]),
        "--device": ("devices", "DEVICE", DEVICES, ["cpu"]),
    }
    for flag, (target, metavar, choices, default) in which.items():
        every = "all" if len(default) == len(choices) else " ".join(default)
        said = f"of {', '.join(choices)} (default: {every})"
        what.add_argument(flag, nargs="+", choices=choices, default=default, metavar=metavar, dest=target, help=said)
    said = "only cases whose text, as --list prints it, contains or matches a pattern"
    what.add_argument("--case", nargs="+", default=[], metavar="PATTERN", dest="patterns", help=said)
    what.add_argument("--large", action="store_true", help="on the CPU too, run the cases that are meant for a GPU")
    how = parser.add_argument_group("how")
    said = "threads for every peer; several numbers run every case with each (default: torch's choice)"
    how.add_argument("--threads", nargs="+", type=positive(int), default=[0], metavar="N", help=said)
    if not budget:
        return
    said = "time for each case, shared by all who run it (default: 2)"
    how.add_argument("--budget", type=positive(float), default=2.0, metavar="SECONDS", help=said)


def chosen(options: argparse.Namespace) -> dict[Case, list[str]]:
    o = options
    return select(o.sets, o.families, o.modes, o.patterns, o.dtypes, o.devices, o.threads)


def runnable(cases: dict[Case, list[str]], options: argparse.Namespace) -> dict[Case, list[str]]:
    """Those that this machine is to run."""
    kept = {case: names for case, names in cases.items() if options.large or case.device == "cuda" or not case.large}
    if not kept:
        reason = "all chosen are meant for a GPU (--large runs them here)" if cases else "none matches all conditions"
        raise UsageError(f"no case to run: {reason}; `fusedseq bench --list` shows cases")
    if "cuda" in options.devices and not torch.cuda.is_available():
        raise UsageError("argument --device: cuda was asked for, but torch finds no GPU")
    return kept


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not value > 0:
            what = "a whole number of 1 or more" if kind is int else "a number above 0"
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse
