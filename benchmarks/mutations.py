"""Code changed in one small place at a time: what may be changed, and the tree that comes of it."""

import ast
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
_PAIRS = (
    "min max",
    "minimum maximum",
    "any all",
    "argmin argmax",
    "floor ceil",
    "accumulate reduce",
)
NAMES = {a: b for pair in _PAIRS for a, b in (pair.split(), pair.split()[::-1])}

Change = Callable[[Any], Any]


def with_operator(node: Any, other: type) -> Any:
    node.op = other()
    return node


def with_comparison(node: Any, place: int, other: type) -> Any:
    node.ops[place] = other()
    return node


def with_number(node: Any) -> Any:
    value = node.value
    if isinstance(value, bool):
        node.value = not value
    elif isinstance(value, int):
        node.value = value + 1
    else:
        node.value = 2.0 * value or 1.0
    return node


def with_negation(node: Any) -> Any:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def with_name(node: Any, part: str) -> Any:
    setattr(node, part, NAMES[getattr(node, part)])
    return node


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def changes(node: Any) -> Iterator[Change]:
    """What may be done to a node, each to a copy of it."""
    match node:
        case ast.Compare():
            for place, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    yield partial(with_comparison, place=place, other=other)
        case ast.BinOp() if is_text(node.left) or is_text(node.right):
            return
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in OPERATORS:
            yield lambda n: with_operator(n, OPERATORS[type(n.op)])
        case ast.UnaryOp():
            yield lambda n: n.operand
        case ast.Constant(value=bool() | int() | float()):
            yield with_number
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.Constant):
                yield with_negation
        case ast.Name(ctx=ast.Load()) if node.id in NAMES:
            yield lambda n: with_name(n, "id")
        case ast.Attribute() if node.attr in NAMES:
            yield lambda n: with_name(n, "attr")


def below(node: ast.AST) -> Iterator[tuple[str, int | None, ast.AST]]:
    """A node's children, less messages, decorators and annotations."""
    for name, value in ast.iter_fields(node):
        if name in ("decorator_list", "returns", "annotation"):
            continue
        for place, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                yield name, place, child


def shown(node: Any) -> str:
    return ast.unparse(node.test if isinstance(node, ast.If | ast.IfExp | ast.While) else node)


def marked(line: str, node: Any) -> str:
    """A line of source with a node of it between marks."""
    text = line.encode()
    end = node.end_col_offset if node.end_lineno == node.lineno else len(text)
    parts = text[: node.col_offset], text[node.col_offset : end], text[end:]
    before, here, after = (part.decode() for part in parts)
    return f"{before}«{here}»{after}".strip()


def lines_of(statement: Any) -> tuple[int, int]:
    """First and last line of a statement, but not of those within it."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) and body else statement.end_lineno
    return statement.lineno, max(statement.lineno, last)


def mutants_of(file: str) -> Iterator[dict[str, Any]]:
    """Every mutant of a file: where it is, what stood there and stands there, and the way to it through the tree."""
    source = (ROOT / file).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    stack: list[tuple[Any, list[Any], str, bool, tuple[int, int]]] = [(tree, [], "", False, (1, 1))]
    while stack:
        node, way, inside, function, around = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not function:
            inside = f"{inside}.{node.name}".lstrip(".")
            function = isinstance(node, ast.FunctionDef)
        if isinstance(node, ast.stmt):
            around = lines_of(node)
        for number, change in enumerate(changes(node)):
            place = node.test if isinstance(node, ast.If | ast.IfExp | ast.While) else node
            yield {
                "file": file,
                "line": place.lineno,
                "lines": [min(around[0], place.lineno), max(around[1], place.lineno)],
                "inside": inside,
                "function": function,
                "text": marked(lines[place.lineno - 1], place),
                "was": shown(node),
                "is": shown(change(copy.deepcopy(node))),
                "way": way,
                "number": number,
            }
        stack.extend(
            (child, [*way, [name, place]], inside, function, around)
            for name, place, child in reversed(list(below(node)))
        )


def mutated(mutant: dict[str, Any]) -> ast.Module:
    """The tree of the mutant's file."""
    tree = ast.parse((ROOT / mutant["file"]).read_text())
    node: Any = tree
    for name, place in mutant["way"]:
        parent, node = node, getattr(node, name)
        node = node if place is None else node[place]
    changed = list(changes(node))[mutant["number"]](node)
    if place is None:
        setattr(parent, name, changed)
    else:
        getattr(parent, name)[place] = changed
    fixed: ast.Module = ast.fix_missing_locations(tree)
    return fixed
