"""Runs Gluon kernels on a CPU: their own source, with numpy for tiles and a thread for each warp group.

Products that run asynchronously are taken as late as their wait allows, from what shared memory holds then; barriers
have phases and counts, and who waits for good is told. Layouts and half precision are left out.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from gluon_memory import Array, Barrier, Descriptor, Memory, Pointer, Tile, tile
from torch import Tensor
from triton.language import constexpr


@dataclass
class Product:
    """A product on its way; `value` once it is there."""

    take: Callable[[], Tile]
    value: Tile | None = None


class Machine:
    """One program of a launch: what `gl`, `mbarrier`, `tma` and the products are to a kernel's source."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.own = threading.local()

    def names(self) -> dict[str, object]:
        """By the names that kernels use."""
        return {
            "gl": self._language(),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=_begin_phases,
                wait=lambda barrier, parity: barrier.wait(parity),
                arrive=lambda barrier, count: barrier.arrive(count),
                expect=lambda barrier, size: barrier.arrive(1, coming=size),
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=_bring,
                async_copy_shared_to_global=lambda desc, where, memory: desc.write(where, memory.array),
                store_wait=lambda pendings: None,
            ),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": self._wait,
            "range": _numbers,
        }

    def _language(self) -> SimpleNamespace:
        nothing = lambda *_args, **_kwargs: None  # noqa: E731
        return SimpleNamespace(
            program_id=lambda _axis: tile(self.program),
            num_programs=lambda _axis: self.programs,
            static_range=range,
            float32="float",
            int64="int",
            allocate_shared_memory=_allocate,
            warp_specialize=self._specialize,
            zeros=lambda shape, _dtype, _layout: tile(np.zeros(shape, np.float32)),
            full=lambda shape, x, _dtype, _layout: tile(np.full(shape, x, np.float32)),
            arange=lambda start, stop, _layout=None: tile(np.arange(start, stop)),
            expand_dims=lambda x, axis: tile(np.expand_dims(x, axis)),
            convert_layout=lambda x, _layout: x,
            where=lambda c, x, y: tile(np.where(c, x, y)),
            minimum=lambda x, y: tile(np.minimum(x, y)),
            maximum=lambda x, y: tile(np.maximum(x, y)),
            cdiv=lambda x, y: tile(-(-np.asarray(x) // y)),
            exp2=lambda x: tile(np.exp2(x)),
            log2=lambda x: tile(np.log2(x)),
            max=lambda x, axis: tile(np.max(np.asarray(x), axis)),
            sum=lambda x, axis: tile(np.sum(np.asarray(x), axis)),
            load=_load,
            store=_store,
            **dict.fromkeys(
                (
                    "NVMMADistributedLayout",
                    "BlockedLayout",
                    "DotOperandLayout",
                    "SliceLayout",
                    "NVMMASharedLayout",
                ),
                nothing,
            ),
        )

    def _specialize(
        self, parts: list[tuple[Any, tuple[Any, ...]]], warps: list[int], regs: list[int]
    ) -> None:
        del warps, regs
        failures: list[BaseException] = []
        threads = [threading.Thread(target=self._part, args=(*part, failures), daemon=True) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def _part(self, run: Any, arguments: tuple[Any, ...], failures: list[BaseException]) -> None:
        self.own.running = []
        try:
            with np.errstate(all="ignore"):
                run(*arguments)
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            failures.append(error)

    def _multiply(
        self, a: Any, b: Memory, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Product | Tile:
        def take() -> Tile:
            left = a.array if isinstance(a, Memory) else a
            before = _value(acc) if use_acc else 0
            return tile(before + np.asarray(left @ b.array))

        product = Product(take)
        self.own.running.append(product)
        return product if is_async else self._wait(0, deps=[product])

    def _wait(self, pending: int, deps: list[Any]) -> Any:
        running = self.own.running
        while len(running) > pending:
            first = running.pop(0)
            first.value = first.take()
        found = [_value(x) for x in deps]
        return found[0] if len(found) == 1 else tuple(found)


def _value(x: Any) -> Any:
    if not isinstance(x, Product):
        return x
    assert x.value is not None, "a product is read that still runs"
    return x.value


def _numbers(*bounds: Any) -> Iterator[Tile]:
    return (tile(n) for n in range(*(int(x) for x in bounds)))


def _begin_phases(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _bring(desc: Descriptor, where: list[Any], barrier: Barrier, memory: Memory) -> None:
    memory.array[...] = desc.read(where)
    barrier.arrive(come=desc.block_type.nbytes)


def _allocate(dtype: str, shape: list[int], layout: object) -> Memory:
    if layout == "barriers":
        barriers = np.empty(shape, object)
        barriers[:, 0] = [Barrier() for _ in range(shape[0])]
        return Memory(barriers)
    return Memory(np.full(shape, np.nan, np.float32), dtype)


def _load(pointer: Pointer, mask: Any, other: float) -> Tile:
    mask = np.broadcast_to(mask, np.shape(pointer.at))
    return tile(np.where(mask, pointer.array[np.where(mask, pointer.at, 0)], other))


def _store(pointer: Pointer, x: Array, mask: Any) -> None:
    mask = np.broadcast_to(mask, np.shape(pointer.at))
    pointer.array[np.asarray(pointer.at)[mask]] = np.broadcast_to(x, mask.shape)[mask]


@dataclass(frozen=True)
class OnNumpy:
    """Stands for a kernel, which with all it calls is from `modules`; a launch takes what it takes on a GPU."""

    kernel: Any
    modules: list[ModuleType]

    @property
    def fn(self) -> Any:
        return self.kernel.fn

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, num_warps: int, **constants: Any) -> None:
            del num_warps
            launch(self, grid[0], self.modules, *map(_argument, arguments), **constants)

        return run


def _argument(x: Any) -> Any:
    if isinstance(x, Tensor):
        return Pointer(x.numpy().reshape(-1))
    return Descriptor(x.base.numpy(), x.block_shape) if hasattr(x, "block_shape") else x


def launch(kernel: Any, programs: int, modules: list[ModuleType], *arguments: Any, **constants: Any) -> None:
    """Runs `kernel`, which with all it calls is from `modules`, as `programs` programs, one after another."""
    for program in range(programs):
        names = Machine(program, programs).names()
        rebuilt = {module.__name__: _rebuilt(module, names) for module in modules}
        for own in rebuilt.values():
            for name, found in list(own.items()):
                origin = getattr(getattr(found, "fn", None), "__module__", None)
                if origin in rebuilt:
                    own[name] = rebuilt[origin][found.fn.__name__]
        rebuilt[kernel.fn.__module__][kernel.fn.__name__](*arguments, **constants)


def _rebuilt(module: ModuleType, names: dict[str, object]) -> dict[str, Any]:
    own: dict[str, Any] = {
        name: x.value if isinstance(x, constexpr) else x for name, x in vars(module).items()
    } | names
    for name, x in vars(module).items():
        if getattr(getattr(x, "fn", None), "__module__", None) == module.__name__:
            own[name] = FunctionType(x.fn.__code__, own, name, x.fn.__defaults__)
    return own
