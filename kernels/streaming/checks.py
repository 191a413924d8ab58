"""What the op demands of its arguments, said in words when it is not so. Works on fake tensors and symbolic sizes."""

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError, UnsupportedError

#: What a row that sees no key may return.
EMPTY_ROWS = ("nan", "zero", "uniform")

#: The largest D and Dv: no tile of a wider head fits on a GPU.
WIDEST = 256

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_padding: Tensor | None = None,
    sink_logits: Tensor | None = None,
    scale: float = 1.0,
    offset: int | None = None,
    window: int | None = None,
    sinks: int = 0,
    prefix: int = 0,
    softcap: float | None = None,
    empty_row: str = "zero",
    slopes: Tensor | None = None,
    diagonal: int = 0,
    symmetric: bool = False,  # noqa: FBT001, FBT002 - in the order of the op's schema
) -> None:
    """Raises ShapeError, OptionError or UnsupportedError unless `attend` can serve the arguments."""
    del scale, sinks, prefix, diagonal, symmetric
    _check_shapes(q, k, v)
    _check_kinds(q, k, v)
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and not _broadcasts(x, full):
            raise ShapeError(f"{name} is {tuple(x.shape)}; wanted four dimensions, each 1 or that of {full}")
    _check_extras(bias, mask, key_padding, sink_logits, full)
    _check_slopes(slopes, full)
    if window is not None and offset is None:
        raise UnsupportedError(
            "a window without a causal offset; give the offset, or mask the window densely"
        )
    if softcap is not None and softcap <= 0:
        raise OptionError(f"softcap={softcap}; wanted a positive number or None")
    if empty_row not in EMPTY_ROWS:
        raise OptionError(f"empty_row={empty_row!r}; wanted one of {', '.join(EMPTY_ROWS)}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    found = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError(f"{found}; wanted (B, H, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3]:
        raise ShapeError(f"{found}; wanted one B and D in q and k, one B, Hkv and Sk in k and v")
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise ShapeError(f"{found}; wanted H a multiple of Hkv")
    if not 1 <= q.shape[3] <= WIDEST or v.shape[3] > WIDEST:
        raise UnsupportedError(f"{found}; wanted 1 <= D <= {WIDEST} and Dv <= {WIDEST}")


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        found = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        raise ShapeError(f"{found}; wanted one dtype and one device")
    if q.dtype not in DTYPES:
        raise UnsupportedError(f"q, k, v are {q.dtype}; wanted one of {', '.join(str(d) for d in DTYPES)}")


def _broadcasts(x: Tensor, full: tuple[int, ...]) -> bool:
    return x.dim() == 4 and all(size in (1, whole) for size, whole in zip(x.shape, full, strict=True))


def _check_extras(
    bias: Tensor | None,
    mask: Tensor | None,
    key_padding: Tensor | None,
    sink_logits: Tensor | None,
    full: tuple[int, int, int, int],
) -> None:
    if bias is not None and not bias.is_floating_point():
        raise ShapeError(
            f"bias is {bias.dtype}; wanted a float dtype (a bool tensor that hides keys is a mask)"
        )
    if mask is not None and mask.dtype != torch.bool:
        raise ShapeError(f"mask is {mask.dtype}; wanted bool (a float tensor that is added is a bias)")
    if key_padding is not None and (
        key_padding.dtype != torch.bool or key_padding.shape != (full[0], full[3])
    ):
        found = f"{key_padding.dtype} {tuple(key_padding.shape)}"
        raise ShapeError(
            f"key_padding is {found}; wanted bool {(full[0], full[3])}, True where the key is kept"
        )
    if sink_logits is not None and (not sink_logits.is_floating_point() or sink_logits.shape != (full[1],)):
        raise ShapeError(
            f"sink_logits is {sink_logits.dtype} {tuple(sink_logits.shape)}; wanted float {(full[1],)}"
        )


def _check_slopes(slopes: Tensor | None, full: tuple[int, int, int, int]) -> None:
    if slopes is None:
        return
    fits = slopes.dim() == 2 and slopes.shape[0] in (1, full[0]) and slopes.shape[1] == full[1]
    if not (fits and slopes.is_floating_point()):
        found = f"{slopes.dtype} {tuple(slopes.shape)}"
        raise ShapeError(
            f"slopes is {found}; wanted float {full[:2]}, or {(1, full[1])} for all sequences alike"
        )
