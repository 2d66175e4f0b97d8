"""RNNCell, LSTMCell and GRUCell: one step at a time, for loops that decide the next input as they go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy

from fusedseq import ops
from fusedseq.nn.scan import ArgumentErrors, foreign, is_compiling, record, refusal
from fusedseq.nn.twins import FUSED, Fused, TorchGRUCell, TorchLSTMCell, TorchRNNCell, TorchRNNCellBase

if TYPE_CHECKING:
    _Base = TorchRNNCellBase
else:
    _Base = object


class CellModule(Fused, _Base):
    """Comes before a cell of torch.nn among the bases of ours; bad arguments are torch's to word, as in ScanModule."""

    def _weights(self) -> list[Tensor]:
        p: dict[str, Any] = self._parameters
        try:
            w_ih, w_hh, b_ih, b_hh = p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]
        except KeyError:
            # Weight norm, pruning and parametrizations leave an attribute or a property of the name instead.
            w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if b_ih is not None and b_hh is not None:
            return [w_ih, w_hh, b_ih, b_hh]
        if b_ih is b_hh:
            return [w_ih, w_hh]
        # torch.nn lets one of the two be taken away.
        zeros = torch.zeros_like(b_hh if b_ih is None else b_ih)
        return [w_ih, w_hh, zeros if b_ih is None else b_ih, zeros if b_hh is None else b_hh]

    def _run(self, cell: str, input: Any, hx: Any) -> Any:
        """Step a cell whose whole state is h: input [B, I] or [I], hx [B, H], [H] or None -> h' like hx."""
        if not isinstance(input, Tensor) or not (hx is None or isinstance(hx, Tensor)):
            raise refusal(self, input, hx)
        shape = input.shape
        if len(shape) == 1 and (hx is None or hx.dim() == 1):
            return self._run(cell, input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)).squeeze(0)
        weights = self._weights()
        compiling = is_compiling()
        if not compiling and hx is not None:
            step = self._again(cell, input, hx, None, weights)
            if step is not None:
                return step[1]
        if foreign(weights):
            return super().forward(input, hx)
        try:
            h = ops.cell(cell, input, hx, None, weights)[0]
        except ArgumentErrors as e:
            raise refusal(self, input, hx, e) from None
        if not compiling:
            self._expect(cell, input, hx, None, weights, None)
        return h


class RNNCell(CellModule, TorchRNNCell):
    r"""One step of Elman's network (Elman 1990): :math:`h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.

    Inputs: input ``[B, I]`` or ``[I]``; hx ``[B, H]`` or ``[H]``, zeros if not given.

    Outputs: the next state, shaped like hx.

    Raises:
        What torch.nn.RNNCell raises: ValueError for a wrong number of dimensions, RuntimeError for other shapes, dtypes
        or an unknown nonlinearity.
    """

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """Return the next state."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return record(self, input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise refusal(self, input, hx)
        return self._run("rnn_relu" if self.nonlinearity == "relu" else "rnn_tanh", input, hx)


class LSTMCell(CellModule, TorchLSTMCell):
    r"""One step of the LSTM (Hochreiter & Schmidhuber 1997, Gers et al. 2000); formulas in `fusedseq.LSTM`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of each state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.

    Inputs: input ``[B, I]`` or ``[I]``; hx ``(h, c)``, each ``[B, H]`` or ``[H]``, zeros if not given.

    Outputs: ``(h', c')``, shaped like hx.

    Raises:
        What torch.nn.LSTMCell raises: ValueError for a wrong number of dimensions, RuntimeError for other shapes or
        dtypes.
    """

    def forward(self, input: Any, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        """Return the next ``(h, c)``."""
        if type(input) is not Tensor:
            if isinstance(input, Proxy):
                return record(self, input, hx)
            if not isinstance(input, Tensor):
                raise refusal(self, input, hx)
        h = c = None
        if hx is not None:
            if not (isinstance(hx, (tuple, list)) and len(hx) == 2):
                raise refusal(self, input, hx)
            h, c = hx
            if not (isinstance(h, Tensor) and isinstance(c, Tensor)):
                raise refusal(self, input, hx)
        shape = input.shape
        if len(shape) == 1 and (h is None or c is None or h.dim() == c.dim() == 1):
            state = None if h is None or c is None else (h.unsqueeze(0), c.unsqueeze(0))
            h, c = self.forward(input.unsqueeze(0), state)
            return h.squeeze(0), c.squeeze(0)
        weights = self._weights()
        compiling = is_compiling()
        if not compiling and h is not None:
            step = self._again("lstm", input, h, c, weights)
            if step is not None:
                return step[1:]
        if foreign(weights):
            return super().forward(input, hx)
        try:
            new = ops.cell("lstm", input, h, c, weights)
        except ArgumentErrors as e:
            raise refusal(self, input, hx, e) from None
        if not compiling:
            self._expect("lstm", input, h, c, weights, None)
        return new


class GRUCell(CellModule, TorchGRUCell):
    r"""One step of the gated recurrent unit (Cho et al. 2014); formulas in `fusedseq.GRU`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.
        reset_after: apply the reset gate after the recurrent product, as torch.nn does, or before it (the paper).

    Inputs: input ``[B, I]`` or ``[I]``; hx ``[B, H]`` or ``[H]``, zeros if not given.

    Outputs: the next state, shaped like hx.

    Raises:
        What torch.nn.GRUCell raises: ValueError for a wrong number of dimensions, RuntimeError for other shapes or
        dtypes.
    """

    # A default on the class serves modules that were pickled, or fused, without the attribute.
    reset_after: bool = True

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            bias: bool = True,
            device: Any = None,
            dtype: Any = None,
            *,
            reset_after: bool = True,
        ) -> None: ...

    else:

        def __init__(self, *args, reset_after=True, **kwargs):
            super().__init__(*args, **kwargs)
            if not reset_after:
                self.reset_after = False

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        """Return the next state."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return record(self, input, hx)
        return self._run("gru" if self.reset_after else "gru_reset_before", input, hx)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def beyond_torch(self) -> str | None:
        return None if self.reset_after else "reset_after=False"


FUSED.update({TorchRNNCell: RNNCell, TorchLSTMCell: LSTMCell, TorchGRUCell: GRUCell})
