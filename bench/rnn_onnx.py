"""The peer ONNX Runtime: the ONNX node built by hand from the weights, with buffers bound once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .rnn_work import STREAMED, RecurrentWork
from .work import Outcome, Refusal, Runner

# torch.nn's order of the gates, as positions in ONNX's: LSTM i,f,g,o -> i,o,f,c; GRU r,z,n -> z,r,h.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
OPSET = 17
# Threads of the pool wait this long for the next call before they sleep: longer than the gap between two calls, but not
# the default of some 20 ms, which would take a core from the peer whose turn comes next.
SPIN_MICROSECONDS = 2000


def build(work: RecurrentWork) -> Runner | Refusal:
    case = work.case
    if case.mode == "training":
        return Refusal("ONNX Runtime is an inference engine")
    if case.device != "cpu":
        return Refusal("ONNX Runtime is timed on the CPU only")
    if case.dtype != "float32":
        return Refusal(f"ONNX Runtime's recurrent kernels are float32 on the CPU; the case is {case.dtype}")
    if case.proj:
        return Refusal("ONNX has no LSTM with projection")
    session = ort.InferenceSession(model(work), session_options(), providers=["CPUExecutionProvider"])
    return _streaming(work, session) if case.cell or case.mode == "streaming" else _sequence(work, session)


def session_options() -> Any:
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = torch.get_num_threads()
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    return chosen


def model(work: RecurrentWork) -> bytes:
    """One node per layer; inputs x, lengths and the states, outputs y and the states, as the case needs them."""
    case = work.case
    family = case.family.removesuffix("Cell")
    steps = 1 if case.cell else case.T
    rows = case.layers * case.D
    carries = case.cell or case.mode == "streaming"
    nodes, constants = [], []
    x = "x"
    for layer in range(case.layers):
        constants += _weights(work, family, layer)
        states = ["h", "c"][: len(work.state)] if carries else []
        finals = ["h_n", "c_n"][: len(work.state)] if carries else []
        lengths = "lengths" if case.packed else ""
        more: dict[str, Any] = {"linear_before_reset": 1} if family == "GRU" else {}
        nodes.append(
            helper.make_node(
                family,
                [x, *(f"{name}{layer}" for name in "WRB"), lengths, *states],
                [f"Y{layer}", *finals],
                hidden_size=case.H,
                direction="bidirectional" if case.bidirectional else "forward",
                **more,
            )
        )
        # [T, D, B, H] -> [T, B, D * H]
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "shape"], [f"y{layer}"]))
        x = f"y{layer}"
    constants.append(numpy_helper.from_array(np.array([steps, case.B, case.D * case.H]), "shape"))
    nodes.append(helper.make_node("Identity", [x], ["y"]))

    def value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("x", steps, case.B, case.I)]
    inputs += [value("lengths", case.B, kind=TensorProto.INT32)] if case.packed else []
    outputs = [value("y", steps, case.B, case.D * case.H)]
    if carries:
        inputs += [value(name, rows, case.B, case.H) for name in states]
        outputs += [value(name, rows, case.B, case.H) for name in finals]
    graph = helper.make_graph(nodes, case.family, inputs, outputs, constants)
    # An IR version that runtimes of some age still read.
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return made.SerializeToString()


def _weights(work: RecurrentWork, family: str, layer: int) -> list[Any]:
    """W [D, G*H, I], R [D, G*H, H], B [D, 2*G*H] of one layer."""

    def ordered(name: str, suffix: str) -> Tensor:
        full = name if work.case.cell else f"{name}_l{layer}{suffix}"
        gates = getattr(work.module, full).detach().chunk(len(ORDER[family]))
        return torch.cat([gates[i] for i in ORDER[family]])

    suffixes = ("", "_reverse")[: work.case.D]
    made = {
        "W": [ordered("weight_ih", s) for s in suffixes],
        "R": [ordered("weight_hh", s) for s in suffixes],
        "B": [torch.cat([ordered("bias_ih", s), ordered("bias_hh", s)]) for s in suffixes],
    }
    return [numpy_helper.from_array(torch.stack(parts).numpy(), f"{name}{layer}") for name, parts in made.items()]


def _bound(array: np.ndarray[Any, Any]) -> Any:
    """A buffer of the runtime's with a copy of the array: it would share the memory and write into it."""
    return ort.OrtValue.ortvalue_from_numpy(np.array(array, order="C"))


def _sequence(work: RecurrentWork, session: Any) -> Runner:
    case = work.case
    binding = session.io_binding()
    given = {"x": work.x.numpy()}
    if work.lengths is not None:
        given["lengths"] = work.lengths.numpy().astype(np.int32)
    # Kept here, since a binding does not keep them alive.
    values = {name: _bound(array) for name, array in given.items()}
    y = _bound(np.empty((case.T, case.B, case.D * case.H), np.float32))
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("y", y)

    def call() -> Any:
        session.run_with_iobinding(binding)
        return values

    def results() -> Outcome:
        call()
        return {"y": _within(torch.from_numpy(y.numpy().copy()), work)}

    return Runner(call, results, pool="onnxruntime")


def _within(y: Tensor, work: RecurrentWork) -> Tensor:
    """Zero beyond a row's length, as torch.nn's padded result is."""
    if work.lengths is None:
        return y
    rows = [y[:length, b] for b, length in enumerate(work.lengths.tolist())]
    return pad_sequence(rows)


def _streaming(work: RecurrentWork, session: Any) -> Runner:
    """Two bindings, each of which reads the states that the other writes."""
    case = work.case
    x = work.x.numpy().reshape(1, case.B, case.I)
    first = [state.numpy().reshape(case.layers, case.B, case.H) for state in work.state]
    x_value = _bound(x)
    y_value = _bound(np.empty((1, case.B, case.H), np.float32))
    buffers = [[_bound(state) for state in first] for _ in range(2)]
    bindings = []
    for turn in range(2):
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", x_value)
        binding.bind_ortvalue_output("y", y_value)
        for name, source, target in zip("hc", buffers[turn], buffers[1 - turn], strict=False):
            binding.bind_ortvalue_input(name, source)
            binding.bind_ortvalue_output(f"{name}_n", target)
        bindings.append(binding)
    run = session.run_with_iobinding
    turn = 0

    def call() -> Any:
        nonlocal turn
        run(bindings[turn])
        turn ^= 1
        return buffers

    def results() -> Outcome:
        nonlocal turn
        turn = 0
        for buffer, state in zip(buffers[0], first, strict=True):
            buffer.update_inplace(np.ascontiguousarray(state))
        steps = []
        for _ in range(STREAMED):
            call()
            steps.append(torch.from_numpy(y_value.numpy().copy()))
        y = torch.stack(steps)
        return {"y": y[:, 0] if case.cell else y}

    return Runner(call, results, pool="onnxruntime")
