"""What nvcc made of the GPU kernels: registers, stack (where spills go) and tensor-core instructions, against a budget.

`make cuda` compiles them and runs this; elsewhere it is skipped. Where a change is meant to move the numbers:
`python tests/test_cuda_resources.py` writes tests/data/cuda_resources.json anew, for the diff to be looked at.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGET = Path(__file__).parent / "data" / "cuda_resources.json"
ARCHS = ("sm_80", "sm_90a")
# Bytes of stack, in the copies of a tile: on an H200 the kernel was 1.7 times as fast as its form without.
SPILLED = {f"attention_backward_keys_kernel {dtype} 64 true": 8 for dtype in ("bfloat16", "float16")}
CELLS = ("lstm", "gru", "gru_reset_before", "rnn")
Usage = dict[str, dict[str, list[int]]]  # arch -> kernel -> [registers, bytes of stack]


def objects() -> list[Path]:
    found = sorted((ROOT / "build").glob("cuda-*/*.o"))
    sources = [*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cuh")]
    names = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    fresh = {path.stem for path in found} >= names and all(
        path.stat().st_mtime <= max(one.stat().st_mtime for one in found) for path in sources
    )
    if not fresh:
        if os.environ.get("FUSEDSEQ_CUDA") == "1":
            pytest.fail("build/cuda-* does not hold what the sources say: the build went wrong")
        pytest.skip("the GPU kernels are not compiled, or no longer current: `make cuda` does both")
    return [path for path in found if path.stem in names]


def disassembler() -> str:
    """cuobjdump, from the toolkit or from Triton's package."""
    triton = importlib.util.find_spec("triton")
    homes = (triton.submodule_search_locations or ()) if triton else ()
    for place in (None, *(f"{home}/backends/nvidia/bin" for home in homes), "/usr/local/cuda/bin"):
        found = shutil.which("cuobjdump", path=place)
        if found:
            return found
    pytest.skip("there is no cuobjdump")


def dump(*arguments: str) -> str:
    done = subprocess.run([disassembler(), *arguments], capture_output=True, text=True, check=True)
    return subprocess.run(["c++filt"], input=done.stdout, capture_output=True, text=True, check=True).stdout


def plain(function: str) -> str:
    """`persistent_forward lstm bfloat16 BlockChannel` of a demangled kernel."""
    found = re.search(r"(\w+)(?:<(.*?)>)?\((?:fusedseq|Cuda|\))", function)
    assert found is not None, function
    words = re.sub(r"\(fusedseq::Cell\)(\d)", lambda m: CELLS[int(m[1])], found[2] or "")
    words = re.sub(r"fusedseq::device::|\(anonymous namespace\)::|__nv_|,", " ", words).replace("__half", "float16")
    return " ".join([found[1], *words.split()])


@functools.cache
def measured() -> Usage:
    usage: Usage = {arch: {} for arch in ARCHS}
    for path in objects():
        arch = ""
        text = dump("--dump-resource-usage", str(path))
        for line in re.findall(r"arch = (\w+)|Function (.*):\s*\n\s*REG:(\d+) STACK:(\d+)", text):
            if line[0]:
                arch = line[0]
            else:
                usage[arch][plain(line[1])] = [int(line[2]), int(line[3])]
    return {arch: dict(sorted(kernels.items())) for arch, kernels in usage.items()}


def test_every_kernel_has_a_budget_and_keeps_it() -> None:
    budget = json.loads(BUDGET.read_text())
    usage = measured()
    for arch in ARCHS:
        assert usage[arch].keys() == budget[arch].keys(), "kernels came or went: python tests/test_cuda_resources.py"
        over = {
            name: f"{used} of {budget[arch][name]}"
            for name, used in usage[arch].items()
            if any(now > most for now, most in zip(used, budget[arch][name], strict=True))
        }
        assert not over, f"{arch}: registers and stack beyond the budget: {over}"


def functions(path: Path, arch: str) -> dict[str, list[tuple[int, str]]]:
    """Of each kernel its instructions and where they stand."""
    found = {}
    for function in dump("-sass", "-arch", arch, str(path)).split("Function :")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", function)
        found[plain(function.split("\n", 1)[0])] = [(int(at, 16), text) for at, text in lines]
    return found


def loop_around(instructions: list[tuple[int, str]], what: str) -> list[str]:
    """The widest loop that holds an instruction: of a scan, its steps."""
    marks = [at for at, text in instructions if what in text]
    loops = []
    for at, text in instructions:
        target = re.search(r"BRA\b.*?0x([0-9a-f]+)", text)
        if target and any(int(target[1], 16) <= mark <= at for mark in marks):
            loops.append((int(target[1], 16), at))
    assert loops, f"{what} stands in no loop"
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    return [text for at, text in instructions if first <= at <= last]


def test_no_persistent_kernel_of_half_types_spills_on_hopper() -> None:
    kernels = {name: used for name, used in measured()["sm_90a"].items() if name.startswith("persistent")}
    # Tiers, passes and operand types; and of half types those with weights in registers, and packed in tier grid.
    assert len(kernels) == 3 * 2 * 4 * len(CELLS) + 2 * 2 * 2 * len(CELLS) + 2 * 2 * len(CELLS)
    for name, (registers, stack) in kernels.items():
        assert 256 * registers <= 65536, f"{name}: {registers} registers"
        # Where weights come into registers, once, some may pass through the stack.
        assert stack == 0 or "float16" not in name or name.endswith("Holding"), f"{name}: {stack} bytes of stack"


