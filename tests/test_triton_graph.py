"""A CUDA graph can hold a Triton scan: its launches depend on sizes only, and nothing waits for the GPU.

Without a GPU this is shown on tensors that have no data (device `meta`), the kernels replaced by a record of their
launches: whatever would read data back fails there, and whatever would copy from the host is seen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedseq
from fusedseq import registry
from fusedseq.testing.cases import CELLS, GATES

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fusedseq.backends import triton_cell, triton_scan
from fusedseq.kernels import pointwise

T, B, I = 5, 20, 6
SIZES = {"resident": 24, "streamed": 70, "step": 300}
Launches = list[tuple[str, tuple[int, ...]]]


class Watch(TorchDispatchMode):
    """Operations that have a tensor of the host among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.host: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        if any(isinstance(t, Tensor) and t.device.type == "cpu" for t in flat):
            self.host.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found: Launches = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **options: found.append((self.name, grid))

    for module, names in (
        (triton_scan.forward_kernels, ("resident_forward", "streamed_forward", "step_forward")),
        (triton_scan.backward_kernels, ("resident_backward", "streamed_backward", "step_backward")),
        (pointwise, ("forward", "backward")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    return found


def walk(cell: str, H: int, lengths: Tensor | None = None) -> Watch:
    """Both passes over tensors without data."""
    x = torch.empty(T, B, I, device="meta")
    h0 = torch.empty(1, B, H, device="meta")
    c0 = torch.empty_like(h0) if cell == "lstm" else None
    G = GATES[cell]
    weights = [torch.empty(shape, device="meta") for shape in ((G * H, I), (G * H, H), (G * H,), (G * H,))]
    resets = None if lengths is not None else torch.empty(T, B, dtype=torch.bool, device="meta")
    options = (False, False, lengths, None, resets)
    with Watch() as watch:
        y, h_n, c_n, _, reserve = triton_scan.scan_forward(cell, x, h0, c0, weights, *options, False, 1)
        up = [torch.empty_like(t) if t is not None else None for t in (y, h_n, c_n)]
        triton_scan.scan_backward(cell, *up, None, x, h0, c0, weights, *options, y, reserve, True, True)
    return watch


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("cell", CELLS)
def test_a_scan_reads_nothing_back_and_copies_nothing(cell: str, kind: str, launches: Launches) -> None:
    watch = walk(cell, SIZES[kind])
    assert watch.count and watch.host == []
    names = [name for name, _ in launches]
    phases = 2 if cell == "gru_reset_before" else 1
    many = {"step": (T * phases, T * phases + 1)}.get(kind, (1, 1))
    assert names == [f"{kind}_forward"] * many[0] + [f"{kind}_backward"] * many[1]
    again = list(launches)
    launches.clear()
    walk(cell, SIZES[kind])
    assert launches == again


@pytest.mark.parametrize("cell", CELLS)
def test_nor_does_a_single_cell(cell: str, launches: Launches) -> None:
    H, G = 40, GATES[cell]
    x, h = torch.empty(B, I, device="meta"), torch.empty(B, H, device="meta")
    c = torch.empty_like(h) if cell == "lstm" else None
    weights = [torch.empty(shape, device="meta") for shape in ((G * H, I), (G * H, H), (G * H,), (G * H,))]
    with Watch() as watch:
        h_new, _, reserve = triton_cell.cell_forward(cell, x, h, c, weights, 1)
        triton_cell.cell_backward(cell, h, c, x, h, c, weights, h_new, reserve, True, True)
    assert watch.count and watch.host == []
    phases = 2 if cell == "gru_reset_before" else 1
    assert [name for name, _ in launches] == ["forward"] * phases + ["backward"] * phases


def test_lengths_are_copied_from_the_host(launches: Launches) -> None:
    """Which a graph cannot hold; docs/triton.md says so."""
    watch = walk("lstm", SIZES["step"], torch.full((B,), T))
    assert watch.host and all("copy" in name for name in watch.host)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to capture on")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_capture_and_replay(cell: str) -> None:
    module = getattr(fusedseq, cell)(I, SIZES["step"]).cuda()
    x = torch.randn(T, B, I, device="cuda")
    with fusedseq.use_backend("triton"), torch.no_grad():
        module(x)  # compiled before, as torch's documents want it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = module(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, module(x)[0])
