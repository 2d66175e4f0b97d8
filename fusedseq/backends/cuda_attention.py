"""Attention on the CUDA kernels: tensors to addresses and strides; part of the backend `cuda`.

Nothing is read back from the device: lengths, packed sequences and the seed of dropout stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedseq import config, registry
from fusedseq.backends import cuda_scan, tensors
from fusedseq.backends.cpu_attention import _broadcast, _dense, _like
from fusedseq.reference.attention import Problem, threshold

if TYPE_CHECKING:
    from fusedseq.registry import AttentionCall

WIDEST = 256
LONGEST = 2**29  # positions and windows are 32-bit numbers, and so are their sums; rows of a pair are too
# Rows of a pair (a key head with the query heads that use it) up to which its keys are cut into parts, the keys from
# which on, the keys of the smallest part, and how many parts at most.
FEW_ROWS = 64
MANY_KEYS = 512
PART = 256
PARTS = 64


def supports(call: AttentionCall) -> str | None:
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"attention is for bfloat16 and float16, not {call.dtype}"
    if max(call.E, call.Ev) > WIDEST:
        return f"heads may have up to {WIDEST} elements, these have {max(call.E, call.Ev)}"
    if max(call.L, call.S) >= LONGEST:
        return f"sequences may have up to {LONGEST} positions, these have {max(call.L, call.S)}"
    rows = call.L * (call.Hq // max(call.Hkv, 1))
    if rows >= 2 * LONGEST:
        return f"a key head may have up to {2 * LONGEST} queries, this one has {rows}"
    if call.grad:
        core = cuda_scan._core()
        wanted = core.attention_backward_shared(call.E, call.Ev, call.bias, call.dropout)
        there = core.device()[2]
        if wanted > there:
            return f"its backward pass wants {wanted} bytes of shared memory for such heads, a block may have {there}"
    return None


def _wants_hopper(x: Tensor) -> bool:
    """Whether calls go to the kernels for compute capability 9.0 that these take, on the device of x."""
    asked = config.settings.cuda_attention
    if asked is not None:
        return asked == "hopper"
    return torch.cuda.get_device_capability(x.device) == (9, 0) if x.is_cuda else cuda_scan._core().device()[0] == 90


def _note(direction: str, name: str, reason: str) -> None:
    registry.note_kernel("attention", direction, "cuda", name, f"not hopper: {reason}" if reason else "")


def _heads(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides; 0 where there is one entry, whose stride says nothing of how rows are aligned."""
    sb, sh, sn = (0 if t.shape[i] == 1 else t.stride(i) for i in range(3))
    return t.data_ptr(), sb, sh, sn


def _filled(t: Tensor) -> Tensor:
    """Heads of no elements as heads of a single zero, which add nothing to a product."""
    return _dense(t) if t.shape[3] else t.new_zeros((*t.shape[:3], 1))


