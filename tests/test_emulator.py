"""The emulator of tests/emulator: right kernels run right under every schedule, and each kind of bug is found."""

import numpy as np
import pytest
from emulated import missing_tools, nothing, values

SEEDS = range(6)
pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("FUSEDSEQ_EMULATOR_SEED", str(request.param))
    return request.param


# One block.


@pytest.mark.parametrize("n", [1, 33, 96, 256])
def test_reverse(cases, seed, n):
    x, y = values(n), nothing(n)
    assert cases.reverse(0, x, y, n) == ""
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "race: "),
        (2, "shared store out of bounds: 4 bytes at element 128"),
        (3, "shared load misaligned: 8 bytes"),
        (4, "deadlock: no thread can go on."),
        (5, "divergent __syncthreads"),
        (6, "shared load out of bounds: 16 bytes"),
        (7, "thread (3,0,0) of block (0,0,0): __trap()"),
    ],
)
def test_bugs_of_a_block(cases, seed, bug, message):
    error = cases.reverse(bug, values(128), nothing(128), 128)
    assert error.startswith("reverse (n=128): ")
    assert message in error
    assert f"(FUSEDSEQ_EMULATOR_SEED={seed})" in error


def test_whole_accesses_to_global_memory_and_the_clock(cases, seed):
    x, y, later = values(132), nothing(132), np.zeros(33, np.uint32)
    assert cases.whole(0, x, y, 132, later) == ""
    assert np.array_equal(x, y)
    assert later.all()
    assert "exchange store misaligned: 16 bytes" in cases.whole(1, x, y, 132, later)
    assert "exchange store out of bounds: 16 bytes at element 132" in cases.whole(2, x, y, 132, later)


def test_divergent_barrier_says_who_waits_where(cases):
    error = cases.reverse(4, values(128), nothing(128), 128)
    assert "block (0,0,0), threads 0-63: wait in __syncthreads" in error
    assert "block (0,0,0), threads 64-127: wait in barrier_sync 1" in error


def test_rotate(cases, seed):
    x = values(96)
    y = x.copy()
    assert cases.rotate(0, y, 96, 5) == ""
    assert np.array_equal(y, np.roll(x, -5))


def test_missing_barrier_before_overwriting(cases, seed):
    assert "race: " in cases.rotate(1, values(96), 96, 5)


def test_named_barriers(cases, seed):
    n, rounds = 128, 4
    x, y = values(rounds, n // 2), nothing(n // 2)
    assert cases.produce(0, x, y, n, rounds) == ""
    assert np.allclose(y, x.sum(), atol=1e-4)


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["deadlock"]),
        (2, ["while others wait there for"]),
        (3, ["this thread has arrived already", "while others wait", "race: "]),
        (4, ["race: ", "this thread has arrived already"]),
    ],
)
def test_bugs_of_named_barriers(cases, seed, bug, messages):
    error = cases.produce(bug, values(4, 64), nothing(64), 128, 4)
    assert any(message in error for message in messages), error


def test_barrier_that_counts(cases, seed):
    x, y = values(64), nothing(64)
    assert cases.count(x, y, 64) == ""
    assert np.array_equal(y, np.full(64, (x > 0).sum() + 1000 * (x > 2).any() + 2000))


def test_endless_loop_over_shared_memory(cases):
    assert "livelock" in cases.spin(nothing(32))


# Warps.


def test_warp_sum(cases, seed):
    x, y = values(64), nothing(64)
    assert cases.warp_sum(0, x, y, 64) == ""
    assert np.allclose(y.reshape(2, 32), x.reshape(2, 32).sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["lane 31, which has exited", "this thread exits while lanes"]),
        (2, ["in which the calling lane 0 is missing"]),
        (3, ["lanes of a warp meet in different collectives"]),
    ],
)
def test_bugs_of_a_warp(cases, seed, bug, messages):
    error = cases.warp_sum(bug, values(64), nothing(64), 64)
    assert any(message in error for message in messages), error


def test_collectives_want_whole_warps(cases):
    assert "waits for lane 8, which does not exist" in cases.warp_sum(0, values(40), nothing(40), 40)


