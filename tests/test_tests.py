"""The tests, read as source: nothing is without a test, and no test is without a claim."""

import ast

from source import PACKAGE, ROOT, Function, Module, imports, within

TESTS = ROOT / "tests"
CHECKS = ("assert", "check", "expect", "raises", "warns", "opcheck", "gradcheck")


def test_every_rule_has_its_test() -> None:
    names = [m.path.stem for m in PACKAGE if m.name.startswith("attnopt.passes.") and "\nRULE = " in m.text]
    assert [name for name in names if not (TESTS / "passes" / f"test_{name}.py").exists()] == []


def test_every_part_of_a_rule_is_tested() -> None:
    used = {name for path in TESTS.rglob("*.py") for _, name in imports(Module(path).tree)}
    twins = {path.stem.split("_")[1] for path in (TESTS / "passes").glob("test_*.py")}
    untested = [
        module.name
        for module in PACKAGE
        if module.name.startswith("attnopt.passes.")
        if not any(within(name, module.name) for name in used)
        if module.path.stem.split("_")[0] not in twins
    ]
    assert untested == []


def test_every_kernel_has_tests() -> None:
    folders = [
        path for path in sorted((ROOT / "kernels").iterdir()) if path.is_dir() and any(path.glob("*.py"))
    ]
    assert [f.name for f in folders if not any((TESTS / "kernels").glob(f"test_{f.name}*.py"))] == []


def test_every_test_can_fail() -> None:
    tests = [Module(path) for path in sorted(TESTS.rglob("test_*.py"))]
    found = [
        f"{module.at(function)}: {function.name}"
        for module in tests
        for function in module.functions
        if function.name.startswith("test_") and not makes_a_claim(function)
    ]
    assert found == []


def makes_a_claim(function: Function) -> bool:
    """Whether a test asserts, expects an error, or calls a function that is named after checking."""
    called = (ast.unparse(n.func).split(".")[-1] for n in ast.walk(function) if isinstance(n, ast.Call))
    asserts = any(isinstance(node, ast.Assert) for node in ast.walk(function))
    return asserts or any(name.lstrip("_").startswith(CHECKS) for name in called)


def test_no_test_is_switched_off() -> None:
    banned = ("pytest.skip", "pytest.mark.skip", "pytest.xfail", "pytest.mark.xfail", "pytest.importorskip")
    found = [
        f"{module.at(node)}: {ast.unparse(node)}"
        for module in (Module(path) for path in sorted(TESTS.rglob("*.py")))
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(banned)
    ]
    assert found == []


def test_no_test_counts_reports() -> None:
    """The history is bounded: once it is full its length says nothing (use `compiling.reports_after`)."""
    found = [
        f"{module.at(node)}: {ast.unparse(node)}"
        for module in (Module(path) for path in sorted(TESTS.rglob("*.py")))
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and _is_history(node.value))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) == "len" and _is_history(node.args[0]))
    ]
    assert found == []


def _is_history(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "reports"
