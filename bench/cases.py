"""What is timed: all sets of all kinds of cases. Whatever runs a benchmark takes its cases from here."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from . import attention_cases, linear_cases, rnn_cases, transformer_cases
from .case import MODES, Case, Set

FAMILIES = (*rnn_cases.FAMILIES, *attention_cases.FAMILIES, *transformer_cases.FAMILIES, *linear_cases.FAMILIES)


def _quick() -> Iterator[Case]:
    yield from rnn_cases.quick()
    yield from attention_cases.quick()
    yield from transformer_cases.quick()
    yield from linear_cases.quick()


def _smoke() -> Iterator[Case]:
    yield from rnn_cases.smoke()
    yield from attention_cases.smoke()
    yield from transformer_cases.smoke()
    yield from linear_cases.smoke()


SETS: dict[str, Set] = {
    "quick": Set("one case of most other sets", _quick),
    **rnn_cases.SETS,
    **attention_cases.SETS,
    **transformer_cases.SETS,
    **linear_cases.SETS,
    "smoke": Set("tiny sizes of every kind, for tests", _smoke),
}
# Names that stand for several sets.
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": tuple(name for name, one in SETS.items() if one.goal is not None),
    "all": tuple(name for name in SETS if name != "smoke"),
}
DEFAULT_SETS = ("grid", "quick")


def select(
    sets: Sequence[str] = DEFAULT_SETS,
    families: Sequence[str] = FAMILIES,
    modes: Sequence[str] = MODES,
    patterns: Sequence[str] = (),
    dtypes: Sequence[str] = ("float32",),
    devices: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (0,),
) -> dict[Case, list[str]]:
    """The cases of the sets that meet every condition, each once, with the names of the sets that it is in.

    A pattern is part of the case as printed, or a shell pattern for all of it. A set that is about one dtype keeps it.
    """
    chosen: dict[Case, list[str]] = {}
    for name in [one for given in sets for one in GROUPS.get(given, (given,))]:
        own = SETS[name].dtype
        for case in SETS[name].make():
            for device in devices:
                for dtype in dtypes if own is None else (own,):
                    for number in threads:
                        one = case.but(dtype=dtype, device=device, threads=case.threads or number)
                        if one.family in families and one.mode in modes and _matches(one, patterns):
                            names = chosen.setdefault(one, [])
                            if name not in names:
                                names.append(name)
    return chosen


def _matches(case: Case, patterns: Sequence[str]) -> bool:
    text = str(case).lower()
    return not patterns or any(p.lower() in text or fnmatch.fnmatchcase(text, p.lower()) for p in patterns)
