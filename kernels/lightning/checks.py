"""What the ops demand of their arguments, said in words when it is not so. Works on fake tensors and symbolic sizes."""

import torch
from torch import Tensor

from attnopt.errors import ShapeError, UnsupportedError
from attnopt.kernels.lightning.shapes import state_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    causal: bool,
) -> None:
    """Raises ShapeError or UnsupportedError unless `lightning_attention` can serve the arguments."""
    _check_kinds({"q": q, "k": k, "v": v})
    found = _sizes(q, k, v)
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(f"{found}; wanted q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"{found}; wanted one B and D in q and k, one B, Hkv and Sk in k and v")
    _check_groups(q, k, found)
    if causal and q.shape[2] != k.shape[2]:
        raise ShapeError(f"{found}; causal attention wants Sq == Sk: pass earlier keys as initial_state")
    if not causal and log_decay is not None:
        raise UnsupportedError(
            "decay without causal order has no meaning here; wanted log_decay=None or causal=True"
        )
    _check_decay(log_decay, q, (q.shape[0], q.shape[1], q.shape[2]))
    sequences = q.shape[0]
    if cu_seqlens is not None:
        _check_packed(cu_seqlens, q, causal=causal)
        sequences = cu_seqlens.shape[0] - 1
    _check_state(initial_state, "initial_state", q, v, sequences)


def check_step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None) -> None:
    """Raises ShapeError or UnsupportedError unless `lightning_step` can serve the arguments."""
    _check_kinds({"q": q, "k": k, "v": v})
    found = _sizes(q, k, v)
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ShapeError(
            f"{found}; wanted q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv), without a time dimension"
        )
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or k.shape[:2] != v.shape[:2]:
        raise ShapeError(f"{found}; wanted one B and D in q and k, one B and Hkv in k and v")
    _check_groups(q, k, found)
    _check_decay(log_decay, q, (q.shape[0], q.shape[1]))
    _check_state(state, "state", q, v, q.shape[0])


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    kinds = {(x.dtype, x.device) for x in tensors.values()}
    found = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in tensors.items())
    if len(kinds) != 1:
        raise ShapeError(f"{found}; wanted one dtype and one device")
    if tensors["q"].dtype not in DTYPES:
        raise UnsupportedError(f"{found}; wanted one of {', '.join(map(str, DTYPES))}")


def _check_groups(q: Tensor, k: Tensor, found: str) -> None:
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ShapeError(f"{found}; wanted H a multiple of Hkv")


def _check_decay(log_decay: Tensor | None, q: Tensor, each: tuple[int, ...]) -> None:
    """Values are not looked at: that would wait for the device."""
    if log_decay is None:
        return
    found = f"log_decay {tuple(log_decay.shape)} {log_decay.dtype} on {log_decay.device}"
    if tuple(log_decay.shape) not in ((q.shape[1],), each):
        raise ShapeError(f"{found}; wanted ({q.shape[1]},), one per head, or {each}, one per step")
    if not log_decay.dtype.is_floating_point or log_decay.device != q.device:
        raise ShapeError(f"{found}; wanted floating point on {q.device}")


def _check_packed(cu_seqlens: Tensor, q: Tensor, *, causal: bool) -> None:
    """Values are not looked at: that would wait for the device."""
    found = (
        f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} on {cu_seqlens.device}, q {tuple(q.shape)}"
    )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or q.shape[0] != 1:
        raise ShapeError(f"{found}; wanted (n + 1,), and B = 1: the n sequences lie one behind the other")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != q.device:
        raise ShapeError(f"{found}; wanted int32 or int64 on {q.device}")
    if not causal:
        raise UnsupportedError("cu_seqlens packs causal sequences; wanted causal=True, or one call for each")


def _check_state(state: Tensor | None, name: str, q: Tensor, v: Tensor, sequences: int) -> None:
    """States are held in fp32: rounding them to half precision at each hand-over adds up."""
    if state is None:
        return
    shape, dtype = (sequences, q.shape[1], q.shape[-1], v.shape[-1]), state_dtype(q.dtype)
    if tuple(state.shape) != shape or state.dtype != dtype or state.device != q.device:
        found = f"{name} {tuple(state.shape)} {state.dtype} on {state.device}"
        raise ShapeError(
            f"{found}; wanted {shape} {dtype} on {q.device}: (B, H, D, Dv), one state per query head"
        )


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
