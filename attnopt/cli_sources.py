"""SOURCE on the command line: a factory in a file or module, a Hugging Face model, or an exported program."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from attnopt import files
from attnopt.cli_inputs import DynamicAxis, dynamic_shapes, random_input
from attnopt.errors import Blame, SourceError, UnsafeFileError

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
_FORMS = "file.py:factory, package.module:factory, a Hugging Face folder or config.json, or a .pt2"
_CONTRACT = "a factory takes no arguments and returns a model, (model, args) or (model, args, kwargs)"


@dataclass(frozen=True, slots=True)
class Source:
    """A model with example inputs. model: a module, or a program that was exported before.

    files: what it was read from, never to be overwritten. notes: what the user should know.
    """

    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_inputs(self) -> bool:
        """Whether the model can be run."""
        return bool(self.args or self.kwargs)

    def runnable(self) -> nn.Module:
        """The model as a module."""
        return self.model.module() if isinstance(self.model, ExportedProgram) else self.model

    def exported(self, axes: Sequence[DynamicAxis] = ()) -> ExportedProgram:
        """The model as an exported program; `axes` become dynamic. Raises SourceError if torch cannot export it."""
        if isinstance(self.model, ExportedProgram):
            if axes:
                raise SourceError(
                    "--dynamic is for models that are exported now; a .pt2 has its dynamic axes already"
                )
            return self.model
        shapes = dynamic_shapes(self.model, self.args, self.kwargs, axes)
        with Blame(
            "torch.export of the model", "`attnopt explain` needs no export; -v shows all that torch says"
        ):
            return torch.export.export(self.model, self.args, dict(self.kwargs), dynamic_shapes=shapes)


def load(text: str, inputs: Sequence[str] = (), *, allow_unsafe: bool = False) -> Source:
    """The model that SOURCE names, with its example inputs, or with random `inputs` (see `random_input`).

    Raises SourceError when it leads nowhere, UnsafeFileError for files that would run code, MissingError for a
    package that is not installed.
    """
    source = _load(text, allow_unsafe=allow_unsafe)
    if inputs:
        source = replace(
            source, args=tuple(random_input(each, seed) for seed, each in enumerate(inputs)), kwargs={}
        )
    if not source.has_inputs and isinstance(source.model, nn.Module):
        raise SourceError(
            f"{text}: the factory returned no example inputs; return (model, args), or say --input SHAPE:DTYPE"
        )
    if isinstance(source.model, nn.Module) and all(part.training for part in source.model.modules()):
        source = replace(
            source,
            notes=(*source.notes, "the model is in training mode; call .eval() in the factory if not meant"),
        )
    return source


def _load(text: str, *, allow_unsafe: bool) -> Source:
    path = Path(text)
    place, colon, _ = text.rpartition(":")
    if colon and (place.endswith(".py") or not path.exists()):
        return _from_factory(text, place)
    if not path.exists():
        raise SourceError(f"{text}: no such file; SOURCE is {_FORMS}")
    if path.is_dir() or path.name == "config.json":
        from attnopt.cli_hf import from_folder

        return Source(*from_folder(path if path.is_dir() else path.parent))
    if path.suffix in _PICKLES and not allow_unsafe:
        raise UnsafeFileError(
            f"will not load {path}: {path.suffix} files are pickles, which run the code inside them; "
            "use a factory that builds the model, or a .pt2"
        )
    if path.suffix == ".py":
        raise SourceError(f"{text}: which function? Name it as {text}:factory")
    return _from_pt2(path, allow_unsafe=allow_unsafe)


def _from_pt2(path: Path, *, allow_unsafe: bool) -> Source:
    program = files.load_program(path, allow_unsafe=allow_unsafe)
    args, kwargs = program.example_inputs or ((), {})
    notes = () if args or kwargs else (f"{path} has no sample inputs, so nothing can be run on it",)
    return Source(program, tuple(args), kwargs, (path,), notes)


def function_of(text: str) -> Callable[[], Any]:
    """The function that `file.py:name` or `package.module:name` names; the module is run. Raises SourceError."""
    place, _, name = text.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    found: Any = getattr(module, name, None)
    if not callable(found):
        names = [
            n
            for n, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise SourceError(f"{text}: {place} has no function {name!r}; it has {', '.join(names) or 'none'}")
    return found


def _from_factory(text: str, place: str) -> Source:
    make = function_of(text)
    with Blame(f"{text}: the factory", "-v shows its traceback"):
        made = make()
    model, args, kwargs = _unpacked(text, made)
    return Source(model, args, kwargs, (Path(place),) if place.endswith(".py") else ())


def _module_of_file(path: Path) -> ModuleType:
    """Runs a file as a module; files beside it can be imported, as when Python runs it."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file")
    name = f"attnopt_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SourceError(f"{path}: Python cannot import it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    with Blame(f"importing {path}", "-v shows its traceback"):
        spec.loader.exec_module(module)
    return module


def _module_of_name(name: str) -> ModuleType:
    """Imports a module by name; the current folder counts, as with `python -m`."""
    if not name.replace(".", "").isidentifier():
        raise SourceError(f"{name}: neither a file nor the name of a module; SOURCE is {_FORMS}")
    sys.path.insert(0, str(Path.cwd()))
    with Blame(f"importing {name}", "-v shows its traceback"):
        if not _is_there(name):
            raise SourceError(f"{name}: there is no such module; SOURCE is {_FORMS}")
        return importlib.import_module(name)


def _is_there(name: str) -> bool:
    """Whether the module can be found; its packages are imported for that."""
    parts = name.split(".")
    packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _unpacked(
    text: str, made: object
) -> tuple[nn.Module | ExportedProgram, tuple[Any, ...], Mapping[str, Any]]:
    parts = made if isinstance(made, tuple) else (made,)
    match parts:
        case (nn.Module() | ExportedProgram() as model,):
            return model, (), {}
        case (nn.Module() | ExportedProgram() as model, args):
            return model, _tupled(text, args), {}
        case (nn.Module() | ExportedProgram() as model, args, Mapping() as kwargs):
            return model, _tupled(text, args), kwargs
    got = (
        f"({', '.join(type(part).__name__ for part in parts)})"
        if isinstance(made, tuple)
        else type(made).__name__
    )
    raise SourceError(f"{text}: the factory returned {got}; {_CONTRACT}")


def _tupled(text: str, args: object) -> tuple[Any, ...]:
    if isinstance(args, Tensor):
        return (args,)
    if isinstance(args, tuple | list):
        return tuple(args)
    raise SourceError(
        f"{text}: the factory returned args of type {type(args).__name__}; wanted a tuple of inputs"
    )
