"""What the parity matrix leaves of the Triton row kernels: wide rows, several tiles for a program, their limits."""

from __future__ import annotations

import pytest
import torch

import fusedseq
from fusedseq import registry
from fusedseq.ops import bias_activation, layer_norm
from fusedseq.testing import device_of
from fusedseq.testing.row_cases import RowCase, check_rows, evaluate_rows, make_rows

if (reason := registry.backends()["triton"].missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

from fusedseq.backends import triton_rows

DEVICE = device_of("triton")
RUN = {"layer_norm": layer_norm.run, "bias_activation": bias_activation.run}


@pytest.mark.parametrize(
    "text",
    [
        "layer_norm-3x2047-residual-weight-bias-dropout-sum",
        "layer_norm-2x4096-weight-bias",
        "bias_activation-5x1300-bias-gelu-dropout-residual",
    ],
)
def test_wide_rows(text: str) -> None:
    case = RowCase(text)
    with fusedseq.use_backend("triton"):
        check_rows(RUN[case.op], case, torch.float32, DEVICE)


@pytest.mark.parametrize(
    "text", ["layer_norm-70x40-residual-weight-bias-dropout", "bias_activation-70x40-bias-silu-dropout"]
)
def test_programs_that_take_several_tiles(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rows, "_SHARES", 2)
    case = RowCase(text)
    with fusedseq.use_backend("triton"):
        check_rows(RUN[case.op], case, torch.float32, DEVICE)


def test_rows_do_not_depend_on_each_other() -> None:
    whole = make_rows(RowCase("layer_norm-33x70-residual-weight-bias-dropout-sum"), torch.float32, DEVICE)
    first = {
        name: t[:5] if isinstance(t, torch.Tensor) and t.dim() == 2 else t
        for name, t in whole.problem._asdict().items()
    }
    part = whole._replace(problem=type(whole.problem)(**first), upstream=[t[:5] for t in whole.upstream])
    with fusedseq.use_backend("triton"):
        together, alone = evaluate_rows(layer_norm.run, whole), evaluate_rows(layer_norm.run, part)
    for name in ("out0", "out1", "dx", "dresidual"):
        assert torch.equal(together[name][:5], alone[name]), name


def test_limits() -> None:
    module = registry.backends()["triton"]
    call = registry.RowCall("layer_norm", DEVICE, torch.float32, 3, 4096, "", False, True, True, False)
    assert module.supports(call) is None
    assert "these have 4112" in module.supports(call._replace(d=4112))
    assert "multiples of 16" in module.supports(call._replace(d=2050))
    assert module.supports(call._replace(op="bias_activation", d=100_000)) is None
    assert module.supports(call._replace(dtype=torch.float64)) == "it has no kernel for torch.float64"
