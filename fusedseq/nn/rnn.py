"""RNN, LSTM and GRU: torch.nn's modules over the fused scan, with a few things that torch.nn lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.fx import Proxy

from fusedseq.nn.scan import ScanModule, record
from fusedseq.nn.twins import FUSED, TorchGRU, TorchLSTM, TorchRNN


class RNN(ScanModule, TorchRNN):
    r"""Elman's recurrent network (Elman 1990, "Finding Structure in Time") with tanh or ReLU; see `torch.nn.RNN`.

    At every step :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`, or ReLU in place of tanh.
    Parameters, their names and initialisation, state_dict, errors and results are those of `torch.nn.RNN`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: layers L, each fed with the output of the one before.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[B, T, ...]`` in place of ``[T, B, ...]``; states stay as they are.
        dropout: probability of zeroing an element of a layer's output on its way to the next layer, in training.
        bidirectional: a second scan runs from the end of each sequence; D = 2 directions.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.

    Inputs:
        input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence. T >= 1.
        hx: ``[L*D, B, H]`` (``[L*D, H]`` unbatched), zeros if not given.
        resets: bool, the layout of input without its features (a PackedSequence with a PackedSequence, or ``[N]``).
            Where true, the state is set to zero before that step, and no gradient passes.
        lengths: int64 ``[B]``, steps of each row. Beyond them the output is zero, and the final state is
            that after the row's last step. The reverse direction starts there.

    Outputs:
        output ``[T, B, D*H]`` in the layout of the input, and the final states h_n, shaped like hx.

    Raises:
        What torch.nn.RNN raises: ValueError for an input of another dtype or number of dimensions, RuntimeError for
        other shapes.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Any = None,
            dtype: Any = None,
        ) -> None: ...

    def forward(
        self, input: Any, hx: Tensor | None = None, *, resets: Any = None, lengths: Tensor | None = None
    ) -> Any:
        """Return ``output, h_n``; shapes in the class docstring."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return record(self, input, hx, resets=resets, lengths=lengths)
        cell = "rnn_relu" if self.mode == "RNN_RELU" else "rnn_tanh"
        y, h_n, _, _ = self._run(cell, input, hx, resets, lengths, False)
        return y, h_n


class LSTM(ScanModule, TorchLSTM):
    r"""Long short-term memory (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000).

    At every step, with :math:`\sigma` the logistic function and gates in the order i, f, g, o in the weights:

    .. math::
        i, f, o = \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}), \quad g = \tanh(\ldots), \quad
        c_t = f c_{t-1} + i g, \quad h_t = o \tanh(c_t)

    and with ``proj_size`` :math:`h_t` is further multiplied by :math:`W_{hr}` (Sak et al. 2014). Parameters, their
    names and initialisation, state_dict, errors and results are those of `torch.nn.LSTM`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the cell state, H.
        num_layers: layers L, each fed with the output of the one before.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[B, T, ...]`` in place of ``[T, B, ...]``; states stay as they are.
        dropout: probability of zeroing an element of a layer's output on its way to the next layer, in training.
        bidirectional: a second scan runs from the end of each sequence; D = 2 directions.
        proj_size: features of the projected hidden state, R; 0 for none (then R = H).
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32, and
            the cell state stays in float32 through a scan.
        return_cells: return the last layer's cell state of every step as well (torch.nn has no such thing).
        recompute_gates: keep no gates from the forward pass for the backward pass, which forms them again from the
            states: less memory, about a third more time. Results and gradients are the same.

    Inputs:
        input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence. T >= 1.
        hx: ``(h_0 [L*D, B, R], c_0 [L*D, B, H])``, without B if unbatched; zeros if not given.
        resets: bool, the layout of input without its features (a PackedSequence with a PackedSequence, or ``[N]``).
            Where true, both states are set to zero before that step, and no gradient passes.
        lengths: int64 ``[B]``, steps of each row. Beyond them the output is zero, and the final states are
            those after the row's last step. The reverse direction starts there.

    Outputs:
        output ``[T, B, D*R]`` in the layout of the input, and ``(h_n, c_n)``, shaped like hx; with ``return_cells``
        also cells ``[T, B, D*H]``, laid out like output and differentiable.

    Raises:
        What torch.nn.LSTM raises: ValueError for an input of another dtype or number of dimensions, RuntimeError for
        other shapes.
    """

    # A default on the class serves modules that were pickled, or fused, without the attribute.
    return_cells: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: Any = None,
            dtype: Any = None,
            *,
            return_cells: bool = False,
            recompute_gates: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, return_cells=False, recompute_gates=False, **kwargs):
            super().__init__(*args, **kwargs)
            if recompute_gates:
                self.recompute_gates = True
            if return_cells:
                self.return_cells = True

    def forward(self, input: Any, hx: Any = None, *, resets: Any = None, lengths: Tensor | None = None) -> Any:
        """Return ``output, (h_n, c_n)``, with ``return_cells`` ``output, (h_n, c_n), cells``."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return record(self, input, hx, resets=resets, lengths=lengths)
        cells = self.return_cells
        y, h_n, c_n, c_all = self._run("lstm", input, hx, resets, lengths, cells)
        return (y, (h_n, c_n), c_all) if cells else (y, (h_n, c_n))

    def extra_repr(self) -> str:
        options = ("return_cells", "recompute_gates")
        return super().extra_repr() + "".join(f", {name}=True" for name in options if getattr(self, name))

    def beyond_torch(self) -> str | None:
        return "return_cells=True" if self.return_cells else None


class GRU(ScanModule, TorchGRU):
    r"""Gated recurrent unit (Cho et al. 2014); see `torch.nn.GRU`.

    At every step, with :math:`\sigma` the logistic function and gates in the order r, z, n in the weights:

    .. math::
        r, z = \sigma(W x_t + b_{ih} + U h_{t-1} + b_{hh}), \quad
        n = \tanh(W_n x_t + b_{in} + r (U_n h_{t-1} + b_{hn})), \quad
        h_t = (1 - z) n + z h_{t-1}

    The paper, and Keras 1, reset the state before the product: :math:`U_n (r h_{t-1}) + b_{hn}`. That form is
    ``reset_after=False``. Parameters, their names and initialisation, state_dict, errors and results are those of
    `torch.nn.GRU`.

    Args:
        input_size: features of the input, I.
        hidden_size: features of the state, H.
        num_layers: layers L, each fed with the output of the one before.
        bias: whether there are ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[B, T, ...]`` in place of ``[T, B, ...]``; states stay as they are.
        dropout: probability of zeroing an element of a layer's output on its way to the next layer, in training.
        bidirectional: a second scan runs from the end of each sequence; D = 2 directions.
        device, dtype: of the parameters. float32, float64, bfloat16 and float16; half types compute in float32.
        reset_after: apply the reset gate after the recurrent product, as torch.nn does, or before it.
        recompute_gates: keep no gates from the forward pass for the backward pass, which forms them again from the
            states: less memory, about a third more time. Results and gradients are the same.

    Inputs:
        input: ``[T, B, I]``, ``[B, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence. T >= 1.
        hx: ``[L*D, B, H]`` (``[L*D, H]`` unbatched), zeros if not given.
        resets: bool, the layout of input without its features (a PackedSequence with a PackedSequence, or ``[N]``).
            Where true, the state is set to zero before that step, and no gradient passes.
        lengths: int64 ``[B]``, steps of each row. Beyond them the output is zero, and the final state is
            that after the row's last step. The reverse direction starts there.

    Outputs:
        output ``[T, B, D*H]`` in the layout of the input, and the final states h_n, shaped like hx.

    Raises:
        What torch.nn.GRU raises: ValueError for an input of another dtype or number of dimensions, RuntimeError for
        other shapes.
    """

    # A default on the class serves modules that were pickled, or fused, without the attribute.
    reset_after: bool = True

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Any = None,
            dtype: Any = None,
            *,
            reset_after: bool = True,
            recompute_gates: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, reset_after=True, recompute_gates=False, **kwargs):
            super().__init__(*args, **kwargs)
            if recompute_gates:
                self.recompute_gates = True
            if not reset_after:
                self.reset_after = False

    def forward(
        self, input: Any, hx: Tensor | None = None, *, resets: Any = None, lengths: Tensor | None = None
    ) -> Any:
        """Return ``output, h_n``; shapes in the class docstring."""
        if type(input) is not Tensor and isinstance(input, Proxy):
            return record(self, input, hx, resets=resets, lengths=lengths)
        cell = "gru" if self.reset_after else "gru_reset_before"
        y, h_n, _, _ = self._run(cell, input, hx, resets, lengths, False)
        return y, h_n

    def extra_repr(self) -> str:
        before = "" if self.reset_after else ", reset_after=False"
        return super().extra_repr() + before + (", recompute_gates=True" if self.recompute_gates else "")

    def beyond_torch(self) -> str | None:
        return None if self.reset_after else "reset_after=False"


FUSED.update({TorchRNN: RNN, TorchLSTM: LSTM, TorchGRU: GRU})
