"""Keep packed weights from call to call, for serving."""

from __future__ import annotations

from typing import TypeVar

import torch

from fusedseq.nn.scan import ScanModule
from fusedseq.ops import Frozen

M = TypeVar("M", bound=torch.nn.Module)


def freeze(model: M) -> M:
    """Let every fused RNN, LSTM and GRU in `model` keep its weights as the kernels read them, beside the parameters.

    Calls without gradients then do not pack them anew, which is most of a call on few short sequences. It costs
    as much memory again as these weights. Weights that change in the usual ways (an optimizer, load_state_dict, copy_,
    another tensor in their place) are packed again by the next call. Changes that PyTorch does not count, above all
    writing to ``weight.data``, are not noticed: call `freeze` again after them. Results are the same bits.

    Args:
        model: a module; fused cells in it work as before.

    Returns:
        The same module.

    Raises:
        TypeError: model is not a module.
        ValueError: there is no fused RNN, LSTM or GRU in it.
    """
    for module in _scans(model, "freeze"):
        module.__dict__["_frozen"] = [Frozen() for _ in range(module.num_layers)]
    return model


def unfreeze(model: M) -> M:
    """Undo `freeze` and give back the memory; arguments and errors are the same."""
    for module in _scans(model, "unfreeze"):
        module.__dict__.pop("_frozen", None)
    return model


def _scans(model: torch.nn.Module, action: str) -> list[ScanModule]:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{action} expects a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, ScanModule)]
    if not found:
        raise ValueError("model: expected a fused RNN, LSTM or GRU in it (see fusedseq.fuse), got none")
    return found
