"""What RNN, LSTM and GRU share: checking arguments, stacking layers, packing and unpacking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from fusedseq import ops
from fusedseq.nn.twins import Fused, TorchLSTM, TorchRNNBase, base_name

#: y, h_n, c_n, c_all: what one layer, or a stack of them, gives back.
Scanned = tuple[Any, Tensor, Tensor | None, Any]

is_compiling = torch.compiler.is_compiling

ArgumentErrors = (ops.ArgumentValueError, ops.ArgumentTypeError)

if TYPE_CHECKING:
    _Base = TorchRNNBase
else:
    _Base = object


def foreign(tensors: list[Tensor]) -> bool:
    """Whether a tensor brings its own __torch_function__: torch's functions are all that it is sure to know."""
    # The first test is cheap, but also true under any torch function mode, such as a default device.
    return has_torch_function(tensors) and any(type(t) not in (Tensor, Parameter) for t in tensors)


def refusal(module: torch.nn.Module, input: Any, hx: Any, error: Exception | None = None) -> Exception:
    """What torch.nn raises for these arguments, or `error` if it is torch.nn that would take them."""
    stock: Any = super(Fused, module)
    try:
        if isinstance(input, PackedSequence) and isinstance(module, TorchLSTM):
            # The one forward of torch.nn that checks nothing itself: oneDNN would read past the end of the data.
            module.check_input(input.data, input.batch_sizes)
            if hx is not None:
                module.check_forward_args(input.data, hx, input.batch_sizes)
        stock.forward(input, hx)
    except Exception as e:
        return e
    return error or TypeError(f"fusedseq.{base_name(type(module))} does not take these arguments, though torch.nn does")


