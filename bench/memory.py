"""Peak memory of a piece of work: by how much the process grew beyond what it held before."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {name}")
    return int(found[1]) * 1024


def _highest() -> int:
    """The most that the process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(work: Callable[[], object], device: str = "cpu") -> tuple[int, str]:
    """Bytes by which `work` raised the peak over the state just before it, and how that was measured."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "torch.cuda.max_memory_allocated"
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
