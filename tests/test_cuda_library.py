"""Products by the vendor's library that the CUDA backend calls itself, past torch. A stand-in on the CPU answers.

tests/test_cuda_parity.py has the scans whose steps it forms.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import cuda_emulated
import pytest
import torch
from stand_in import StandIn
from torch import Tensor

from fusedseq.backends import cuda, cuda_products

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _emulator() -> Iterator[None]:
    with cuda.emulated(cuda_emulated.module()):
        yield


def views(rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows * 31 + columns)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    apart = torch.full((rows * 2, columns + 3), torch.nan, dtype=dtype)
    apart[::2, :columns] = draw(rows, columns)
    spread = torch.full((rows, columns, 2), torch.nan, dtype=dtype)
    spread[..., 0] = draw(rows, columns)
    return {
        "dense": draw(rows, columns),
        "transposed": draw(columns, rows).t(),
        "apart": apart[::2, :columns],
        "transposed, apart": draw(columns, rows + 5)[:, :rows].t(),
        "spread": spread[..., 0],
        "expanded": draw(1, columns).expand(rows, columns),
        "expanded along": draw(rows, 1).expand(rows, columns),
    }


SIZES = [(5, 7, 3), (1, 4, 6), (4, 1, 6), (6, 5, 1), (1, 1, 1)]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_layout(sizes: tuple[int, int, int], dtype: torch.dtype, stand_in: StandIn) -> None:
    M, N, K = sizes
    before, asked = stand_in.products, 0
    for left, a in views(M, K, dtype).items():
        for right, b in views(K, N, dtype).items():
            made = cuda_products.product_of(a, b, torch.float32, cuda.core(), None)
            asked += 1
            assert made.dtype == torch.float32 and made.shape == (M, N) and made.is_contiguous()
            exact = a.double() @ b.double()
            torch.testing.assert_close(made.double(), exact, rtol=2e-7, atol=1e-7, msg=f"{left} x {right}")
    assert stand_in.products - before == asked


def test_only_where_it_was_asked_for(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(3, 4).bfloat16(), torch.randn(4, 5).bfloat16()
    before = stand_in.products
    cuda_products.product_of(a, b, torch.bfloat16, cuda.core(), None)  # torch's way to it is short
    cuda_products.product_of(a, b, torch.float32)
    cuda_products.product_of(a.float(), b.float(), torch.float32, cuda.core(), None)
    assert cuda_products.product_of(a[:0], b, torch.float32, cuda.core(), None).shape == (0, 5)
    assert not cuda_products.product_of(a[:, :0], b[:0], torch.float32, cuda.core(), None).any()
    monkeypatch.undo()
    cuda_products.product_of(a, b, torch.float32, cuda.core(), None)
    assert stand_in.products == before


def test_a_library_that_is_not_loaded_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_products, "STAND_IN", "libnowhere.so.7")
    a = torch.randn(3, 3).bfloat16()
    with pytest.raises(RuntimeError, match=r"the library libnowhere\.so\.7 is not loaded"):
        cuda_products.product_of(a, a, torch.float32, cuda.core(), None)


def test_what_the_library_refuses_is_said(stand_in: StandIn) -> None:
    core: Any = cuda.core()
    memory = torch.empty(2**21, dtype=torch.uint8)
    where = (cuda_products.STAND_IN, 0, None, cuda_products.aligned(memory), 2**20)
    a, into = torch.ones(4, 4), torch.empty(4, 4)
    operand = (a.data_ptr(), 4, False)
    core.library_product(where, (4, 4, 4), operand, operand, into.data_ptr(), 0, 0, False)
    assert (into == 4).all()
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with status 7"):
        core.library_product(where, (4, 4, 4), (a.data_ptr(), 3, False), operand, into.data_ptr(), 0, 0, False)
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with status 15"):
        core.library_product(where, (4, 4, 4), operand, operand, into.data_ptr(), 0, 1, False)
    with pytest.raises(RuntimeError, match="cublasSetWorkspace failed with status 7"):
        core.library_product((*where[:3], None, 0), (4, 4, 4), operand, operand, into.data_ptr(), 0, 0, False)
    with pytest.raises(RuntimeError, match="a device below 64 was expected, got 64"):
        core.library_product((where[0], 64, *where[2:]), (4, 4, 4), operand, operand, into.data_ptr(), 0, 0, False)


def test_threads_have_connections_of_their_own(stand_in: StandIn) -> None:
    """With one for all, a thread could find its workspace given up by another that sets its stream."""
    a, b = torch.randn(9, 8).bfloat16(), torch.randn(8, 7).bfloat16()
    expected = cuda_products.product_of(a, b, torch.float32, cuda.core(), None)
    wrong: list[Any] = []

    def work() -> None:
        try:
            for _ in range(300):
                if not torch.equal(cuda_products.product_of(a, b, torch.float32, cuda.core(), None), expected):
                    wrong.append("another product")
        except RuntimeError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
