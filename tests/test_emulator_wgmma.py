"""wgmma, tensor copies and setmaxnreg on the emulator: layouts against the PTX ISA's tables, and a kernel per mistake.

Operands in shared memory are laid out here from the ISA's canonical layouts (9.7.15.5.1.2), whatever the emulator does.
"""

import numpy as np
import pytest
from emulated import missing_tools, nothing
from test_emulator_tensor import bf16, half, small_integers

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))
SEEDS = range(4)
THREADS = np.arange(128)
WARP, GROUP, MEMBER = THREADS // 32, THREADS % 32 // 4, THREADS % 4
WIDTHS = {0: 16, 1: 32, 2: 64, 3: 128}  # the swizzles of matrix.h: bytes of a line of the pattern
BEFORE = 2048  # an operand does not begin where shared memory does


@pytest.fixture(params=SEEDS, ids="seed{}".format)
def seed(request, monkeypatch):
    monkeypatch.setenv("FUSEDSEQ_EMULATOR_SEED", str(request.param))
    return request.param


def accumulators(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the element d_i of D [64,N] for each thread: [128, N/2] each."""
    i = np.arange(d.shape[1] // 2)
    row = 16 * WARP[:, None] + GROUP[:, None] + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * MEMBER[:, None] + i % 2


def layout(matrix: np.ndarray, mn_major: bool, swizzle: int) -> tuple[np.ndarray, int, int]:
    """Bytes of an operand [rows or columns, 16 terms] as uint16, its leading and its stride offset in bytes."""
    lines = np.ascontiguousarray(matrix.T if mn_major else matrix)  # the contiguous index is the last
    width = WIDTHS[swizzle]
    chunks = width // 16
    count, length = lines.shape
    panels = -(-length * 2 // width)  # side by side, each with patterns of 8 lines below each other
    patterns = -(-count // 8)
    spare = 8 * width  # between panels, so that an offset that is taken for another one goes wrong
    pattern, panel = 8 * width, patterns * 8 * width + spare
    image = np.zeros((panels * panel) // 2, np.uint16)
    for line in range(count):
        for chunk in range(length // 8):
            at = chunk // chunks * panel + line // 8 * pattern + line % 8 * width + chunk % chunks * 16
            if swizzle:
                at ^= (at >> 7 & chunks - 1) << 4
            image[at // 2 : at // 2 + 8] = lines[line, 8 * chunk : 8 * chunk + 8]
    if swizzle == 0 and mn_major:
        return image, pattern, panel
    return image, panel, pattern


def image_of(*operands: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The operands one after another, each at a multiple of 1024 bytes, and where."""
    parts, offsets = [np.zeros(BEFORE // 2, np.uint16)], []
    for operand in operands:
        offsets.append(2 * sum(map(len, parts)))
        parts += [operand, np.zeros(-len(operand) % 512, np.uint16)]
    return np.concatenate(parts), offsets


# Type, columns, A's and B's major (1: not that of the terms), swizzle; a line of B must fill the swizzle's pattern.
PRODUCTS = [
    (kind, n, mn_a, mn_b, swizzle)
    for kind, n in [(0, 8), (0, 64), (0, 128), (0, 256), (1, 64)]
    for mn_a in (0, 1)
    for mn_b in (0, 1)
    for swizzle in WIDTHS
    if not (mn_b and n * 2 < WIDTHS[swizzle])
]


@pytest.mark.parametrize("kind, n, mn_a, mn_b, swizzle", PRODUCTS)
def test_product_from_shared_memory(cases, kind, n, mn_a, mn_b, swizzle):
    to_bits = half if kind else bf16
    a, b, c = small_integers(64, 16), small_integers(n, 16), small_integers(64, n)
    image_a, leading_a, stride_a = layout(to_bits(a), bool(mn_a), swizzle)
    image_b, leading_b, stride_b = layout(to_bits(b), bool(mn_b), swizzle)
    image, (at_a, at_b) = image_of(image_a, image_b)
    where = [at_a, leading_a, stride_a, at_b, leading_b, stride_b, swizzle, kind, n, mn_a + 2 * mn_b]
    for accumulate in (0, 1):
        d = np.ascontiguousarray(c[accumulators(c)])
        error = cases.one_product(image, len(image) // 8, np.array([*where, accumulate], np.int32), d)
        assert error == ""
        assert np.array_equal(d, (a @ b.T + accumulate * c)[accumulators(c)])


@pytest.mark.parametrize("mn_b", [0, 1])
@pytest.mark.parametrize("kind, to_bits", [(0, bf16), (1, half)], ids=["bf16", "f16"])
def test_product_with_a_in_registers(cases, seed, kind, to_bits, mn_b):
    a, b, c = small_integers(64, 16), small_integers(64, 16), small_integers(64, 65)[:, :64]
    i = np.arange(8)
    rows = 16 * WARP[:, None] + GROUP[:, None] + 8 * (i // 2 % 2)
    terms = 2 * MEMBER[:, None] + i % 2 + 8 * (i // 4)
    registers = np.ascontiguousarray(to_bits(a)[rows, terms]).view(np.uint32)
    image_b, leading, stride = layout(to_bits(b), bool(mn_b), 3)
    image, (at,) = image_of(image_b)
    where = np.array([0, 0, 0, at, leading, stride, 3, kind, 64, 2 * mn_b, 1], np.int32)
    d = np.ascontiguousarray(c[accumulators(c)])
    assert cases.register_product(image, len(image) // 8, where, registers, d) == ""
    assert np.array_equal(d, (a @ b.T + c)[accumulators(c)])


def chain(cases, bug: int) -> tuple[str, np.ndarray, np.ndarray]:
    steps = 4
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-2, 3, (steps, 64, 64)).astype(np.float32) / s for s in (8, 1))
    d = nothing(128, 32)
    error = cases.chained(bug, bf16(a), bf16(b), d, steps)
    wanted = sum(x @ y.T @ y for x, y in zip(a, b, strict=True))
    return error, d, wanted[accumulators(wanted)]


def test_chained_products(cases, seed):
    error, d, wanted = chain(cases, 0)
    assert error == ""
    assert np.abs(d - wanted).max() < 2**-6 * np.abs(wanted).max()  # scores are rounded to bfloat16 between


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["wgmma: no wgmma_fence has named the registers of the accumulators"]),
        (2, ["wgmma_wait<0> ends a wgmma whose accumulators it does not name"]),
        (3, ["race: "]),
        (4, ["which thread", "wrote without fence_proxy_async after it"]),
        (5, ["race: "]),
        (6, ["waits for thread", "this thread exits while", "which has exited"]),
        (7, ["is in no group: wgmma_commit is missing"]),
        (8, ["the registers of A of a wgmma were written before the wait"]),
        (9, ["the registers of A were written after the wgmma_fence that named them"]),
        (10, ["wgmma_wait<1> names accumulators of a wgmma that is still in flight"]),
        (11, ["differ in shape, descriptors or `accumulate`"]),
        (12, ["ends a wgmma whose accumulators it does not name"]),
        (13, ["accumulators were written while a wgmma that adds to them was in flight"]),
        (14, ["this thread exits while a wgmma of it is in flight"]),
        (15, ["wgmma out of bounds: 16 bytes"]),
    ],
)
def test_bugs_of_products(cases, seed, bug, messages):
    error = chain(cases, bug)[0]
    assert error.startswith("chained (steps=4): ")
    assert any(message in error for message in messages), error


def test_sums_read_before_the_wait_are_nan(cases, seed):
    error, d, _ = chain(cases, 16)
    assert error == "" and np.isnan(d).all()


def test_registers_move_between_warpgroups(cases, seed):
    out = nothing(3)
    assert cases.move_registers(0, out) == ""
    assert np.array_equal(out, [np.nan, 1, 1], equal_nan=True) or np.array_equal(out, [1, 1, 1])


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["deadlock", "spin on setmaxnreg_inc"]),
        (2, ["setmaxnreg_inc: 160 registers, but the threads have 168"]),
        (3, ["setmaxnreg_dec waits for thread", "threads of its warpgroup wait for it in setmaxnreg_dec"]),
    ],
)
def test_bugs_of_registers(cases, seed, bug, messages):
    error = cases.move_registers(bug, nothing(3))
    assert any(message in error for message in messages), error


