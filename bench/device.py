"""`make device`: everything that only a machine with a GPU can tell, in one command of at most eight minutes.

Builds the kernels for the GPU at hand, times its barriers, runs the parity matrix on it, a small part of it under
compute-sanitizer, and times ours beside torch's kernels. Needs no network: python, torch, nvcc, pybind11, setuptools
and pytest; what is missing skips its part and is named in the table. Writes device.json and device.md to
bench/results/<gpu>/ after every part. Run from the root of a checkout:
python bench/device.py [--part rnn|attention|all] [--dry-run]

It imports nothing of the package, which it builds first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 480.0  # seconds
# No part may take what the ones after it need.
LIMITS = {"build": 200.0, "barriers": 40.0, "parity": 150.0, "sanitizer": 75.0, "benchmark": 480.0}
TOOLS = ("memcheck", "racecheck", "synccheck")
BACKENDS = {"rnn": ("cuda", "triton"), "attention": ("cuda", "triton")}
TESTS = {
    "rnn": [
        "tests/test_parity.py",
        "tests/test_cuda_cells.py",
        "tests/test_cuda_tiers_device.py",
        "tests/test_triton_cells.py",
        "tests/test_triton_graph.py",
    ],
    "attention": [
        "tests/test_attention_parity.py",
        "tests/test_rows_parity.py",
        "tests/test_cuda_hopper_device.py",
        "tests/test_triton_descriptors.py",
    ],
}
# One case that uses most of a kernel: both directions, lengths, resets, several tiles of units.
SANITIZED = {
    "rnn": "cuda-lstm-bf16-T7B3I5H33 or cuda-gru-f16-T4B7I3H17",
    "attention": " or ".join(
        f"cuda-attention-bf16-{case}"
        for case in ("B2H2L65S65E32-left7", "B1H4K2L100S100E32-packed", "B2H4K1L2S600E16", "B2H2L19S40E80-dense")
    ),
}


@dataclass
class Part:
    """What became of one part. `status` is ok, failed, skipped or cut (its time ran out)."""

    name: str
    status: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Report:
    gpu: str
    part: str
    versions: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    parts: list[Part] = field(default_factory=list)
    barriers: list[dict[str, Any]] = field(default_factory=list)
    benchmark: dict[str, Any] = field(default_factory=dict)


def run(command: Sequence[str], limit: float, extra: dict[str, str] | None = None) -> tuple[int | None, str]:
    """Exit status (None: the time ran out) and the end of what was printed. Nothing that it started outlives it."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | (extra or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
        return process.returncode, output[-8000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output[-8000:]


def device() -> tuple[str, str]:
    """Name and compute capability of the GPU, as torch sees it; empty without one."""
    try:
        import torch
    except ImportError:
        return "", ""
    if not torch.cuda.is_available():
        return "", ""
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}"


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "pybind11", "pytest", "xdist"):
        code = f"import {name}; print({name}.__version__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        found[name] = done.stdout.strip() if done.returncode == 0 else "not installed"
    for tool in ("nvcc", "compute-sanitizer"):
        found[tool] = shutil.which(tool) or "not found"
    return found