def test_shuffles_and_votes(cases, seed):
    n = 64
    x, y = values(n), nothing(10, n)
    assert cases.warp_all(x, y, n) == ""
    lanes = np.arange(32)
    for warp in range(n // 32):
        v = x[warp * 32 : warp * 32 + 32]
        mine = y[:, warp * 32 : warp * 32 + 32]
        assert np.array_equal(mine[0], np.full(32, v[5]))
        assert np.array_equal(mine[1], v[lanes // 8 * 8 + (lanes + 1) % 8])
        assert np.array_equal(mine[2], v[np.where(lanes < 3, lanes, lanes - 3)])
        assert np.array_equal(mine[3], v[np.where(lanes % 16 > 13, lanes, lanes + 2)])
        assert np.array_equal(mine[4], v[lanes ^ 9])
        assert np.array_equal(mine[5], np.full(32, ((v > 0) << lanes).sum() & 0xFFFF))
        assert np.array_equal(mine[6], np.full(32, (v > 1).any() + 2))
        assert np.array_equal(mine[7], v[lanes ^ 15])
        assert np.array_equal(mine[8], v[::-1])
        shifted = v[np.where(lanes < 16, lanes + 1, np.where(lanes == 16, 16, lanes - 1))]
        assert np.array_equal(np.delete(mine[9], 15), np.delete(shifted, 15))
        assert np.isnan(mine[9][15])  # lane 16 is outside lane 15's mask: undefined on a GPU


def test_syncwarp_orders(cases, seed):
    x, y = values(64), nothing(64)
    assert cases.warp_exchange(0, x, y, 64) == ""
    assert np.array_equal(y, x[np.arange(64) ^ 7])
    assert "race: " in cases.warp_exchange(1, x, y, 64)


# Asynchronous copies.


def test_pipeline(cases, seed):
    n, tiles, total = 64, 5, 5 * 64 - 11  # the last copies are partly or wholly zero-filled
    x = values(tiles * n)
    y = nothing(n)
    assert cases.pipeline(0, x, y, n, tiles, total) == ""
    x[total:] = 0
    assert np.allclose(y, x.reshape(tiles, n).sum(0), atol=1e-5)


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "race: "),
        (2, "race: "),
        (3, "race: "),
        (4, "race: "),
        (5, "cp_async misaligned: the source"),
        (6, "cp_async out of bounds: 16 bytes"),
    ],
)
def test_bugs_of_copies(cases, seed, bug, message):
    x = np.resize(values(512), 5 * 64 + 4)
    assert message in cases.pipeline(bug, x, nothing(64), 64, 5, 5 * 64)


# Clusters.


@pytest.mark.parametrize("cluster, grid", [(1, 2), (2, 4), (8, 8)])
def test_ring(cases, seed, cluster, grid):
    n, steps = 32, 5
    x = values(grid // cluster, cluster, n)
    y = x.copy()
    assert cases.ring(0, y, n, cluster, grid, steps) == ""
    assert np.array_equal(y, np.roll(x, steps, axis=1))


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["which may not have started"]),
        (2, ["race: ", "the block exits while a peer may still access", "has exited"]),
        (3, ["race: "]),
        (4, ["the block exits while a peer may still access its shared memory", "this is, has exited"]),
        (5, ["rank 101 in a cluster of 4", "rank 102", "rank 103", "rank 100"]),
        (6, ["st.shared::cluster out of bounds"]),
        (7, ["cluster_wait: this thread has not arrived"]),
    ],
)
def test_bugs_of_clusters(cases, seed, bug, messages):
    error = cases.ring(bug, values(4, 32), 32, 4, 4, 3)
    assert any(message in error for message in messages), error


@pytest.mark.parametrize("bulk", [0, 1])
@pytest.mark.parametrize("cluster", [2, 4])
def test_relay(cases, seed, cluster, bulk):
    n, steps = 64, 7
    x = values(2, cluster, n)
    y = x.copy()
    assert cases.relay(0, bulk, y, n, cluster, 2 * cluster, steps) == ""
    assert np.array_equal(y, np.roll(x, steps, axis=1))


@pytest.mark.parametrize(
    "bug, bulk, messages",
    [
        (1, 0, ["race: ", "over-arrival"]),
        (1, 1, ["race: ", "over-arrival"]),
        (2, 0, ["deadlock"]),
        (3, 0, ["over-arrival"]),
        (4, 0, ["race: "]),
        (4, 1, ["race: "]),
        (5, 1, ["without fence_proxy_async"]),
        (6, 1, ["race: "]),
        (7, 0, ["which may not have started", "no mbarrier has been initialised", "no barrier orders it after"]),
        (8, 0, ["race: ", "over-arrival", "deadlock"]),
        (9, 0, ["the mbarrier must lie in the block that receives the data"]),
    ],
)
def test_bugs_of_mbarriers(cases, seed, bug, bulk, messages):
    # Among two, the data itself tells that a buffer is free.
    blocks = 4 if bug == 4 else 2
    error = cases.relay(bug, bulk, values(blocks, 64), 64, blocks, blocks, 7)
    assert any(message in error for message in messages), error


def test_asynchronous_stores_need_a_cluster_of_two(cases, seed):
    assert "st_async: a cluster of one block has no such stores" in cases.relay(0, 0, values(1, 64), 64, 1, 1, 3)


@pytest.mark.parametrize("threads", [32, 128])
def test_echo(cases, seed, threads):
    """Data that tells of the reads before it."""
    x = values(2, threads)
    y = x.copy()
    assert cases.echo(0, y, threads, 7) == ""
    swapped = x.reshape(2, -1, 2)[::-1, :, ::-1].reshape(2, threads)
    assert np.array_equal(y, swapped)