@pytest.mark.parametrize("arch", ARCHS)
def test_no_step_with_weights_in_registers_spills(arch: str) -> None:
    """Where they are loaded, once, a few of them may pass through the stack."""
    seen = 0
    for path in objects():
        if path.stem not in ("block", *(("cluster",) if arch != "sm_80" else ())):
            continue
        for name, instructions in functions(path, arch).items():
            if name.endswith("Holding"):
                step = loop_around(instructions, "HMMA")
                assert not [text for text in step if re.search(r"\b(LDL|STL)\b", text)], f"{name}: spills in its step"
                seen += 1
    assert seen == 2 * 2 * len(CELLS) * (1 if arch == "sm_80" else 2)


def test_a_step_in_a_cluster_waits_for_no_fence_of_the_whole_gpu() -> None:
    (path,) = (one for one in objects() if one.stem == "cluster")
    for name, instructions in functions(path, "sm_90a").items():
        assert any("MEMBAR.ALL.GPU" in text for _, text in instructions), f"{name}: the first barrier has none?"
        step = loop_around(instructions, "UBLKCP")
        fences = [text for text in step if "CCTL" in text or ("MEMBAR" in text and "MEMBAR.ALL.CTA" not in text)]
        assert not fences, f"{name}: {fences} in its step"


def test_warps_that_go_their_own_way_keep_their_weights_in_registers() -> None:
    """128 of 255 a thread: nothing of a step lies on the stack, and its warps meet no barrier but the one backward."""
    (path,) = (one for one in objects() if one.stem == "warp_scan")
    kernels = functions(path, "sm_90a")
    assert len(kernels) == 2 * 3 * 3, "passes, half types and TF32, cells"
    for name, instructions in kernels.items():
        step = loop_around(instructions, "HMMA")

        def count(what: str, step: list[str] = step) -> int:
            return sum(bool(re.search(rf"\b{what}\b", text)) for text in step)

        assert count("LDL|STL") == 0, f"{name}: spills in its step"
        assert count("HMMA") == (24 if name.startswith("warp_backward gru") else 32), name
        backward = name.startswith("warp_backward")
        # Backward a piece of each tile; forward two, those that all lanes send apart from those that some do.
        assert count("STAS") in (([2] if "Tf32" in name else [4]) if backward else [2, 3, 4]), name
        assert count("BAR") == backward, name


@pytest.mark.parametrize("arch", ARCHS)
def test_half_types_and_tf32_are_multiplied_by_tensor_cores(arch: str) -> None:
    tiers = {"block", "grid"} | ({"cluster"} if arch != "sm_80" else set())
    for path in objects():
        if path.stem not in tiers:
            continue
        seen = 0
        for function in dump("-sass", "-arch", arch, str(path)).split("Function :")[1:]:
            name = plain(function.split("\n", 1)[0])
            if name.startswith("pack_weights"):
                continue
            narrow = "float16" in name or "Tf32" in name
            assert ("HMMA" in function) == narrow, f"{name}: tensor-core instructions, or none where they belong"
            seen += narrow
        # Passes and operand types, half types in two shapes.
        assert seen == 2 * 5 * len(CELLS), path


def test_attention_forward_keeps_to_registers_and_tensor_cores() -> None:
    for arch in ARCHS:
        forward = {name: used for name, used in measured()[arch].items() if name.startswith("attention_forward ")}
        assert len(forward) == 2 * 3 * 3, "dtypes, widths, shapes of a CTA"
        assert all(stack == 0 for _, stack in forward.values()), f"{arch}: spills in {forward}"
        (path,) = (one for one in objects() if one.stem == "attention_forward")
        for function in dump("-sass", "-arch", arch, str(path)).split("Function :")[1:]:
            for instruction in ("HMMA", "LDSM", "LDGSTS", "MUFU.EX2"):
                assert instruction in function, f"{plain(function.splitlines()[0])}: no {instruction} for {arch}"


def test_attention_backward_does_not_spill_and_keeps_to_tensor_cores() -> None:
    counts = {"queries": 2 * 3 * 2, "keys": 2 * 2 * 2, "keys_pairs": 2 * 1 * 2, "bias": 2 * 3}
    for arch in ARCHS:
        for which, count in counts.items():
            name = f"attention_backward_{which}"
            kernels = {one: used for one, used in measured()[arch].items() if one.startswith(f"{name}_kernel ")}
            assert len(kernels) == count, "dtypes, widths (of keys the widest in pairs), plain or not"
            spilled = {one: stack for one, (_, stack) in kernels.items() if stack > SPILLED.get(one, 0)}
            assert not spilled, f"{arch}: bytes of stack: {spilled}"
            (path,) = (one for one in objects() if one.stem == name)
            for function in dump("-sass", "-arch", arch, str(path)).split("Function :")[1:]:
                for instruction in ("HMMA", "LDSM", "LDGSTS", "MUFU.EX2"):
                    assert instruction in function, f"{plain(function.splitlines()[0])}: no {instruction} for {arch}"


def main() -> None:
    BUDGET.parent.mkdir(exist_ok=True)
    lines = []
    for arch, kernels in measured().items():
        rows = ",\n".join(f'    "{name}": {used}' for name, used in kernels.items())
        lines.append(f'  "{arch}": {{\n{rows}\n  }}')
    BUDGET.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