class Call:
    """A problem as the kernels take it; keeps what had to be copied alive."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.q, self.k, self.v = _filled(p.q), _filled(p.k), _filled(p.v)
        self.bias, self.dense = p.bias, p.dense
        self.alibi = None if p.alibi_slopes is None else p.alibi_slopes.float().contiguous()
        self.sinks = None if p.sinks is None else p.sinks.float().contiguous()
        B, Hq, L, E = self.q.shape
        _, Hkv, S, Ev = self.v.shape
        self.rows = L * (Hq // Hkv)
        self.sizes = (B, Hq, Hkv, L, S, E, Ev, 0 if p.cu_q is None else p.cu_q.shape[0] - 1)
        self.left, self.right = (bound if 0 <= bound < L + S else -1 for bound in (p.left, p.right))
        self.seed = None if p.seed is None else p.seed.to(p.q.device, torch.int64)
        self.picks = p.global_keys is not None and (self.left >= 0 or (self.right >= 0 and not p.causal))
        self.global_keys = p.global_keys.contiguous() if self.picks and p.global_keys is not None else None
        self.positions = self.ranks = None
        if self.global_keys is not None:
            self.positions, self.ranks = tensors.listed(self.global_keys)

    def numbers(self) -> tuple[Any, ...]:
        p = self.p
        limit, keep_scale = None, 1.0
        if p.dropout_p:
            limit = threshold(p.dropout_p)
            keep_scale = 0.0 if p.dropout_p >= 1 else 1 / (1 - p.dropout_p)
        bias_dtype = tensors.DTYPES[torch.float32 if p.bias is None else p.bias.dtype]
        return (
            tensors.DTYPES[p.q.dtype], bias_dtype, p.causal, self.left, self.right, p.scale, p.softcap, limit,
            keep_scale, 0,
        )  # fmt: skip

    def tensors(self, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
        p, shared = self.p, self.global_keys
        return (
            _heads(self.q), _heads(self.k), _heads(self.v), _heads(out), lse.data_ptr(), _broadcast(self.bias),
            tensors.pointer(self.alibi), tensors.pointer(self.sinks), _broadcast(self.dense),
            tensors.pointer(p.key_lengths), tensors.pointer(p.cu_q), tensors.pointer(p.cu_k), tensors.pointer(shared),
            0 if shared is None else tensors.batch_stride(shared),
        )  # fmt: skip

    def named(self, stream: int | None) -> dict[str, Any]:
        found: dict[str, Any] = {"stream": stream, "seed": tensors.pointer(self.seed)}
        if _wants_hopper(self.p.q):
            found["fault"] = cuda_scan._fault_word(str(self.p.q.device)).data_ptr()
        if self.positions is not None and self.ranks is not None:
            found |= {
                "positions": self.positions.data_ptr(), "positions_sb": tensors.batch_stride(self.positions),
                "ranks": self.ranks.data_ptr(), "ranks_sb": tensors.batch_stride(self.ranks),
            }  # fmt: skip
        return found

    def parts(self) -> tuple[int, int]:
        """How many parts the keys of few rows are cut into, and the size of one. Depends on neither the batch nor the
        GPU, so that a row's result does not."""
        S = self.sizes[4]
        if self.rows > FEW_ROWS or S < MANY_KEYS or self.p.cu_q is not None:
            return 1, S
        size = PART
        while size * PARTS < S:
            size *= 2
        return -(-S // size) + self.picks, size


def attention_forward(p: Problem) -> tuple[Tensor, Tensor]:
    out = _like(p.q, max(p.v.shape[3], 1))
    lse = p.q.new_empty(p.q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out[..., : p.v.shape[3]], lse
    if _wants_hopper(p.q):
        cuda_scan.check_fault(p.q.device)
    call = Call(p)
    if p.cu_q is not None:  # rows behind the last sequence are not visited
        out.zero_()
        lse.fill_(float("-inf")) if call.sinks is None else lse.copy_(call.sinks.view(1, -1, 1))
    with cuda_scan._on(p.q) as stream:
        named = call.named(stream)
        count, size = call.parts()
        if count > 1:
            sums = p.q.new_empty((count, *p.q.shape[:3], out.shape[3]), dtype=torch.float32)
            tops, totals = (p.q.new_empty((count, *p.q.shape[:3]), dtype=torch.float32) for _ in range(2))
            named |= {
                "parts": count, "part": size, "part_out": sums.data_ptr(), "part_top": tops.data_ptr(),
                "part_total": totals.data_ptr(),
            }  # fmt: skip
        arguments = (call.sizes, call.tensors(out, lse), call.numbers(), named)
        core = cuda_scan._core()
        wanted = _wants_hopper(p.q)
        reason = core.attention_hopper_refuses(*arguments) if wanted else ""
        hopper = wanted and not reason
        _note("forward", "hopper" if hopper else "decode" if count > 1 else "mma", reason)
        (core.attention_hopper if hopper else core.attention_forward)(*arguments)
    return out[..., : p.v.shape[3]], lse


def attention_backward(
    p: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs: Sequence[bool],  # of q, k, v, bias, alibi_slopes, sinks
) -> tuple[Tensor | None, ...]:
    if lse.numel() == 0:
        return tuple(
            torch.zeros_like(t) if need and t is not None else None for t, need in zip(p.inputs(), needs, strict=True)
        )
    call = Call(p)
    out, lse = _filled(out), lse.contiguous()
    dout = torch.zeros_like(out) if dout is None else _filled(dout.to(out.dtype))
    dlse = None if dlse is None else dlse.float().contiguous()
    dq = _like(call.q, call.q.shape[3]) if needs[0] else None
    dk = dv = None
    if needs[1] or needs[2]:
        dk, dv = _like(call.k, call.k.shape[3]), _like(call.v, call.v.shape[3])
    if p.cu_q is not None:  # rows and keys outside all sequences are not visited
        for grad in (dq, dk, dv):
            if grad is not None:
                grad.zero_()
    dbias = p.bias.new_empty(p.bias.shape, dtype=torch.float32) if needs[3] and p.bias is not None else None
    dalibi = torch.empty_like(call.alibi) if needs[4] and call.alibi is not None else None
    dsinks = torch.empty_like(call.sinks) if needs[5] and call.sinks is not None else None
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    slopes = None if dalibi is None else torch.zeros_like(lse)
    with cuda_scan._on(p.q) as stream:
        scratch = {"lse2": lse2.data_ptr(), "delta": delta.data_ptr(), "slopes": tensors.pointer(slopes)}
        arguments = (
            call.sizes, call.tensors(out, lse), call.numbers(), call.named(stream) | scratch,
            (
                _heads(dout), tensors.pointer(dlse), *(None if t is None else _heads(t) for t in (dq, dk, dv)),
                _broadcast(dbias), tensors.pointer(dalibi), tensors.pointer(dsinks),
            ),
        )  # fmt: skip
        core = cuda_scan._core()
        wanted = _wants_hopper(p.q)
        reason = core.attention_backward_hopper_refuses(*arguments) if wanted else ""
        hopper = wanted and not reason
        _note("backward", "hopper" if hopper else "mma", reason)
        (core.attention_backward_hopper if hopper else core.attention_backward)(*arguments)
    grads = (dq, dk, dv, dbias, dalibi, dsinks)
    return tuple(
        g[..., : t.shape[-1]].to(t.dtype) if need and g is not None and t is not None else None
        for g, t, need in zip(grads, p.inputs(), needs, strict=True)
    )