class Session:
    """The parts in order, within the time."""

    def __init__(self, part: str, out: Path | None, whole: float = WHOLE, dry_run: bool = False) -> None:
        gpu, self.capability = device()
        self.kinds = ("rnn", "attention") if part == "all" else (part,)
        self.report = Report(gpu or "no GPU", part, versions(), dry_run)
        self.dry_run = dry_run
        self.library = ROOT / "build" / "device" / "lib"
        self.ends = time.monotonic() + whole
        slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") or "no-gpu"
        self.out = out or ROOT / "bench" / "results" / slug

    def go(self) -> Report:
        for name, step in (
            ("build", self.build), ("barriers", self.barriers), ("parity", self.parity),
            ("sanitizer", self.sanitizer), ("benchmark", self.benchmark),
        ):  # fmt: skip
            started = time.monotonic()
            left = min(LIMITS[name], self.ends - started)
            if left < 5:
                self.report.parts.append(Part(name, "skipped", 0.0, "no time was left"))
            else:
                print(f"make device: {name}, at most {left:.0f} s", file=sys.stderr, flush=True)
                for one in step(left):
                    self.report.parts.append(one)
                self.report.parts[-1].seconds = time.monotonic() - started
            self.write()
        return self.report

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "device.json").write_text(json.dumps(asdict(self.report), indent=1) + "\n")
        (self.out / "device.md").write_text(table(self.report))

    def _python(self, *arguments: str) -> list[str]:
        # -P: what was built for this GPU comes first, not what lies in the checkout.
        return [sys.executable, "-P", *arguments]

    def _environment(self) -> dict[str, str]:
        paths = [str(self.library), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "" if self.capability else "1"}

    def build(self, limit: float) -> list[Part]:
        cuda = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
        arch = "90a" if self.capability == "90" else self.capability or "90a"
        extra = {
            "FUSEDSEQ_CUDA": "1" if cuda and not self.dry_run else "0", "FUSEDSEQ_CUDA_ARCHS": arch,
            "FUSEDSEQ_REQUIRE_CORE": "1",
        }  # fmt: skip
        base = self.library.parent
        command = ["setup.py", "-q", "build", "--build-base", str(base), "--build-lib", str(self.library)]
        status, output = run([sys.executable, *command], limit, extra)
        with_cuda = f"sm_{arch}" if extra["FUSEDSEQ_CUDA"] == "1" else "without the CUDA kernels"
        why = "" if cuda else " (nvcc not found)"
        return [_part("build", status, f"{with_cuda}{why}" if status == 0 else output)]

    def barriers(self, limit: float) -> list[Part]:
        if "rnn" not in self.kinds:
            return [Part("barriers", "skipped", 0.0, "scans were not asked for")]
        out = self.out / "barriers.json"
        self.out.mkdir(parents=True, exist_ok=True)
        command = self._python("-m", "fusedseq.bench.barriers")
        if self.dry_run or not self.capability:
            status, output = run([*command, "--list"], limit, self._environment())
            count = len(output.splitlines())
            return [Part("barriers", "skipped" if status == 0 else "failed", 0.0, f"{count} loops, listed only")]
        out.unlink(missing_ok=True)
        status, output = run([*command, "--out", str(out)], limit, self._environment())
        if out.exists():
            self.report.barriers = json.loads(out.read_text())
            out.unlink()
        return [_part("barriers", status, f"{len(self.report.barriers)} loops" if status == 0 else output)]

    def parity(self, limit: float) -> list[Part]:
        if shutil.which("pytest") is None and self.report.versions["pytest"] == "not installed":
            return [Part("parity", "skipped", 0.0, "pytest is not installed")]
        tests = [one for kind in self.kinds for one in TESTS[kind]]
        # What Triton compiles for all rows would take half an hour of one core.
        command = self._python(
            "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "cuda or triton", "--pairs"
        )
        if self.report.versions["xdist"] != "not installed":
            command += ["-n", str(min(16, os.cpu_count() or 1))]
        if self.dry_run or not self.capability:
            status, output = run([*command, "--collect-only"], limit, self._environment())
            last = output.strip().splitlines()[-1] if output.strip() else ""
            return [Part("parity", "skipped" if status == 0 else "failed", 0.0, f"collected only: {last}")]
        status, output = run(command, limit, self._environment())
        last = output.strip().splitlines()[-1] if output.strip() else ""
        return [_part("parity", status, last if status == 0 else output)]

    def sanitizer(self, limit: float) -> list[Part]:
        tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if tool is None or self.dry_run or not self.capability:
            reasons = ("there is no GPU", not self.capability), ("compute-sanitizer not found", tool is None)
            why = next((reason for reason, holds in reasons if holds), "dry run")
            return [Part("sanitizer", "skipped", 0.0, why)]
        found = []
        chosen = " or ".join(f"({SANITIZED[kind]})" for kind in self.kinds)
        tests = [one for kind in self.kinds for one in TESTS[kind][:1]]
        inner = self._python("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen)
        for one in TOOLS:
            command = [tool, "--tool", one, "--error-exitcode", "86", "--target-processes", "all", *inner]
            status, output = run(command, limit / len(TOOLS), self._environment())
            found.append(_part(f"sanitizer {one}", status, "nothing found" if status == 0 else output))
        return found

    def benchmark(self, limit: float) -> list[Part]:
        out = self.out / "benchmark.json"
        self.out.mkdir(parents=True, exist_ok=True)
        command = self._python("-m", "fusedseq.bench.device_cases", "--part", self.report.part)
        if self.dry_run or not self.capability:
            status, output = run([*command, "--list"], limit, self._environment())
            count = len(output.splitlines())
            return [Part("benchmark", "skipped" if status == 0 else "failed", 0.0, f"{count} cases, listed only")]
        out.unlink(missing_ok=True)
        ours = limit - 10
        status, output = run([*command, "--seconds", str(ours - 20), "--out", str(out)], ours, self._environment())
        if out.exists():
            self.report.benchmark = json.loads(out.read_text())
            out.unlink()
        missed = len(self.report.benchmark.get("not_reached", []))
        return [_part("benchmark", status, f"{missed} cases not reached" if status == 0 else output)]


def _part(name: str, status: int | None, detail: str) -> Part:
    return Part(name, "cut" if status is None else "ok" if status == 0 else "failed", 0.0, detail)


def table(report: Report) -> str:
    """The report for people."""
    lines = [f"# `make device` on {report.gpu}", ""]
    if report.dry_run or report.gpu == "no GPU":
        lines += ["Nothing here was measured: this is a dry run.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report.versions.items()), ""]
    lines += ["| part | result | s | |", "|---|---|---|---|"]
    for one in report.parts:
        detail = one.detail.strip().replace("|", "\\|").splitlines()
        lines.append(f"| {one.name} | {one.status} | {one.seconds:.0f} | {detail[-1][:200] if detail else ''} |")
    lines += _barriers(report.barriers)
    cases = report.benchmark.get("cases", [])
    lines += _rates([case for case in cases if case["case"].startswith("attention")])
    cases = [case for case in cases if not case["case"].startswith("attention")]
    if cases:
        lines += ["", "| case | ours, ms | torch, ms | times faster | how | torch's kernel |"]
        lines += ["|---|---|---|---|---|---|"]
    ratios = []
    for case in cases:
        ours, rival = (_median(case, names) for names in (("fusedseq",), ("cudnn", "torch")))
        ratio = rival / ours if ours and rival else None
        ratios += [ratio] if ratio and not case.get("copy") else []
        how = " / ".join(sorted({f"{p['tier']} {p['ranks']}x{p['rows']}" for p in case.get("plans", {}).values()}))
        kernel = (case.get("kernels", {}).get("torch") or [""])[0]
        lines.append(
            f"| {case['case']} | {_ms(ours)} | {_ms(rival)} | {f'{ratio:.2f}' if ratio else _why(case)} | "
            f"{case.get('backend', '')} {how} | {kernel[:60]} |"
        )
    if ratios:
        product = 1.0
        for ratio in ratios:
            product *= ratio ** (1 / len(ratios))
        lines += ["", f"Geometric mean over {len(ratios)} cases: {product:.2f}; lowest {min(ratios):.2f}."]
    lines += _bandwidths([case for case in cases if case.get("copy")])
    return "\n".join(lines) + "\n"


def _rates(cases: Sequence[dict[str, Any]]) -> list[str]:
    """TFLOP/s of attention, ours beside all others; where there is none, why."""
    if not cases:
        return []
    names = list(dict.fromkeys(name for case in cases for name in case["peers"]))
    lines = ["", "Attention, TFLOP/s (a masked half counts for nothing).", ""]
    lines += [f"| case | backend | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for case in cases:
        rates = []
        for name in names:
            peer = case["peers"].get(name)
            seconds = peer["median"] if peer else None
            rates.append(f"{case['operations'] / seconds / 1e12:.1f}" if seconds else peer["status"] if peer else "")
        lines.append(f"| {case['case']} | {case.get('backend', '')} | {' | '.join(rates)} |")
    reasons = Counter(
        f"{name}: {peer['reason']}" for case in cases for name, peer in case["peers"].items() if peer.get("reason")
    )
    lines += [""] if reasons else []
    lines += [f"- {reason} ({count} case{'s' if count > 1 else ''})" for reason, count in reasons.items()]
    return lines


def _barriers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Clocks of each barrier beside those that the choice of a tier assumes for a step."""
    if not rows:
        return []
    lines = ["", "Barriers, clocks of a round: alone, and handing a word on. A step is what a tier has of them.", ""]
    lines += [
        "| barrier | CTAs | threads | alone | with a word | ns | a step | assumed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "clocks" not in row:
            told = ["", "", "", row.get("reason", "").replace("|", "\\|")[:120], row.get("assumed") or ""]
        else:
            step = f"{row['per_step'] * row['clocks']:.0f}" if row.get("assumed") else ""
            told = [
                f"{row['clocks']:.0f}",
                f"{row['clocks_handed']:.0f}",
                f"{row['ns']:.0f}",
                step,
                row["assumed"] or "",
            ]
        lines.append(f"| {row['kind']} | {row['ctas']} | {row['threads']} | {' | '.join(map(str, told))} |")
    return lines


def _bandwidths(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What is limited by memory: its rate, beside a copy of as many bytes."""
    if not cases:
        return []
    names = [name for name in ("fusedseq", "triton") if any(name in case["peers"] for case in cases)]
    heads = "".join(f" {name}, GB/s | of copy |" for name in names)
    lines = ["", f"| case |{heads}", f"|---|{'---|---|' * len(names)}"]
    for case in cases:
        told = []
        for name in names:
            seconds = _median(case, (name,))
            told += (
                [f"{case['bytes'] / seconds / 1e9:.0f}", f"{100 * case['copy'] / seconds:.0f}%"]
                if seconds
                else ["", ""]
            )
        lines.append(f"| {case['case']} | {' | '.join(told)} |")
    return lines


def _median(case: dict[str, Any], names: Sequence[str]) -> float | None:
    return next((case["peers"][name]["median"] for name in names if name in case["peers"]), None)


def _ms(seconds: float | None) -> str:
    return f"{1e3 * seconds:.3f}" if seconds else ""


def _why(case: dict[str, Any]) -> str:
    reasons = [peer["reason"] for peer in case["peers"].values() if peer.get("reason")]
    return reasons[0].replace("|", "\\|")[:80] if reasons else ""


def main(arguments: Sequence[str] | None = None, session: Callable[..., Session] = Session) -> int:
    parser = argparse.ArgumentParser(prog="make device", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--part", choices=("rnn", "attention", "all"), default="all")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results/<gpu>)")
    parser.add_argument("--seconds", type=float, default=WHOLE)
    parser.add_argument("--dry-run", action="store_true", help="build, collect and list, but run nothing on a GPU")
    options = parser.parse_args(arguments)
    report = session(options.part, options.out, options.seconds, options.dry_run).go()
    print(table(report))
    return 1 if any(part.status == "failed" for part in report.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
