"""Matrix fragments on the emulator, against the tables of the PTX ISA (9.7.14.5, "Matrix fragments")."""

import numpy as np
import pytest
from emulated import missing_tools

pytestmark = pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools()))

LANES = np.arange(32)
GROUP, MEMBER = LANES >> 2, LANES % 4  # the ISA's groupID and threadID_in_group


def fragment_a(i: int, halves: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the element a_i of A, [16,16] of halves or [16,8] of tf32, for each lane."""
    if halves:
        return GROUP + (0 if i < 2 or 4 <= i < 6 else 8), MEMBER * 2 + (i & 1) + (0 if i < 4 else 8)
    return GROUP + (0 if i in (0, 2) else 8), MEMBER + (0 if i in (0, 1) else 4)


def fragment_b(i: int, halves: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same of B, [16,8] or [8,8]."""
    if halves:
        return MEMBER * 2 + (i & 1) + (0 if i < 2 else 8), GROUP
    return MEMBER + 4 * i, GROUP


def fragment_d(i: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of C and D, [16,8]."""
    return GROUP + (0 if i < 2 else 8), MEMBER * 2 + (i & 1)


def bf16(x: np.ndarray) -> np.ndarray:
    """The bits of x, which bfloat16 represents."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).view(np.uint16)


def packed(elements: list[np.ndarray], to_bits) -> np.ndarray:
    """Registers [32, n / 2] of the elements' bits, the lower element in the lower half."""
    bits = [to_bits(element).astype(np.uint32) for element in elements]
    return np.ascontiguousarray(np.stack([bits[i] | bits[i + 1] << 16 for i in range(0, len(bits), 2)], 1))


def small_integers(*shape: int) -> np.ndarray:
    """Values whose products and sums every type here holds exactly."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("kind, to_bits", [(0, bf16), (1, half)], ids=["bf16", "f16"])
def test_mma_of_halves(cases, kind, to_bits):
    a, b, c = small_integers(16, 16), small_integers(16, 8), small_integers(16, 9)[:, :8]
    registers_a = packed([a[fragment_a(i, True)] for i in range(8)], to_bits)
    registers_b = packed([b[fragment_b(i, True)] for i in range(4)], to_bits)
    d = np.ascontiguousarray(np.stack([c[fragment_d(i)] for i in range(4)], 1))
    assert cases.fragments(kind, registers_a, registers_b, d) == ""
    wanted = a @ b + c
    for i in range(4):
        assert np.array_equal(d[:, i], wanted[fragment_d(i)])


def test_mma_of_tf32(cases):
    a, b, c = small_integers(16, 8), small_integers(8, 8), small_integers(16, 9)[:, :8]
    # Bits that the tensor core ignores.
    noise = np.float32(1 + 2**-12)
    registers_a = np.ascontiguousarray(np.stack([a[fragment_a(i, False)] * noise for i in range(4)], 1))
    registers_b = np.ascontiguousarray(np.stack([b[fragment_b(i, False)] * noise for i in range(2)], 1))
    d = np.ascontiguousarray(np.stack([c[fragment_d(i)] for i in range(4)], 1))
    assert cases.fragments(2, registers_a, registers_b, d) == ""
    wanted = a @ b + c
    for i in range(4):
        assert np.array_equal(d[:, i], wanted[fragment_d(i)])


def tf32(x: np.ndarray) -> np.ndarray:
    """x rounded to 10 bits of mantissa, ties away from zero, by arithmetic on its fraction."""
    fraction, exponent = np.frexp(x.astype(np.float64))
    scaled = np.abs(fraction) * 2**11
    return (np.sign(fraction) * np.ldexp(np.floor(scaled + 0.5), exponent - 11)).astype(np.float32)


def test_rounding_to_tf32(cases):
    ties = np.float32([1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 2 - 2**-23, 2.0**-126])
    drawn = np.random.default_rng(1).standard_normal(200).astype(np.float32) * np.float32(2.0) ** np.arange(-100, 100)
    x = np.concatenate([ties, drawn.astype(np.float32)])
    bits = np.zeros(len(x), np.uint32)
    assert cases.round_tf32(x, bits, len(x)) == ""
    assert not np.any(bits & 0x1FFF)
    assert np.array_equal(bits.view(np.float32), tf32(x))
    assert tf32(ties[:5]).tolist() == [1 + 2**-10, 1 + 2**-9, -1 - 2**-10, 1, 2]

    # Infinities, what overflows, a negative zero, and the NaN of a GPU's arithmetic and of this processor's.
    special = np.uint32([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x80000000, 0x7FFFFFFF, 0x7FC00000])
    bits = np.zeros(len(special), np.uint32)
    assert cases.round_tf32(special.view(np.float32), bits, len(special)) == ""
    assert bits[:4].tolist() == [0x7F800000, 0xFF800000, 0x7F800000, 0x80000000]
    assert np.isnan(bits[4:].view(np.float32)).all()


@pytest.mark.parametrize("bug", range(6))
def test_tile_of_tf32(cases, bug):
    # Operands of 11 bits and more, so that rounding and cutting off differ; their products are exact in float32.
    rng = np.random.default_rng(2)
    a, b = (rng.integers(-(2**13), 2**13, shape).astype(np.float32) for shape in ((16, 8), (8, 8)))
    d = np.full((16, 8), np.nan, np.float32)
    error = cases.tile_tf32(bug, a, b, d)
    wanted = tf32(a).astype(np.float64) @ tf32(b).astype(np.float64).T
    close = np.allclose(d, wanted, rtol=0, atol=2**-20 * np.abs(a).max() * np.abs(b).max())
    if bug == 5:
        assert "race: " in error
    else:
        assert error == "" and close == (bug == 0)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(cases, count, transposed):
    matrices = np.random.default_rng(count).integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    registers = np.zeros((32, count), np.uint32)
    assert cases.load_matrices(count, transposed, matrices, registers) == ""
    for k, matrix in enumerate(matrices):
        m = matrix.T if transposed else matrix
        assert np.array_equal(registers[:, k] & 0xFFFF, m[GROUP, 2 * MEMBER])
        assert np.array_equal(registers[:, k] >> 16, m[GROUP, 2 * MEMBER + 1])


@pytest.mark.parametrize("bug", range(6))
def test_tile(cases, bug):
    a, b = small_integers(16, 16), small_integers(8, 16)
    d = np.full((16, 8), np.nan, np.float32)
    error = cases.tile(bug, bf16(a), bf16(b), d)
    right = np.array_equal(d, a @ b.T)
    if bug == 0:
        assert error == "" and right
    elif bug == 1:
        assert error == "" and not right  # two fragments exchanged: a wrong number, like on a GPU
    else:
        messages = {
            2: ["ldmatrix<4> out of bounds: 16 bytes"],
            3: ["ldmatrix<4> misaligned"],
            4: ["race: "],
            # Which of the two depends on the schedule.
            5: ["of its warp wait for it in mma_m16n8k16<bf16>", "which has exited"],
        }[bug]
        assert any(message in error for message in messages), error
