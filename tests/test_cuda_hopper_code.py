"""What nvcc makes of the Hopper kernels: nothing spilled, products that overlap, the instructions that matter."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_cuda_resources import disassembler

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
Kernels = dict[int, list[str]]  # of a head size, one for each dtype


def compiled(name: str, tmp: Path) -> tuple[str, Kernels]:
    """ptxas's report, and the machine code of the kernels of each head size."""
    cubin = tmp / f"{name}.cubin"
    command = [
        "nvcc", "-std=c++17", "-O3", "-Icsrc", "-DFSQ_ISA=device", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas",
        "-v", "-cubin", f"csrc/cuda/{name}.cu", "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = subprocess.run([disassembler(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    kernels: Kernels = {}
    for kernel in text.split("Function :")[1:]:
        function, code = kernel.split("\n", 1)
        kernels.setdefault(64 if "Li64E" in function else 128, []).append(code)
    assert {width: len(both) for width, both in kernels.items()} == {64: 2, 128: 2}
    return done.stdout + done.stderr, kernels


def check_registers(report: str, kernels: Kernels, consumers: dict[int, int], two: tuple[int, int]) -> None:
    """`consumers` of each head size; `two`: registers after setmaxnreg of the producer and of each of two consumers."""
    # C7510 to C7519: products serialised.
    assert "Potential Performance Loss" not in report and "warpgroup.wait is injected" not in report, report
    assert "setmaxnreg" not in report, report
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill", report) == [("0", "0")] * 4
    first = {2: 168, 3: 128}  # what 384 and 512 threads begin with
    used = sorted(str(first[consumers[width]]) for width in kernels for _ in range(2))
    assert sorted(re.findall(r"Used (\d+) registers", report)) == used
    for width, code in ((width, code) for width, both in kernels.items() for code in both):
        team = consumers[width]
        producer, consumer = two if team == 2 else (32, 160)
        assert producer + team * consumer <= (team + 1) * first[team]
        assert f"USETMAXREG.TRY_ALLOC.CTAPOOL UP0, {consumer:#x}" in code
        parts = code.split(f"USETMAXREG.DEALLOC.CTAPOOL {producer:#x}")
        assert len(parts) == 2
        for part, most in zip(parts, (consumer, producer), strict=True):  # the consumers' code comes first
            assert max(int(number) for number in re.findall(r"\bR(\d+)\b", part)) < most


def products(code: str, pattern: str) -> int:
    return len(re.findall(rf"HGMMA\.{pattern}", code))


IN_REGISTERS = r"x16\.F32\S* R\d+, R\d+, gdesc\[\w+\]"
IN_MEMORY = r"x16\.F32\S* R\d+, gdesc\[\w+\], R"


def instructions(code: str) -> list[str]:
    return [text.strip() for text in re.findall(r"/\*[0-9a-f]{4,}\*/ +([^;]+);", code)]


def left_operands(code: str) -> dict[int, int]:
    """Register of the accumulators that each register of A in registers is multiplied for."""
    found: dict[int, int] = {}
    for text in instructions(code):
        if product := re.match(r"HGMMA\S* R(\d+), R(\d+), gdesc", text):
            sums, first = map(int, product.groups())
            for register in range(first, first + 4):
                assert found.setdefault(register, sums) == sums, (
                    f"{text}: R{register} is A of R{found[register]} as well"
                )
    return found


def written(text: str) -> range:
    """The registers that an instruction other than a product writes."""
    if not (found := re.match(r"(?:@!?U?P\w+ +)?(\S+) +(?:!?U?P\w+, *)*R(\d+)\b", text)):
        return range(0)
    name, first = found[1], int(found[2])
    if re.match(r"ST|RED|HGMMA|SYNCS|BAR|R2UR|UTMA|WARPGROUP|ISETP|FSETP|R2P", name):
        return range(0)
    width = 4 if re.search(r"LDSM\S*\.4|\.128", name) else 2 if re.search(r"\.64|\.WIDE|CS2R", name) else 1
    return range(first, first + width)


def longest_loop(code: str) -> list[str]:
    """The innermost loop with products in it that is the longest."""
    lines = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", code)]
    jumps = [(int(to[1], 16), at) for at, text in lines if (to := re.search(r"BRA 0x([0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first <= last]
    bodies = [
        [text for at, text in lines if first <= at <= last] for first, last in sorted(loops, key=lambda l: l[1] - l[0])
    ]
    return next(body for body in bodies if sum("HGMMA" in text for text in body) >= 8)


def check_in_flight(code: str) -> None:
    """From a product's issue to the wait for it nobody writes its operands or accumulators: along the code, and from
    one turn of the main loop to the next."""
    for run in (instructions(code), 2 * longest_loop(code)):
        groups: list[set[int]] = [set()]
        for text in run:
            if product := re.match(r"HGMMA\.64x(\d+)\S* R(\d+), (?:R(\d+), )?gdesc", text):
                columns, sums = int(product[1]), int(product[2])
                groups[-1].update(range(sums, sums + columns // 2))
                if product[3]:
                    groups[-1].update(range(int(product[3]), int(product[3]) + 4))
                if "gsb0" in text:
                    groups.append(set())
            elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", text):
                assert not groups[-1], f"{text}: products in no group"
                groups = groups[max(len(groups) - 1 - int(wait[1]), 0) :]
            else:
                assert not set().union(*groups) & set(written(text)), f"{text}: a product in flight uses this"


def waits(code: str, pending: int) -> int:
    return len(re.findall(rf"WARPGROUP\.DEPBAR\.LE gsb0, {pending:#x} ", code))


def test_forward(tmp_path: Path) -> None:
    report, kernels = compiled("attention_hopper", tmp_path)
    check_registers(report, kernels, {64: 3, 128: 2}, (40, 232))
    for width, both in kernels.items():
        for code in both:
            assert code.count("UTMALDG.4D") >= 3 * width // 64  # Q, K, V in panels of 64 columns
            # Weights in registers, values read along their rows; in the loop and after it.
            assert products(code, f"64x{width}{IN_REGISTERS}\\.tnspB") == 2 * 128 // 16
            assert products(code, f"64x128{IN_MEMORY}") == 2 * width // 16  # scores
            assert waits(code, 1) == 1  # softmax begins when the scores are there and the values' product is not
            left_operands(code)
            check_in_flight(code)


@pytest.mark.parametrize("which", ["keys", "queries"])
def test_backward(which: str, tmp_path: Path) -> None:
    report, kernels = compiled(f"attention_hopper_{which}", tmp_path)
    check_registers(report, kernels, {64: 2 if which == "keys" else 3, 128: 2}, (24, 240))
    for width, both in kernels.items():
        for code in both:
            assert code.count("UTMALDG.4D") == 4 * width // 64  # two tensors that are owned, two that go past
            # Of S and dP those whose left operand is held in registers: K and V, or Q and dO, or Q alone.
            held = {("keys", 64): 2, ("keys", 128): 0, ("queries", 64): 1, ("queries", 128): 2}[which, width]
            assert products(code, f"64x64{IN_REGISTERS}, R") + products(code, f"64x64{IN_MEMORY}") >= 2 * width // 16
            assert products(code, f"64x64{IN_MEMORY}") == (2 - held) * width // 16
            # P^T and dS^T, or dS, in registers; Q and dO, or K, read along their rows.
            sums = 2 if which == "keys" else 1
            assert products(code, f"64x{width}{IN_REGISTERS}\\.tnspB") == sums * 64 // 16
            assert waits(code, 1) == 1  # exponentials begin when S is there and dP is not
            # Operands that are held for the whole loop are nobody else's: see ptx::wgmma_keep.
            in_registers = held * width // 16 + sums * 64 // 16
            assert len(left_operands(code)) == 4 * in_registers
            check_in_flight(code)
