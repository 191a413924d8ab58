"""The source of the package as syntax trees, for the tests that read it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A source file and the name it is imported by."""

    path: Path

    @cached_property
    def name(self) -> str:
        """passes/softmax.py -> attnopt.passes.softmax"""
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        package = parts if parts[0] == "attnopt" else ("attnopt", *parts)
        return ".".join(part for part in package if part != "__init__")

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def is_triton(self) -> bool:
        return self.path.name.lstrip("_").startswith("triton")

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def package() -> list[Module]:
    """Every module of the package, each once: the links in attnopt/ are not followed."""
    folders = (ROOT / name for name in ("attnopt", "passes", "kernels"))
    paths = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    return [Module(path) for path in paths if not any(parent.is_symlink() for parent in path.parents)]


PACKAGE = package()


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each import and the full name it asks for; not those that only the type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        else:
            yield from imports(node)


def code_lines(function: Function) -> int:
    """Lines from `def` to the end, less the docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented and first.end_lineno else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def is_jit(function: Function) -> bool:
    found = (ast.unparse(decorator) for decorator in function.decorator_list)
    return any(name in decorator for decorator in found for name in ("triton.jit", "gluon.jit"))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
