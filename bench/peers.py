"""Who is timed: fusedseq and its peers. How each runs a case is in `<kind>_peers.py`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .case import Case
from .work import Refusal, Runner, Work


@dataclass(frozen=True)
class Peer:
    about: str
    rival: bool = True  # takes part in the choice of the best peer
    default: bool = True  # runs without being named
    companion: bool = False  # ours, beside some cases; not a word about all the others


PEERS: dict[str, Peer] = {
    "fusedseq": Peer("this project", rival=False),
    "torch": Peer("torch's module or function, eager; an RNN's on a GPU is cuDNN, and named so in results"),
    "eager": Peer("attention as matmul, softmax, matmul"),
    "onnxruntime": Peer("ONNX Runtime, inference"),
    "stepwise": Peer("a Python loop around torch.nn's cells"),
    # Compiling takes longer than all else, and not everyone can freeze: these must be asked for.
    "flex": Peer("torch.compile of FlexAttention; compiles for up to half a minute per case", default=False),
    "flash": Peer("torch's FlashAttention kernel, on a GPU", default=False),
    "cudnn-attention": Peer("cuDNN's attention in torch, on a GPU", default=False),
    "efficient": Peer("torch's memory-efficient attention kernel, on a GPU", default=False),
    "compile": Peer("torch.compile of torch.nn; compiles for up to half a minute per case", default=False),
    "frozen": Peer("fusedseq with `freeze`", rival=False, default=False, companion=True),
    "triton": Peer("fusedseq on its Triton kernels, on a GPU", rival=False, default=False, companion=True),
    "padded": Peer("fusedseq on padded rows, beside a packed case", rival=False, companion=True),
}
DEFAULT_PEERS = tuple(name for name, peer in PEERS.items() if peer.default)


def takes(name: str, case: Case) -> bool:
    """Whether a peer has anything to do with cases of this kind."""
    return name in _builders(case)


def build(name: str, work: Work) -> Runner | Refusal:
    """May be slow: it is called once per case, before anything is timed."""
    built: Runner | Refusal = _builders(work.case)[name](work)
    return built


def _builders(case: Case) -> dict[str, Callable[[Any], Runner | Refusal]]:
    found: dict[str, Callable[[Any], Runner | Refusal]] = importlib.import_module(
        f".{case.kind}_peers", __package__
    ).BUILD
    return found


def shown(name: str, case: Case) -> str:
    """The name of a peer in results."""
    return case.native_gpu if name == "torch" and case.device == "cuda" else name
