"""Blocks that leave their cluster too early, under schedules that show it and under those that do not."""

import re

import numpy as np
import pytest
from emulated import missing_tools, nothing, values

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
N = 64
UNDER_WAY = "while a bulk copy out of its shared memory, which {}, is under way"
UNORDERED = (
    "while a bulk copy may still read its shared memory: no barrier orders the receipt of what {} before the exit"
)


def exits(block: int, text: str) -> str:
    """The pattern of an error of whichever thread was the block's last."""
    return rf"thread \(\d+,0,0\) of block \({block},0,0\): the block exits {text}"


def of_sender(peers: range, texts: tuple[str, ...] = (UNDER_WAY, UNORDERED)) -> str:
    """The pattern of an error of block 0, whose thread p has sent something to the block p."""
    copies = [rf"thread \({p},0,0\) of block \(0,0,0\) sent to block \({p},0,0\)" for p in peers]
    return "|".join(exits(0, text.format(copy)) for copy in copies for text in texts)


@pytest.fixture(params=range(12), ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("FUSEDSEQ_EMULATOR_SEED", str(request.param))
    return request.param


def send(cases, variant: int, cluster: int, n: int = N) -> tuple[str, np.ndarray, np.ndarray]:
    """Error, what came, and what should have come."""
    x, y = values(n), nothing(cluster, n)
    return cases.send(variant, x, y, n, cluster), y[1:], np.tile(x[::-1], (cluster - 1, 1))


@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("cluster", [2, 4, 8])
def test_a_sender_that_knows_its_copies_received(cases, seed, variant, cluster):
    error, found, wanted = send(cases, variant, cluster)
    assert error == ""
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("bug", [2, 3, 4])
@pytest.mark.parametrize("cluster, n", [(4, N), (8, 8)])  # mostly over at the exit, mostly not
def test_a_sender_that_does_not(cases, seed, bug, cluster, n):
    error, _, _ = send(cases, bug, cluster, n)
    assert re.match(rf"send \(n={n} cluster={cluster}\): ({of_sender(range(1, cluster))})", error), error


def test_a_sender_that_misses_one_answer(cases, seed):
    error, _, _ = send(cases, 6, 4)
    assert re.match(rf"send \(n=64 cluster=4\): {of_sender(range(3, 4), (UNORDERED,))}", error), error


@pytest.mark.parametrize("text", [UNDER_WAY, UNORDERED])
def test_either_error_of_a_sender_occurs(cases, monkeypatch, text):
    """The one while the copy is under way, and the one of schedules where it is over by luck."""
    found = []
    for number in range(12):
        monkeypatch.setenv("FUSEDSEQ_EMULATOR_SEED", str(number))
        found.append(send(cases, 2, 8, 32)[0])
    assert any(re.search(of_sender(range(1, 8), (text,)), error) for error in found), found


def test_a_receiver_that_does_not_wait(cases, seed):
    """The receiver is at fault; where the sender leaves first, it does not know that its copy is over."""
    error, _, _ = send(cases, 5, 4)
    receiver = exits(3, "without having waited for an asynchronous copy into its shared memory")
    assert re.match(rf"send \(n=64 cluster=4\): ({receiver}|{of_sender(range(3, 4))})", error), error


@pytest.mark.parametrize("variant", [0, 1])
def test_announced_values_that_are_waited_for(cases, seed, variant):
    x, y = values(N), nothing(N)
    assert cases.announce(variant, x, y, N) == ""
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize(
    "bug, texts",
    [
        (2, ["while its mbarrier", "while an asynchronous copy into its", "without having waited for an asynchronous"]),
        (3, ["while its mbarrier at byte 256 of the shared memory expects 256 bytes that have not come"]),
        (4, ["without having waited for an asynchronous copy into its shared memory"]),
    ],
)
def test_announced_values_that_nobody_waits_for(cases, seed, bug, texts):
    error = cases.announce(bug, values(N), nothing(N), N)
    patterns = "|".join(exits(1, text) for text in texts)
    assert re.match(rf"announce \(n=64 cluster=2\): ({patterns})", error), error
