"""How well a program determines its own results: it runs again, forward and backward, with roundings drawn anew.

Where scores are multiplied by 1e12, or sums cancel, eager mode in fp64 knows a gradient to a few digits only, or to
none. The law of `oracle` holds there, too: an error may be as large as eager's own, twice in an output and three times
in a gradient. What eager loses in fp64 is measured, as no wider type is at hand, by stochastic arithmetic: Vignes
(1993), "A stochastic arithmetic for reliable scientific computing", doi:10.1016/0378-4754(93)90003-D; its roundings are
those of Croci et al. (2022), "Stochastic rounding: implementation, error analysis and applications",
doi:10.1098/rsos.211631. Three things keep it from excusing a fault:

- What is exact stays as it is. The error of a sum, product, quotient or cast is computed, and its neighbour is taken as
  often as that error is large beside the distance to it: 0.25 x, 1 x and x + 0 never change, and what a huge number
  absorbs altogether does not change it.
- The same numbers round alike, as on a real machine: scores that tie do so still.
- A sum of many numbers is only known to the rounding of its largest partial sums, in another order; that, and no more,
  is what it changes by.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

#: Operations that choose, move or count: their results are as they should be.
_EXACT = frozenset(
    {
        "where", "masked_fill", "full", "full_like", "new_full", "zeros", "zeros_like", "new_zeros", "ones",
        "ones_like", "new_ones", "empty_like", "new_empty", "new_empty_strided", "scalar_tensor", "lift_fresh_copy",
        "arange", "eye", "tril", "triu", "cat", "stack", "index", "index_select", "gather", "embedding", "roll", "flip",
        "repeat", "repeat_interleave", "pad", "constant_pad_nd", "clone", "copy", "neg", "abs", "sign", "sgn", "relu",
        "threshold_backward", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "max", "min", "amax", "amin",
        "nan_to_num", "floor", "ceil", "round", "trunc", "fmod", "one_hot", "dropout", "native_dropout", "bernoulli",
        "rand_like", "randn_like", "slice_backward", "select_backward", "diagonal_backward", "slice_scatter",
        "select_scatter", "scatter", "masked_scatter", "sort", "topk", "cummax", "cummin", "_unsafe_view",
        "_reshape_alias", "expand_copy",
    }
)  # fmt: skip
#: Operations that are made of others, each of which rounds.
_MADE_OF_OTHERS = frozenset(
    {
        "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "logsumexp", "addmm",
        "baddbmm", "addcmul", "addcdiv", "lerp", "mean", "var", "std", "var_mean", "linalg_vector_norm", "norm",
        "native_layer_norm", "native_layer_norm_backward", "tanh_backward", "sigmoid_backward", "gelu_backward",
        "silu_backward", "elu_backward", "softplus_backward",
    }
)  # fmt: skip
_SUMS = frozenset({"mm", "bmm", "mv", "dot", "sum", "cumsum"})


class Shaken(TorchDispatchMode):
    """While it is on, whatever is computed is rounded up or down at random, in a backward pass, too."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named, name = dict(kwargs or {}), _name(func)
        if name in _MADE_OF_OTHERS and func in decomposition_table:
            with self:
                return decomposition_table[func](*args, **named)
        value = func(*args, **named)
        if name == "to" and value is not args[0]:
            return self._shaken(value, func, args[:1], named)
        if name in _EXACT or _aliases(func) or not any(isinstance(x, Tensor) for x in _flat(args)):
            return value
        if isinstance(value, Tensor):
            return self._shaken(value, func, args, named)
        return type(value)(self._stepped(x) for x in value) if isinstance(value, tuple | list) else value

    def _shaken(self, value: Tensor, func: OpOverload, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not value.is_floating_point() or value.numel() == 0:
            return value
        if _name(func) in _SUMS:
            return self._summed(value, func(*map(_size, args), **named), max(args[0].shape, default=1))
        lost = LOST.get(_name(func))
        if lost is None or not 1 <= len(args) <= 2 or named.get("alpha", 1) != 1:
            return self._stepped(value)
        return self._rounded(value, lost(value.double(), *(_wide(x) for x in args)))

    def _summed(self, value: Tensor, size: Tensor, terms: int) -> Tensor:
        """As another order of the sum could make it. size: the sum of what is summed, without signs.

        Divided by their number after the sum, not before, it overflows earlier.
        """
        steps = torch.randint(-1, 2, value.shape, generator=self.generator).to(value.dtype)
        moved = value + torch.finfo(value.dtype).eps * size * steps
        moved = moved.where(size.isfinite() & value.isfinite(), value)
        return moved.where((size * terms).isfinite() | ~value.isfinite(), torch.inf)

    def _rounded(self, value: Tensor, lost: Tensor) -> Tensor:
        """value: rounded to nearest. lost: what that took away, in fp64."""
        other = torch.nextafter(value, (lost.sign() * torch.inf).nan_to_num(0.0).to(value.dtype))
        gap = (other.double() - value.double()).abs()
        return other.where(self._drawn(value) * gap < lost.abs(), value)

    def _stepped(self, value: Any) -> Any:
        """Of which nothing is known but that it is off by a rounding at most."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        steps = (3.0 * self._drawn(value)).floor() - 1.0
        return value * (1.0 + torch.finfo(value.dtype).eps * steps.to(value.dtype))

    def _drawn(self, value: Tensor) -> Tensor:
        """Numbers from 0 to 1 in fp64, the same for the same value."""
        bits = value.double().contiguous().view(torch.int64)
        mixed = bits ^ int(torch.randint(2**62, (1,), generator=self.generator))
        for factor, shift in ((0x9E3779B97F4A7C1, 32), (0x2545F4914F6CDD1D, 29), (0x1B873593CC9E2D51, 32)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        return ((mixed >> 11) & (2**52 - 1)).double() / 2.0**52


# --- what a rounding to nearest took away, in fp64 ---


def _lost_in_sum(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Knuth's two-sum; exact for narrower types, too."""
    second = total - a
    return (a - (total - second)) + (b - second)


def _lost_in_product(product: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Dekker's two-product, of mantissas so that nothing overflows."""
    (a, up), (b, high) = torch.frexp(a), torch.frexp(b)
    near = torch.ldexp(product, -(up + high))
    return torch.ldexp(_product_less(near, a, b), up + high)


def _lost_in_quotient(quotient: Tensor, a: Tensor, b: Tensor) -> Tensor:
    (a, up), (b, high) = torch.frexp(a), torch.frexp(b)
    near = torch.ldexp(quotient, high - up)
    return torch.ldexp(-_product_less(a, near, b) / b, up - high)


def _product_less(near: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A product less a number near it."""
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return (a_high * b_high - near) + a_high * b_low + a_low * b_high + a_low * b_low


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of 26 bits each."""
    big = x * (2.0**27 + 1.0)
    high = big - (big - x)
    return high, x - high


#: For sums, products, quotients and casts, from the result and its operands in fp64.
LOST: dict[str, Callable[..., Tensor]] = {
    "add": _lost_in_sum,
    "sub": lambda value, a, b: _lost_in_sum(value, a, -b),
    "rsub": lambda value, a, b: _lost_in_sum(value, b, -a),
    "mul": _lost_in_product,
    "div": _lost_in_quotient,
    "_to_copy": lambda value, source: source - value,
    "to": lambda value, source: source - value,  # what the parts of an operation are cast with
}


# --- operations and their arguments ---


def _name(func: OpOverload) -> str:
    return func._schema.name.removeprefix("aten::")


def _aliases(func: OpOverload) -> bool:
    """Whether it makes a view, or writes to something."""
    return any(a.alias_info for a in (*func._schema.arguments, *func._schema.returns))


def _flat(args: Sequence[Any]) -> list[Any]:
    return [x for arg in args for x in (arg if isinstance(arg, tuple | list) else [arg])]


def _size(x: Any) -> Any:
    return x.abs() if isinstance(x, Tensor) else x


def _wide(x: Any) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)
