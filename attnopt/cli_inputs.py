"""The small languages of the command line: `--input 1x128:int64<1000` and `--dynamic 0:1=tokens:2..4096`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

from attnopt.errors import OptionError

_INPUT = re.compile(r"(?P<shape>\d+(x\d+)*)(:(?P<dtype>[a-z]+\d*)(<(?P<below>\d+))?)?")
_DYNAMIC = re.compile(
    r"(?P<input>\w+):(?P<axis>\d+)=(?P<name>[A-Za-z_]\w*)(:(?P<least>\d+)\.\.(?P<most>\d+))?"
)

_DTYPES = MappingProxyType(
    {
        "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
        "i64": torch.int64, "i32": torch.int32, "bool": torch.bool,
        "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
        "int64": torch.int64, "int32": torch.int32,
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DynamicAxis:
    """One axis of one input that may have any length, or one between two bounds (both included)."""

    input: str  # position, or name of a keyword argument
    axis: int
    name: str
    least: int | None = None
    most: int | None = None


def random_input(text: str, seed: int = 0) -> Tensor:
    """A tensor for `2x128:int64<1000`: shape, dtype (default f32), and for whole numbers an upper bound (default 2).

    Floating-point values are normal, whole numbers uniform; the same each time. Raises OptionError.
    """
    parts = _INPUT.fullmatch(text)
    dtype = _DTYPES.get(parts["dtype"] or "f32") if parts else None
    if not parts or dtype is None:
        raise OptionError(
            f"--input {text!r}: wanted SHAPE or SHAPE:DTYPE or SHAPE:DTYPE<N, as in 1x128:int64<1000"
        )
    shape = [int(size) for size in parts["shape"].split("x")]
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, int(parts["below"] or 2), shape, generator=generator).to(dtype)


def parse_dynamic(text: str) -> DynamicAxis:
    """The axis that `INPUT:AXIS=NAME` or `INPUT:AXIS=NAME:MIN..MAX` names. Raises OptionError."""
    parts = _DYNAMIC.fullmatch(text)
    if not parts:
        raise OptionError(
            f"--dynamic {text!r}: wanted INPUT:AXIS=NAME or INPUT:AXIS=NAME:MIN..MAX, as in 0:1=tokens:2..4096"
        )
    bounds = [int(parts[name]) if parts[name] else None for name in ("least", "most")]
    return DynamicAxis(parts["input"], int(parts["axis"]), parts["name"], *bounds)


def dynamic_shapes(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], axes: Sequence[DynamicAxis]
) -> dict[str, Any] | tuple[Any, ...] | list[Any] | None:
    """What torch.export.export takes as `dynamic_shapes`; axes of one name share one length. Raises OptionError."""
    if not axes:
        return None
    dims: dict[str, Any] = {}
    found: dict[int, dict[int, Any]] = {}
    tensors: dict[int, Tensor] = {}
    for axis in axes:
        tensor = _tensor(args, kwargs, axis)
        dim = dims.setdefault(axis.name, Dim(axis.name, min=axis.least, max=axis.most))
        tensors[id(tensor)] = tensor
        found.setdefault(id(tensor), {})[axis.axis] = dim
    shapes = ShapesCollection()
    for key, tensor in tensors.items():
        shapes[tensor] = found[key]
    return shapes.dynamic_shapes(module, tuple(args), dict(kwargs))


def _tensor(args: Sequence[Any], kwargs: Mapping[str, Any], axis: DynamicAxis) -> Tensor:
    named = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
    value = named.get(axis.input)
    if not isinstance(value, Tensor) or axis.axis >= value.dim():
        raise OptionError(
            f"--dynamic {axis.input}:{axis.axis}: there is no such axis; tensors among the inputs: "
            + (
                ", ".join(f"{name} {tuple(v.shape)}" for name, v in named.items() if isinstance(v, Tensor))
                or "none"
            )
        )
    return value
