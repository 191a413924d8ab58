"""The shape of the code, read from its syntax: who imports whom, how long things are, what is never done."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from statistics import median

from source import PACKAGE, ROOT, Module, code_lines, imports, is_jit, within

#: Bottom first. A module imports what is below it, or what stands in its own cell (one pattern; one kernel folder).
LAYERS = (
    ("attnopt.errors",),
    ("attnopt.mask",),
    ("attnopt.spec", "attnopt.mask_blocks", "attnopt.buffers"),
    ("attnopt.breaks", "attnopt.options", "attnopt.shadow*", "attnopt.versions", "attnopt.files*"),
    ("attnopt.rule",),
    ("attnopt.registry", "attnopt.report*"),
    ("attnopt.kernels._*",),
    ("attnopt.kernels.*", "attnopt.passes.*"),
    ("attnopt.ops", "attnopt.sparq_cache"),
    ("attnopt.caches*",),
    ("attnopt.approximation_sparq",),
    ("attnopt.policy", "attnopt.verify", "attnopt.locate", "attnopt.reading", "attnopt.wording"),
    ("attnopt.pipeline",),
    ("attnopt.approximation*", "attnopt.watch", "attnopt.premises", "attnopt.guards"),
    ("attnopt.backend",),
    ("attnopt.programs",),
    ("attnopt",),
    ("attnopt.cli*",),
    ("attnopt.__main__",),
)

#: Third-party packages, and the only modules that may import them.
CONFINED = {
    "triton": ("attnopt.kernels._triton", "attnopt.kernels.*.triton_*"),
    "transformers": ("attnopt.cli*", "attnopt.caches*"),
    "typer": ("attnopt.cli*",),
}
#: What is described without graphs.
NO_FX = (
    "attnopt.kernels.*",
    "attnopt.spec",
    "attnopt.mask",
    "attnopt.mask_blocks",
    "attnopt.errors",
    "attnopt.options",
)

#: State that lives in a module, each with the reason why it has to: "module.NAME".
STATE = {
    "attnopt.backend._history": "attnopt.reports() tells of earlier compilations; bounded, behind a lock",
    "attnopt.policy._quarantined": "a kernel that was found wrong stays off in this process; behind a lock",
}

FILE_LINES, TRITON_FILE_LINES = 300, 400
FUNCTION_LINES, JIT_LINES, MEDIAN_LINES = 40, 150, 10

FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "os.system", "os.popen"}
MUTABLE = (
    "dict",
    "list",
    "set",
    "defaultdict",
    "deque",
    "Counter",
    "OrderedDict",
    "WeakKeyDictionary",
    "local",
)
MUTATORS = {
    "append",
    "add",
    "update",
    "pop",
    "clear",
    "setdefault",
    "extend",
    "remove",
    "discard",
    "insert",
    "popitem",
}


def layer(name: str) -> tuple[int, str] | None:
    """The height of a module and the cell it stands in; None if it is in no layer."""
    found = ((height, p) for height, patterns in enumerate(LAYERS) for p in patterns if fnmatch(name, p))
    height, pattern = next(found, (-1, ""))
    if height < 0:
        return None
    folder = ".".join(name.split(".")[:3])
    return height, folder if pattern == "attnopt.kernels.*" else pattern


def own_module(name: str) -> str | None:
    """The module of ours that the imported `name` is, or lies in; None for other packages."""
    known = {module.name for module in PACKAGE} | {"attnopt", "attnopt.passes", "attnopt.kernels"}
    parts = name.split(".")
    candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in known), None)


def test_every_module_stands_in_a_layer() -> None:
    assert [module.name for module in PACKAGE if layer(module.name) is None] == []


def test_imports_point_down() -> None:
    assert [line for module in PACKAGE for line in upward_imports(module)] == []


def upward_imports(module: Module) -> Iterator[str]:
    here = layer(module.name)
    for node, name in imports(module.tree):
        target = own_module(name)
        there = layer(target) if target else None
        if here and there and there[0] >= here[0] and there[1] != here[1]:
            yield f"{module.at(node)}: {module.name} imports {target}"


def test_third_parties_are_confined() -> None:
    assert [line for module in PACKAGE for line in strays(module)] == []


def strays(module: Module) -> Iterator[str]:
    for node, name in imports(module.tree):
        for party, allowed in CONFINED.items():
            if within(name, party) and not any(fnmatch(module.name, pattern) for pattern in allowed):
                yield f"{module.at(node)}: only {allowed} may import {party}"
        if within(name, "torch.fx") and any(fnmatch(module.name, pattern) for pattern in NO_FX):
            yield f"{module.at(node)}: {module.name} must not know torch.fx"


def test_triton_modules_are_imported_where_they_launch() -> None:
    found = [
        f"{module.at(node)}: {name}"
        for module in PACKAGE
        if not module.is_triton
        for node in module.tree.body
        for _, name in imports(ast.Module([node], []))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and ".triton_" in name.replace("._triton", ".triton_")
    ]
    assert found == []


def test_the_linked_packages_have_one_name() -> None:
    everything = [*PACKAGE, *(Module(path) for path in (ROOT / "tests").rglob("*.py"))]
    found = [
        f"{module.at(node)}: {name}"
        for module in everything
        for node, name in imports(module.tree)
        if name.split(".")[0] in {"passes", "kernels"}
    ]
    assert found == []


def test_the_linked_packages_are_namespaces() -> None:
    assert [path for name in ("passes", "kernels") for path in (ROOT / name).rglob("__init__.py")] == []
    assert all((ROOT / "attnopt" / name).readlink() == Path("..", name) for name in ("passes", "kernels"))


def test_files_are_short() -> None:
    lengths = {module: module.text.count("\n") for module in PACKAGE}
    limits = {module: TRITON_FILE_LINES if module.is_triton else FILE_LINES for module in PACKAGE}
    assert [f"{m.path}: {lengths[m]} lines" for m in PACKAGE if lengths[m] > limits[m]] == []


def test_functions_are_short() -> None:
    found = [
        f"{module.at(function)}: {function.name} has {code_lines(function)} lines"
        for module in PACKAGE
        for function in module.functions
        if code_lines(function) > (JIT_LINES if is_jit(function) else FUNCTION_LINES)
    ]
    assert found == []


def test_the_median_function_is_very_short() -> None:
    lengths = [code_lines(function) for module in PACKAGE for function in module.functions]
    assert median(lengths) <= MEDIAN_LINES


def test_only_the_backend_catches_everything() -> None:
    broad = [
        (module.name, module.at(node))
        for module in PACKAGE
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ExceptHandler) and catches_everything(node)
    ]
    assert [at for name, at in broad if name != "attnopt.backend"] == []
    assert len(broad) <= 1, broad


def catches_everything(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    caught = ast.unparse(handler.type).strip("()").replace(" ", "").split(",")
    return not {"Exception", "BaseException"}.isdisjoint(caught)


def test_nothing_runs_code_from_data() -> None:
    assert [line for module in PACKAGE for line in dangers(module)] == []


def dangers(module: Module) -> Iterator[str]:
    for node, name in imports(module.tree):
        if name.split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"{module.at(node)}: imports {name}"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func) in FORBIDDEN_CALLS:
            yield f"{module.at(node)}: calls {ast.unparse(node.func)}"
        if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
            yield f"{module.at(node)}: starts a shell"


def test_modules_hold_no_state() -> None:
    assert [line for module in PACKAGE for line in state(module)] == []


def state(module: Module) -> Iterator[str]:
    """`global` statements, and containers of the module that are no constants by name or by use."""
    yield from (
        f"{module.at(n)}: {ast.unparse(n)}" for n in ast.walk(module.tree) if isinstance(n, ast.Global)
    )
    changed = {name for node in ast.walk(module.tree) for name in changed_names(node)}
    for node in module.tree.body:
        for name in container_names(node):
            is_constant = name == name.upper() and name not in changed
            if not is_constant and name != "__all__" and f"{module.name}.{name}" not in STATE:
                yield f"{module.at(node)}: {name} is state; if it has to be, name it in STATE with the reason"


def container_names(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds to a container that could change."""
    if not isinstance(node, ast.Assign | ast.AnnAssign) or not node.value:
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    made = node.value
    literal = isinstance(made, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)
    called = isinstance(made, ast.Call) and ast.unparse(made.func).split(".")[-1] in MUTABLE
    return [target.id for target in targets if isinstance(target, ast.Name)] if literal or called else []


def changed_names(node: ast.AST) -> Iterator[str]:
    """The names whose contents a node changes: NAME[i] = x, del NAME[i], NAME |= x, NAME.append(x)."""
    match node:
        case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
            yield name
        case ast.AugAssign(target=ast.Name(id=name)):
            yield name
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=verb)) if verb in MUTATORS:
            yield name