def record(module: torch.nn.Module, proxy: Proxy, *args: Any, **kwargs: Any) -> Any:
    """Stay one node in a symbolic trace, as the modules of torch.nn do."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    args = (proxy, *args) if any(a is not None for a in args) else (proxy,)
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


class ScanModule(Fused, _Base):
    """Comes before a recurrent module of torch.nn among the bases of ours.

    The operator checks its arguments anyway, so the checks here are those that it cannot make. Whatever is refused
    is handed to torch's own forward, so that errors are of its type, wording and order, whatever version of
    torch is installed; only arguments that torch.nn lacks are refused in our own words.
    """

    # A default on the class serves modules that were pickled, or fused, without the attribute.
    recompute_gates: bool = False
    # Packed weights of every layer, if the module is frozen; see `fusedseq.freeze`.
    _frozen: list[ops.Frozen] | None = None

    @property
    def _flat_weights(self) -> list[Any]:
        # torch keeps a list and repairs it in forward; read on demand, it cannot be stale.
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: weights are read where they are, so there is no faster layout to bring them into."""

    def _weights(self) -> list[Tensor]:
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            # Weight norm, pruning and parametrizations leave an attribute or a property of the name instead.
            return [getattr(self, name) for name in self._flat_weights_names]

    def _stock_forward(self, input: Any, hx: Any) -> Scanned:
        output, state = super().forward(input, hx)
        return (output, *state, None) if isinstance(state, tuple) else (output, state, None, None)

    def _run(
        self,
        cell: str,
        input: Any,  # [T, B, I], [B, T, I], [T, I] or a PackedSequence
        hx: Any,  # h0 [L*D, B, R], for LSTM (h0, c0 [L*D, B, H])
        resets: Any,
        lengths: Tensor | None,
        cells: bool,
    ) -> Scanned:
        if self._repeat is not None and resets is None and lengths is None and not cells:
            step = self._step_again(cell, input, hx)
            if step is not None:
                return step
        if not isinstance(input, Tensor):
            return self._run_packed(cell, input, hx, resets, lengths, cells)
        shape = input.shape
        if len(shape) != 3:
            return self._run_unbatched(cell, input, hx, resets, lengths, cells)
        weights = self._weights()
        plain = resets is None and lengths is None and not cells
        if plain and shape[1 if self.batch_first else 0] == 1 and not is_compiling():
            return self._step(cell, input, hx, weights)
        return self._long_way(cell, input, hx, weights, resets, lengths, cells)

    def _drops(self) -> bool:
        return bool(self.dropout and self.training and self.num_layers > 1)

    def _step_again(self, cell: str, input: Any, hx: Any) -> Scanned | None:
        """A step without options that the module was asked for before, as streams take them; None for anything else.

        Before all other checks, which cost as much as the step.
        """
        if is_compiling() or type(input) is not Tensor or self._drops():
            return None
        repeat = self._repeat
        assert repeat is not None and repeat.zeros is not None  # as a layer's are
        h0, c0 = hx, None
        if hx is None:
            h0, c0 = repeat.zeros
        elif cell == "lstm":
            if type(hx) not in (tuple, list) or len(hx) != 2:
                return None
            h0, c0 = hx
            if type(c0) is not Tensor:
                return None
        if type(h0) is not Tensor:
            return None
        step = repeat(cell, input, h0, c0, self._weights())
        return None if step is None else (*step, None)

    def _step(self, cell: str, input: Tensor, hx: Any, weights: list[Tensor]) -> Scanned:
        """One step without options, the long way."""
        scanned = self._long_way(cell, input, hx, weights, None, None, False)
        if not torch.is_grad_enabled() and not self._drops():
            h0, c0 = (hx, None) if cell != "lstm" or hx is None else self._pair(input, hx)
            self._expect(cell, input, h0, c0, weights, scanned[0], self.num_layers, bool(self.bidirectional))
        return scanned

    def _long_way(
        self, cell: str, input: Tensor, hx: Any, weights: list[Tensor], resets: Any, lengths: Any, cells: bool
    ) -> Scanned:
        shape = input.shape
        if foreign(weights) and resets is None and lengths is None and not cells:
            return self._stock_forward(input, hx)
        h0, c0 = (hx, None) if cell != "lstm" or hx is None else self._pair(input, hx)
        batch_first = self.batch_first
        if not shape[1 if batch_first else 0] or (h0 is not None and not isinstance(h0, Tensor)):
            raise refusal(self, input, hx)
        try:
            return self._layers(cell, input, h0, c0, weights, batch_first, lengths, None, resets, cells)
        except ArgumentErrors as e:
            raise refusal(self, input, hx, e) from None

    def _run_unbatched(
        self, cell: str, input: Tensor, hx: Any, resets: Tensor | None, lengths: Tensor | None, cells: bool
    ) -> Scanned:
        states = hx if isinstance(hx, (tuple, list)) else (() if hx is None else (hx,))
        if input.dim() != 2 or any(not isinstance(s, Tensor) or s.dim() != 2 for s in states):
            raise refusal(self, input, hx)
        dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = states[0].unsqueeze(1) if hx is states[0] else tuple(s.unsqueeze(1) for s in states)
        # What does not fit goes on as it is, for the operator to name.
        if isinstance(resets, Tensor) and resets.dim() == 1:
            resets = resets.unsqueeze(dim)
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.unsqueeze(0)
        y, h_n, c_n, c_all = self._run(cell, input.unsqueeze(dim), hx, resets, lengths, cells)
        return (
            y.squeeze(dim),
            h_n.squeeze(1),
            None if c_n is None else c_n.squeeze(1),
            None if c_all is None else c_all.squeeze(dim),
        )

    def _run_packed(self, cell: str, input: Any, hx: Any, resets: Any, lengths: Tensor | None, cells: bool) -> Scanned:
        if not isinstance(input, PackedSequence):
            raise refusal(self, input, hx)
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if lengths is not None:
            raise ValueError("lengths cannot be given with a PackedSequence, which has its own")
        if isinstance(resets, PackedSequence):
            if not torch.equal(resets.batch_sizes, batch_sizes):
                raise ValueError("resets must have the batch_sizes of the input")
            resets = resets.data
        weights = self._weights()
        if foreign(weights) and resets is None and not cells:
            return self._stock_forward(input, hx)
        h0, c0 = (hx, None) if cell != "lstm" or hx is None else self._pair(input, hx)
        if h0 is not None and not isinstance(h0, Tensor):
            raise refusal(self, input, hx)
        try:
            if sorted_indices is not None:
                h0 = None if h0 is None else h0.index_select(1, sorted_indices)
                c0 = None if c0 is None else c0.index_select(1, sorted_indices)
            y, h_n, c_n, c_all = self._layers(cell, x, h0, c0, weights, False, None, batch_sizes, resets, cells)
        except (*ArgumentErrors, IndexError) as e:
            raise refusal(self, input, hx, e) from None
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        if c_all is not None:
            c_all = PackedSequence(c_all, batch_sizes, sorted_indices, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n, c_n, c_all

    def _pair(self, input: Any, hx: Any) -> tuple[Tensor, Tensor]:
        """An LSTM's hx as its two tensors."""
        if isinstance(hx, (tuple, list)) and len(hx) == 2:
            h0, c0 = hx
            if isinstance(h0, Tensor) and isinstance(c0, Tensor):
                return h0, c0
        raise refusal(self, input, hx)

    def _layers(
        self,
        cell: str,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: list[Tensor],
        batch_first: bool,
        lengths: Tensor | None,
        batch_sizes: Tensor | None,
        resets: Tensor | None,
        cells: bool,
    ) -> Scanned:
        bidirectional = bool(self.bidirectional)
        layers = self.num_layers
        if layers == 1:
            return ops.scan(
                cell, x, h0, c0, weights, bidirectional=bidirectional, batch_first=batch_first,
                lengths=lengths, batch_sizes=batch_sizes, resets=resets, cells=cells,
                recompute=self.recompute_gates, frozen=self._frozen[0] if self._frozen else None,
            )  # fmt: skip
        directions, n = (2 if bidirectional else 1), len(weights) // layers
        for state in (h0, c0):
            if state is not None and state.shape[0] != layers * directions:
                raise ops.ArgumentValueError(
                    f"hx: expected states of {layers * directions} layers and directions, got {state.shape[0]}"
                )
        h0s = [None] * layers if h0 is None else torch.split(h0, directions)
        c0s = [None] * layers if c0 is None else torch.split(c0, directions)
        hs: list[Tensor] = []
        cs: list[Any] = []
        c_all = None
        for layer in range(layers):
            last = layer == layers - 1
            x, h_n, c_n, c_all = ops.scan(
                cell, x, h0s[layer], c0s[layer], weights[layer * n : (layer + 1) * n], bidirectional=bidirectional,
                batch_first=batch_first, lengths=lengths, batch_sizes=batch_sizes, resets=resets, cells=cells and last,
                recompute=self.recompute_gates, frozen=self._frozen[layer] if self._frozen else None,
            )  # fmt: skip
            hs.append(h_n)
            cs.append(c_n)
            if self.dropout and self.training and not last:
                x = torch.dropout(x, self.dropout, True)
        return x, torch.cat(hs), torch.cat(cs) if cell == "lstm" else None, c_all
