"""Reading the program text of a .pt2 without running it.

The JSON of an exported program is not mere data. torch evaluates its size expressions (`sympify`) and its guards
(`exec`), writes its names into generated Python, resolves its call targets by attribute look-up from `torch`, and
imports modules that its tree specs name. So each string is checked against what an honest program puts there.
"""

import ast
import json
import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from attnopt.errors import UnsafeFileError


def words(text: str) -> frozenset[str]:
    """The words of `text` as a set."""
    return frozenset(text.split())


_PLAIN = re.compile(r"[\w .\-+/]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_EXPRESSION = re.compile(r"[\w '(),.=+\-*/%<>!&|~\[\]]*", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 20_000  # letters of one expression; longer ones only serve to exhaust the parser
_STEEPEST = 64  # largest exponent or shift

_NAMESPACES = frozenset({"aten", "prims", "attnopt", "transformers", "torchvision"})
_TOUCH_FILES = frozenset({"save", "from_file"})
_HIGHER_ORDER = words(
    "cond while_loop scan associative_scan map_impl wrap wrap_with_set_grad_enabled wrap_with_autocast flex_attention "
    "tag_activation_checkpoint wrap_activation_checkpoint invoke_subgraph strict_mode out_dtype hints_wrapper "
    "auto_functionalized auto_functionalized_v2 with_effects"
)
_OPERATORS = words(
    "_operator.add _operator.sub _operator.mul _operator.truediv _operator.floordiv _operator.mod _operator.pow "
    "_operator.neg _operator.pos _operator.eq _operator.ne _operator.lt _operator.le _operator.gt _operator.ge "
    "_operator.and_ _operator.or_ _operator.not_ _operator.lshift _operator.rshift _operator.getitem "
    "math.ceil math.floor math.trunc math.sqrt torch.sym_int torch.sym_float torch.sym_max torch.sym_min "
    "torch.sym_not torch.sym_ite torch.sym_sum torch._sym_sqrt"
)
_FUNCTIONS = words(
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs floor ceiling sqrt And Or Not Eq Ne Lt Le Gt Ge "
    "Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan Piecewise ExprCondPair "
    "FloorDiv ModularIndexing Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural "
    "FloatPow FloatTrueDiv IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt "
    "RoundDecimal ToFloat Identity Ceil OpaqueUnaryFn_sqrt max min int float abs round"
)
_METHODS = words("size stride storage_offset dim numel")
_MATHS = words("math.ceil math.floor math.trunc math.sqrt math.pow torch.sym_max torch.sym_min")
_STEEP = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_GRAMMAR = (
    ast.Expression, ast.Load, ast.Name, ast.Constant, ast.Call, ast.keyword, ast.UnaryOp, ast.BinOp, ast.Compare,
    ast.BoolOp, ast.Tuple, ast.unaryop, ast.cmpop, ast.boolop, ast.operator, ast.Subscript, ast.Attribute,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contents:
    """What a program needs of the process that loads it: operators, and types of nested inputs and outputs."""

    targets: frozenset[str]
    types: frozenset[str]


def check_program(text: str) -> Contents:
    """What the program in `text` (JSON) needs. Raises UnsafeFileError for anything in it that could run code."""
    found = {*_strings(parse(text))}
    for kind, value in sorted(found):
        reason = _CHECKS.get(kind, _plain)(value)
        if reason:
            raise UnsafeFileError(f"its program has, as {kind}, {_cut(value)!r}: {reason}")
    specs = (value for kind, value in found if kind in ("in_spec", "out_spec"))
    types = {value for spec in specs for kind, value in _strings(parse(spec)) if kind == "type"}
    return Contents(frozenset(v for kind, v in found if kind in ("target", "as_operator")), frozenset(types))


def parse(text: str) -> object:
    """JSON as Python data. Raises UnsafeFileError when it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsafeFileError(f"its JSON is malformed: {error}") from error


def _strings(body: object) -> Iterator[tuple[str, str]]:
    """Each string of `body` with what it is: the key under which it stands; keys of objects are of kind `key`."""
    open_: list[tuple[str, object]] = [("program", body)]
    while open_:
        kind, value = open_.pop()
        if isinstance(value, str):
            yield kind, value
        elif isinstance(value, list):
            open_.extend((kind, item) for item in value)
        elif isinstance(value, dict):
            _refuse_objects(value)
            yield from (("key", key) for key in value)
            open_.extend(("metadata" if kind == "metadata" else key, item) for key, item in value.items())


def _refuse_objects(value: Mapping[str, object]) -> None:
    """Custom objects come with a pickle of their own."""
    for key in ("as_custom_obj", "custom_obj", "custom_obj_values"):
        if value.get(key):
            raise UnsafeFileError("its program uses a custom object, which is stored as a pickle")


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _plain(text: str) -> str:
    return "" if _PLAIN.fullmatch(text) else "wanted letters, digits and .-+/_ only"


def _name(text: str) -> str:
    return (
        "" if not text or _NAME.fullmatch(text) else "wanted a name, as it becomes part of a Python function"
    )


def _parameter(text: str) -> str:
    return _name(text) or ("it is a keyword of Python" if keyword.iskeyword(text) else "")


def _free(text: str) -> str:
    """Comments and string arguments, which are quoted before use."""
    return "it has control characters" if _CONTROL.search(text) else ""


def _target(text: str) -> str:
    match text.split("."):
        case ["torch", "ops", "higher_order", name]:
            known = name in _HIGHER_ORDER
        case ["torch", "ops", space, name, *overload] if len(overload) <= 1:
            known = (
                space in _NAMESPACES
                and name not in _TOUCH_FILES
                and all(map(_NAME.fullmatch, [name, *overload]))
            )
        case _:
            known = text in _OPERATORS
    return "" if known else "it is not an operator of ATen, attnopt, transformers or torchvision"


def _tree(text: str) -> str:
    """A tree spec: how nested inputs are laid out. Contexts are JSON within the JSON."""
    for kind, value in _strings(parse(text)):
        if kind == "context":
            reason = _context(value)
        else:
            reason = _plain(value) or ("it imports a module" if "defaultdict" in value else "")
        if reason:
            return reason
    return ""


def _context(text: str) -> str:
    body = parse(text) if text[:1] in '["{' else text
    items = body if isinstance(body, list) else [body]
    plain = all(
        item is None or isinstance(item, int) or (isinstance(item, str) and not _plain(item))
        for item in items
    )
    return "" if plain else "wanted plain keys"


def _expression(text: str) -> str:
    """A size expression or a guard: arithmetic over symbols, sizes and constants, nothing else."""
    if len(text) > _LONGEST or not _EXPRESSION.fullmatch(text):
        return "wanted arithmetic"
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "it is not an expression"
    return next((reason for node in ast.walk(tree) if (reason := _text_inside(node) or _node(node))), "")


def _text_inside(node: ast.AST) -> str:
    """Strings name a symbol, write a number or index the inputs; elsewhere sympy would evaluate them in turn."""
    match node:
        case ast.Subscript() | ast.Call(func=ast.Name("Symbol" | "Float" | "Rational")):
            return ""
    texts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.Constant)]
    return "it has a string where none belongs" if any(isinstance(text.value, str) for text in texts) else ""


def _node(node: ast.AST) -> str:
    """Why this node of an expression is refused, or ""."""
    match node:
        case ast.Call():
            return _call(node)
        case ast.Attribute():
            fine = node.attr in _METHODS or ast.unparse(node) in _MATHS | {"math.inf"}
            return "" if fine else f"it reads the attribute {node.attr!r}"
        case ast.Constant():
            return _constant(node.value)
        case ast.BinOp(op=ast.Pow() | ast.LShift()):
            return "" if _is_small(node.right) else "it would compute an absurdly large number"
    return "" if isinstance(node, _GRAMMAR) else "it is not arithmetic"


def _call(node: ast.Call) -> str:
    match node.func:
        case ast.Name(name):
            fine = name in _FUNCTIONS
        case ast.Attribute(attr=name):
            fine = name in _METHODS or ast.unparse(node.func) in _MATHS
        case _:
            name, fine = ast.unparse(node.func), False
    if fine and name in _STEEP and not all(map(_is_small, node.args[1:])):
        return "it would compute an absurdly large number"
    return "" if fine else f"it calls {name!r}"


def _is_small(node: ast.AST) -> bool:
    match node:
        case ast.Constant(int(value)):
            return abs(value) <= _STEEPEST
        case (
            ast.UnaryOp(op=ast.USub(), operand=inner)
            | ast.Call(func=ast.Name("Integer"), args=[inner], keywords=[])
        ):
            return _is_small(inner)
        case ast.Call(func=ast.Name("Rational"), args=parts, keywords=[]):
            return all(map(_is_small, parts))
    return False


def _constant(value: object) -> str:
    match value:
        case None | bool() | float():
            return ""
        case int():
            return "" if abs(value) < 2**63 else "it has an absurdly large number"
        case str():
            return _plain(value)
    return "it has an unusual constant"


#: What a string is checked for, by the key under which it stands; all others must be plain.
_CHECKS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        **dict.fromkeys(("name", "as_name"), _name),
        **dict.fromkeys(("forward_arg_names", "field_names"), _parameter),
        **dict.fromkeys(("target", "as_operator"), _target),
        **dict.fromkeys(("expr_str", "guards_code"), _expression),
        **dict.fromkeys(("in_spec", "out_spec"), _tree),
        **dict.fromkeys(("metadata", "as_string", "as_strings"), _free),
    }
)