def aligned(shape: tuple[int, ...], fill: np.ndarray | None = None) -> np.ndarray:
    """An array of uint16 at a multiple of 16 bytes."""
    size = int(np.prod(shape))
    buffer = np.zeros(size + 8, np.uint16)
    array = buffer[(-buffer.ctypes.data // 2) % 8 :][:size].reshape(shape)
    if fill is not None:
        array[...] = fill
    return array


BOXES = [
    # sizes outermost first, the last one padded to `pitch` elements in memory; box; corner
    ((13, 20), 24, (8, 16), (2, 4), 0),
    ((13, 64), 64, (8, 64), (9, 0), 3),  # rows past the end
    ((13, 128), 136, (8, 64), (-3, 64), 3),  # before the beginning, second half
    ((5, 7, 40), 40, (2, 3, 32), (4, 5, 16), 2),
    ((3, 2, 9, 70), 72, (1, 1, 16, 64), (2, 1, -2, 64), 3),
    ((2, 3, 2, 5, 16), 16, (2, 2, 1, 3, 16), (1, 2, 1, 4, 8), 1),
    ((2, 3, 2, 5, 24), 24, (2, 2, 1, 3, 16), (0, 1, 1, 1, 8), 0),
]


def carry(cases, bug: int, sizes, pitch, box, corner, swizzle):
    rng = np.random.default_rng(0)
    shape = (*sizes[:-1], pitch)
    source, target = aligned(shape, rng.integers(1, 1 << 16, shape)), aligned(shape)
    rank = len(sizes)
    strides = np.array(source.strides)
    row = np.zeros(22, np.int32)
    row[:2] = rank, swizzle
    for begin, numbers in zip((2, 7, 12, 17), (sizes, strides, box, corner), strict=True):
        row[begin : begin + rank] = numbers[::-1]
    image = np.zeros(int(np.prod(box)) // 2, np.uint32)
    error = cases.carry(bug, source, target, row, image)
    return error, source, target, image.view(np.uint16)


@pytest.mark.parametrize("sizes, pitch, box, corner, swizzle", BOXES)
def test_boxes(cases, seed, sizes, pitch, box, corner, swizzle):
    error, source, target, image = carry(cases, 0, sizes, pitch, box, corner, swizzle)
    assert error == ""
    inside = source[..., : sizes[-1]]
    index = np.stack(np.meshgrid(*(np.arange(b) + c for b, c in zip(box, corner, strict=True)), indexing="ij"))
    there = np.all([(i >= 0) & (i < s) for i, s in zip(index, sizes, strict=True)], 0)
    wanted = np.where(there, inside[tuple(np.clip(i, 0, s - 1) for i, s in zip(index, sizes, strict=True))], 0)
    assert there.any()
    at = 2 * np.arange(wanted.size)
    if swizzle:
        at ^= (at >> 7 & WIDTHS[swizzle] // 16 - 1) << 4
    assert np.array_equal(image[at // 2], wanted.ravel())
    written = np.zeros(source.shape, bool)
    written[tuple(i[there] for i in index)] = True
    assert np.array_equal(target, np.where(written, source, 0))


@pytest.mark.parametrize(
    "bug, messages",
    [
        (1, ["race: "]),
        (2, ["deadlock", "race: "]),
        (3, ["tensor_load at byte", "without fence_proxy_async"]),
        (4, ["begins at byte 128 of shared memory, no multiple of 1024"]),
        (5, ["may still read shared memory: bulk_wait_read is missing", "race: "]),
        (6, ["tensor_store at byte", "without fence_proxy_async"]),
        (7, ["race: "]),
        (8, ["2 coordinates for a tensor map of 4 dimensions"]),
    ],
)
def test_bugs_of_tensor_copies(cases, seed, bug, messages):
    error = carry(cases, bug, *BOXES[4])[0]
    assert any(message in error for message in messages), error


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: 1}, "takes 2 to 5 dimensions, got 1"),
        ({8: 150}, "strides that are multiples of 16 bytes and below 2^40 of dimension 1: got 150"),
        ({13: 257}, "a box takes 1 to 256 elements of dimension 1: got 257"),
        ({12: 60}, "must be multiples of 16 bytes, 8 elements of dimension 0: got 60"),
        ({12: 32}, "must be as long as the swizzle of dimension 0: got 32"),
        ({2: 0}, "takes 1 to 2^32 elements of dimension 0: got 0"),
    ],
)
def test_refused_tensor_maps(cases, change, message):
    row = np.zeros(22, np.int32)
    row[:2] = 2, 3
    row[2:4], row[7:9], row[12:14] = (64, 13), (2, 128), (64, 8)
    for at, value in change.items():
        row[at] = value
    data = aligned((13, 64))
    assert message in cases.carry(0, data, data, row, np.zeros(256, np.uint32))
    row[:2] = 2, 3
    row[2:4], row[7:9], row[12:14] = (64, 12), (2, 128), (64, 8)
    assert "data at a multiple of 16 bytes" in cases.carry(0, data.ravel()[1:], data, row, np.zeros(256, np.uint32))
