"""Utilisation and power of a GPU while something runs, through NVML."""

from __future__ import annotations

import statistics
import threading
from types import TracebackType
from typing import Any


def load() -> tuple[Any, str]:
    """The module pynvml, ready for use, or None and the reason."""
    try:
        import pynvml
    except ImportError:
        return None, 'nvidia-ml-py is not installed: pip install "fusedseq[bench]"'
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"NVML does not start: {error}"
    return pynvml, ""


class Watch:
    """Samples a GPU every few milliseconds between entering and leaving the block."""

    def __init__(self, nvml: Any, index: int = 0, period: float = 0.02) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self._period = period
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._samples: list[tuple[float, float]] = []

    def _sample(self) -> None:
        while not self._done.wait(self._period):
            busy = self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
            watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3
            self._samples.append((busy, watts))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def summary(self) -> dict[str, float]:
        """Median utilisation in percent and power in watts; empty if nothing was sampled."""
        if not self._samples:
            return {}
        busy, watts = zip(*self._samples, strict=True)
        return {"utilisation": statistics.median(busy), "watts": statistics.median(watts)}
