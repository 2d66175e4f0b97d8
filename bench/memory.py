"""Peak memory of a piece of work: by how much the process grew beyond what it held before."""

from __future__ import annotations

import ctypes
import json
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .case import Case
from .peers import build, takes
from .work import Refusal, Runner, make

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
# Fresh processes whose median is the peak memory: an allocator does not grow alike every time.
PROCESSES = 3


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024


def _highest() -> int:
    """The most that the process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _give_back() -> None:
    """What glibc keeps of freed memory would be used again without the process growing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def growth(work: Callable[[], object], device: str = "cpu") -> tuple[int, str]:
    """Bytes by which `work` raised the peak over the state just before it, and how that was measured."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
    _give_back()
    try:
        CLEAR.write_text("5")  # makes the high-water mark fall to what is resident now
        before = _status("VmRSS")
    except OSError:
        # The mark cannot be reset: what was freed before the work began hides as much growth.
        before = _highest()
        work()
        return _highest() - before, "ru_maxrss"
    work()
    return max(0, _status("VmHWM") - before), "VmHWM"


def fresh(module: str, function: str, request: Mapping[str, Any], what: str) -> int:
    """What a function of a module prints when given the request as JSON, a number: the median of fresh processes."""
    code = f"import sys; from {module} import {function}; {function}(sys.argv[1])"
    taken = []
    for _ in range(PROCESSES):
        done = subprocess.run([sys.executable, "-c", code, json.dumps(request)], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
            raise RuntimeError(f"measuring the memory of {what} failed: {last}")
        taken.append(int(done.stdout.split()[-1]))
    return int(statistics.median(taken))


@dataclass(frozen=True)
class Peak:
    """Of one peer in one case: bytes beyond the inputs, or the reason why there are none."""

    case: Case
    peer: str
    bytes: int | None
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": str(self.case),
            "case": self.case.fields(),
            "peer": self.peer,
            "bytes": self.bytes,
            "reason": self.reason,
        }


def peaks(cases: Sequence[Case], peers: Sequence[str], told: Callable[[str], None]) -> Iterator[Peak]:
    """Each peer of each case, in processes of its own."""
    for case in cases:
        for peer in peers:
            if not takes(peer, case):
                continue
            told(f"{case}: {peer}")
            request = {"case": case.fields(), "peer": peer, "threads": case.threads or torch.get_num_threads()}
            try:
                yield Peak(case, peer, fresh(__name__, "measure", request, f"{case} ({peer})"))
            except RuntimeError as error:
                yield Peak(case, peer, None, str(error))


def measure(request: str) -> None:
    """Runs in a process of its own; prints the growth over one call."""
    values = json.loads(request)
    torch.set_num_threads(values["threads"])
    case, peer = Case.of(values["case"]), values["peer"]
    # Code and tables that are loaded at first use are not what is measured.
    _runner(case.tiny(), peer).call()
    print(growth(_runner(case, peer).call, case.device)[0])


def _runner(case: Case, peer: str) -> Runner:
    work = make(case)
    work.untried = True
    built = build(peer, work)
    if isinstance(built, Refusal):
        raise SystemExit(built.reason)
    return built
