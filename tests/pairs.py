"""A few rows of the parity matrix in which every two words of an id that occur together in some row still do.

Each specialisation of a Triton kernel takes a second or more to compile, and the matrix has more than a thousand; what
tells them apart are the words of the ids and the classes of the sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import combinations

# Sizes up to which kernels or tiles are others: `scan_plan` by H, `attention_config` by the widths of heads.
CLASSES = {"H": (16, 32, 64, 256), "E": (16, 32, 64, 128, 256), "V": (64, 128, 256)}
_SIZE = re.compile(r"([A-Z])(\d+)")


def words(identifier: str) -> list[str]:
    """Of a test's id: its function, and the words in brackets, sizes by their class."""
    function, _, rest = identifier.partition("[")
    found = [function]
    for word in filter(None, rest.rstrip("]").split("-")):
        sizes = _SIZE.findall(word)
        if len(sizes) > 1 and "".join(letter + number for letter, number in sizes) == word:
            scan = "E" not in dict(sizes)  # H are heads elsewhere
            for letter, number in sizes:
                limits = CLASSES.get(letter, ()) if scan or letter != "H" else ()
                if limits:
                    found.append(f"{letter}<{sum(int(number) > limit for limit in limits)}")
                elif int(number) < 2:
                    found.append(letter + number)
        else:
            found.append(word)
    return found


def covering(identifiers: Iterable[str]) -> set[str]:
    """The ids that are kept: one after the other the one with most pairs that none before it has."""
    rest = {one: {tuple(sorted(pair)) for pair in combinations(words(one), 2)} for one in identifiers}
    kept: set[str] = set()
    while rest:
        best = max(rest, key=lambda one: (len(rest[one]), one))
        new = rest.pop(best)
        if not new:
            break
        kept.add(best)
        rest = {one: pairs - new for one, pairs in rest.items()}
    return kept