@pytest.mark.parametrize("bug", [1, 2])
def test_echo_that_does_not_wait_for_a_read(cases, seed, bug):
    assert "race: " in cases.echo(bug, values(2, 32), 32, 7)


@pytest.mark.parametrize("variant", [0, 3])
def test_hand_over(cases, seed, variant):
    x, y = values(64), nothing(64)
    assert cases.hand_over(variant, x, y, 64) == ""
    assert np.array_equal(y, x[::-1])


@pytest.mark.parametrize("bug", [1, 2])
def test_hand_over_of_what_was_not_published(cases, seed, bug):
    assert "race: " in cases.hand_over(bug, values(64), nothing(64), 64)


def test_remote_values_of_every_size(cases, seed):
    n = 32
    wide, middle = values(2, n, 4), values(2, n, 2)
    narrow = np.random.default_rng(1).integers(0, 1 << 16, (2, n)).astype(np.uint16)
    expected = [x[::-1].copy() for x in (wide, middle, narrow)]
    assert cases.remote_sizes(wide, middle, narrow, n) == ""
    for found, wanted in zip((wide, middle, narrow), expected, strict=True):
        assert np.array_equal(found, wanted)


def test_bulk_fetch(cases, seed):
    buffer = values(256 + 4)
    x = buffer[(-buffer.ctypes.data // 4) % 4 :][:256]  # 16-byte aligned
    y = nothing(256)
    assert cases.bulk_fetch(0, x, y, 256) == ""
    assert np.array_equal(y, 2 * x)
    assert "120 bytes; must be a positive multiple of 16" in cases.bulk_fetch(1, x, y, 256)
    assert "without fence_proxy_async" in cases.bulk_fetch(2, x, y, 256)


# Grids.


@pytest.mark.parametrize("variant", [0, 10, 11])
def test_chain(cases, seed, variant):
    n, grid = 64, 8
    x, y = values(grid, n), nothing(grid, n)
    assert cases.chain(variant, x, y, np.zeros(grid, np.uint32), n, grid, 1) == ""
    assert np.allclose(y, x.cumsum(0), atol=1e-5)


@pytest.mark.parametrize(
    "bug, message",
    [
        (1, "race: "),
        (2, "race: "),
        (3, "race: "),
        (4, "deadlock"),
        (5, "exchange store out of bounds"),
        (6, "race: "),
    ],
)
def test_bugs_of_flags(cases, seed, bug, message):
    n, grid = 64, 8
    error = cases.chain(bug, values(grid, n), nothing(grid, n), np.zeros(grid, np.uint32), n, grid, 1)
    assert message in error, error


def test_spinning_blocks_need_a_cooperative_launch(cases, seed):
    """Without one nothing promises that the block that others wait for ever starts."""
    n, grid = 256, 64
    x, y = values(grid, n), nothing(grid, n)
    error = cases.chain(0, x, y, np.zeros(grid, np.uint32), n, grid, 0)
    assert ("deadlock" in error and "spin on nanosleep" in error) or "spin on ld_acquire" in error


def test_time_passes_while_all_spin(cases, seed):
    y = nothing(32)
    assert cases.impatient(np.zeros(1, np.uint32), y) == ""
    assert np.array_equal(y, np.ones(32, np.float32))


def test_atomics(cases, seed):
    n, grid = 64, 6
    x = values(grid, n)
    total, counts = np.zeros(1, np.float32), np.zeros(2, np.int32)
    assert cases.accumulate(0, x, total, counts, n, grid) == ""
    assert np.allclose(total, x.sum(), atol=1e-4)
    assert counts.tolist() == [n * grid - 1, n * grid]


@pytest.mark.parametrize("bug", [1, 2])
def test_atomics_beside_ordinary_accesses(cases, seed, bug):
    total, counts = np.zeros(1, np.float32), np.zeros(2, np.int32)
    assert "race: " in cases.accumulate(bug, values(2, 64), total, counts, 64, 2)


# All together.


def rounded(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def half_bits(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("H, cluster, grid", [(64, 1, 1), (128, 2, 4), (128, 8, 8)])
def test_scan(cases, seed, H, cluster, grid):
    T, B = 6, 16 * grid // cluster
    w = rounded(np.random.default_rng(1).standard_normal((H, H)) / np.sqrt(H))
    x, y = values(T, B, H), nothing(T, B, H)
    assert cases.scan(0, half_bits(w), x, y, T, B, H, cluster) == ""
    # Each step from the state that the kernel had: a value that rounds to the other side would spread.
    before = np.concatenate([np.zeros((1, B, H), np.float32), y[:-1]])
    assert np.allclose(y, np.tanh(rounded(before) @ w.T + x), atol=1e-5)


@pytest.mark.parametrize("bug", [1, 2])
def test_scan_without_its_barriers(cases, seed, bug):
    T, B, H = 6, 16, 64
    error = cases.scan(bug, half_bits(rounded(values(H, H))), values(T, B, H), nothing(T, B, H), T, B, H, 2)
    assert "race: " in error or "may not have started" in error, error
