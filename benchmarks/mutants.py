"""Mutation testing: the code is changed in one small place at a time, and the tests that run the place have to notice.

``python benchmarks/mutants.py --json FILE`` changes comparisons, arithmetic, conditions, numbers and extremes of the tests, the
procedures and the calibration, with numba's compiler off. Of each module ``--sample`` mutants are drawn with a seed. The tests
that run the changed function are tried, quickest first, up to ``--seconds`` of them. ``FILE.work`` keeps which tests run which
function and what was tried, so that a run that was ended goes on; remove it after a change. ``mutants_judged.json`` says why a
survivor may live.

Tests are collected once. Each mutant is a process forked from there, in which the function gets other code; what runs on import,
as a constant, is imported afresh.
"""

import argparse
import ast
import copy
import gc
import importlib
import importlib.machinery
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("riskcal/pvalues", "riskcal/fwer", "riskcal/calibration")
JUDGED = Path(__file__).with_name("mutants_judged.json")
#: CPU seconds after which a test is too slow to be tried on mutants, here without a compiler.
QUICK = 2.0
#: Has to be set before anything is imported.
ENVIRONMENT = {"NUMBA_DISABLE_JIT": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
#: Imported once, before a process is forked for each mutant: all that is slow and not riskcal's.
SLOW = "hypothesis matplotlib.pyplot mpmath numba pandas pyarrow.parquet pydantic scipy.integrate scipy.stats typer.testing"
#: hypothesis, among these, is imported before pytest could rewrite it, which it need not.
OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "--hypothesis-seed=0",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)

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
                    yield lambda n, place=place, other=other: with_comparison(n, place, other)
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


def mutants_of(file: str) -> Iterator[dict[str, Any]]:
    """Every mutant of a file: where it is, what stood there and stands there, and the way to it through the tree."""
    tree = ast.parse((ROOT / file).read_text())
    stack: list[tuple[Any, list[Any], str, bool]] = [(tree, [], "", False)]
    while stack:
        node, way, inside, function = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not function:
            inside = f"{inside}.{node.name}".lstrip(".")
            function = isinstance(node, ast.FunctionDef)
        for number, change in enumerate(changes(node)):
            yield {
                "file": file,
                "line": node.lineno,
                "inside": inside,
                "function": function,
                "was": shown(node),
                "is": shown(change(copy.deepcopy(node))),
                "way": way,
                "number": number,
            }
        stack.extend(
            (child, [*way, [name, place]], inside, function)
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
    return ast.fix_missing_locations(tree)


class TooSlow(BaseException):
    """A test took longer than it may; not an Exception, which tests expect."""


def _end(*_: Any) -> None:
    raise TooSlow(f"takes more than {QUICK:g} s")


def apart(run: Callable[[], int], log: Path, seconds: float | None = None) -> int:
    """What ``run`` returns in a process of its own that prints to ``log``; 128 and more where it took too long."""
    child = os.fork()
    if not child:
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(printed, 1), os.dup2(printed, 2)
        if seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
            signal.alarm(int(20 * seconds))  # of one that sleeps
        code = 1
        try:
            code = run()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """Of the functions and methods of a module's code, but not of functions within them."""
    for one in code.co_consts:
        if isinstance(one, CodeType):
            if one.co_flags & 1:  # with fast locals: a function
                yield one
            else:
                yield from codes_in(one)


def key(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def put_in_place(mutant: dict[str, Any]) -> bool:
    """Whether the mutant could be made by giving functions other code: not where the change runs on import."""
    file = str(ROOT / mutant["file"])
    code = {key(one): one for one in codes_in(compile(mutated(mutant), file, "exec"))}
    done = False
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and one.__code__.co_filename == file:
            other = code.get(key(one.__code__))
            if other is not None and other != one.__code__:
                one.__code__, done = other, True
    return done


def passing(items: Sequence[pytest.Item]) -> bool:
    """Whether tests pass, up to the first that does not."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            print(item.nodeid)
            return False
    return True


@dataclass(frozen=True)
class Plan:
    """What is tried with what: the mutants drawn, tests in order, where results go."""

    mutants: list[dict[str, Any]]
    work: Path
    seconds: float
    known: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def reached(self) -> dict[str, dict[str, float]]:
        """By function (``file:qualified name``), the seconds of each quick test that runs it."""
        found: dict[str, dict[str, float]] = json.loads((self.work / "reached.json").read_text())
        return found

    def tests(self, mutant: dict[str, Any], reached: dict[str, dict[str, float]]) -> list[str]:
        """The quickest tests of the mutant's function or, on import, of those that use the names it defines, or of the file."""
        place = f"{mutant['file']}:"
        of_file = {
            name[len(place) :]: one for name, one in reached.items() if name.startswith(place)
        }
        found = {**of_file.get(mutant["inside"], {})}
        if not found:
            for name in users(mutant):
                found |= of_file.get(name, {})
        if not found and not is_function(mutant):
            for tests in of_file.values():
                found |= tests
        total, taken = 0.0, []
        for test in sorted(found, key=found.__getitem__):
            total += found[test]
            if taken and total > self.seconds:
                break
            taken.append(test)
        return taken

    def keep(self, mutant: dict[str, Any], outcome: str) -> None:
        """Append a result, and say it where the mutant lives."""
        self.known[address(mutant)] = mutant | {"outcome": outcome}
        with (self.work / "tried.jsonl").open("a") as file:
            file.write(json.dumps(mutant | {"outcome": outcome}) + "\n")
        if outcome in ("survived", "not reached"):
            place = f"{mutant['file']}:{mutant['line']}"
            print(f"{place} {outcome}: {mutant['was']}  ->  {mutant['is']}", flush=True)


def is_function(mutant: dict[str, Any]) -> bool:
    """Whether the mutant's innermost definition is a function."""
    return mutant["function"]


def users(mutant: dict[str, Any]) -> list[str]:
    """Functions of the file that name what the mutant's statement on import assigns to."""
    tree = ast.parse((ROOT / mutant["file"]).read_text())
    around = [n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.AnnAssign)]
    around = [n for n in around if n.lineno <= mutant["line"] <= (n.end_lineno or 0)]
    defined = {n.id for one in around for n in ast.walk(one) if isinstance(n, ast.Name)}
    return [
        one.name
        for one in ast.walk(tree)
        if isinstance(one, ast.FunctionDef)
        and any(isinstance(n, ast.Name) and n.id in defined for n in ast.walk(one))
    ]


class Trials:
    """A plugin of pytest that, instead of running what was collected, runs it on mutants."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Look first which test runs what, then try."""
        items = {item.nodeid: item for item in session.items}
        if not (self.plan.work / "reached.json").exists():
            apart(lambda: self.survey(list(items.values())), self.plan.work / "survey.log")
        reached = self.plan.reached()
        for mutant in self.plan.mutants:
            if address(mutant) in self.plan.known:
                continue
            tests = [items[name] for name in self.plan.tests(mutant, reached) if name in items]
            if not tests:
                self.plan.keep(mutant, "not reached")
                continue

            def run(mutant: dict[str, Any] = mutant, tests: list[pytest.Item] = tests) -> int:
                return 2 if not put_in_place(mutant) else 1 - passing(tests)

            code = apart(run, self.plan.work / "mutant.log", 3.0 * self.plan.seconds + 10.0)
            if code != 2:  # else it is for `afresh`
                self.plan.keep(mutant, outcome(code))
        return True

    def survey(self, items: Sequence[pytest.Item]) -> int:
        """Write which test runs which function, and in how many CPU seconds."""
        files = tuple(str(ROOT / module) for module in MODULES)
        seen: set[CodeType] = set()

        def called(frame: FrameType, event: str, argument: object) -> None:
            seen.add(frame.f_code)

        found: dict[str, dict[str, float]] = defaultdict(dict)
        signal.signal(signal.SIGPROF, _end)
        for item, following in zip(items, [*items[1:], None], strict=True):
            seen.clear()
            started = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_PROF, QUICK)
                sys.settrace(called)  # type: ignore[arg-type]
                reports = runtestprotocol(item, log=False, nextitem=following)
            except TooSlow:
                continue
            finally:
                sys.settrace(None)
                signal.setitimer(signal.ITIMER_PROF, 0.0)
            if any(not report.passed for report in reports):
                print(f"left out: {item.nodeid}")
                continue
            took = time.process_time() - started
            for code in seen:
                if code.co_filename.startswith(files):
                    file = Path(code.co_filename).relative_to(ROOT).as_posix()
                    name = code.co_qualname.partition(".<locals>")[0]
                    found[f"{file}:{name}"][item.nodeid] = took
        (self.plan.work / "reached.json").write_text(json.dumps(found))
        return 0


def outcome(code: int) -> str:
    return {0: "survived"}.get(code, "killed" if code < 128 else "out of time")


def afresh(plan: Plan) -> None:
    """Try what is left: mutants of what runs on import, each in a process that imports it."""
    reached = plan.reached()
    for mutant in plan.mutants:
        if address(mutant) not in plan.known:
            tests = plan.tests(mutant, reached)
            limit = 3.0 * plan.seconds + 20.0
            code = apart(lambda m=mutant, t=tests: imported(m, t), plan.work / "mutant.log", limit)
            plan.keep(mutant, outcome(code))


def imported(mutant: dict[str, Any], tests: list[str]) -> int:
    """Pytest's exit code where the mutant is imported in the place of its file."""
    file, plain = str(ROOT / mutant["file"]), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        return compile(mutated(mutant), file, "exec") if self.path == file else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return int(pytest.main([*OPTIONS, "-x", *tests]))


def collected(plan: Plan, tests: list[str]) -> int:
    """Collect, and try all that can be tried with what is imported then."""
    for module in MODULES:
        for path in (ROOT / module).glob("*.py"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return int(pytest.main([*OPTIONS, *tests], plugins=[Trials(plan)]))


def address(mutant: dict[str, Any]) -> tuple[Any, ...]:
    return *name_of(mutant), mutant["line"], mutant["number"], repr(mutant["way"])


def name_of(mutant: dict[str, Any]) -> tuple[str, ...]:
    return tuple(mutant[part] for part in ("file", "inside", "was", "is"))


def written(plan: Plan, totals: dict[str, int]) -> dict[str, Any]:
    """Counts by module, and the survivors with the reasons that are known."""
    judged = json.loads(JUDGED.read_text()) if JUDGED.exists() else []
    reasons = {name_of(one): one["why"] for one in judged}
    results = [plan.known[address(one)] for one in plan.mutants if address(one) in plan.known]
    modules = {
        module: {"mutants": total}
        | Counter(one["outcome"] for one in results if one["file"].startswith(module))
        for module, total in totals.items()
    }
    survivors = [
        {part: one[part] for part in ("file", "line", "inside", "was", "is", "outcome")}
        | {"why": reasons.get(name_of(one), "")}
        for one in results
        if one["outcome"] in ("survived", "not reached")
    ]
    return {"modules": modules, "survivors": survivors}


def main() -> None:
    """Draw, try, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sample", type=int, default=400, help="mutants of each module")
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, choices=MODULES, help="these alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of tests for each mutant")
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("tests", nargs="*", help="default: the core's, tests/test_*.py")
    asked = parser.parse_args()
    os.chdir(ROOT)
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    for name in SLOW.split():
        importlib.import_module(name)
    work = asked.json.with_name(f"{asked.json.name}.work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / "tried.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    known = {address(one): one for one in map(json.loads, lines)}
    if asked.again:
        known = {k: one for k, one in known.items() if one["outcome"] == "killed"}
    drawn, totals = [], {}
    for module in asked.modules:
        files = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / module).glob("*.py"))
        every = [mutant for file in files for mutant in mutants_of(file)]
        totals[module] = len(every)
        random.Random(asked.seed).shuffle(every)
        drawn += every[: asked.sample]
    plan = Plan(drawn, work, asked.seconds, known)
    tests = asked.tests or sorted(map(str, Path("tests").glob("test_*.py")))
    apart(lambda: collected(plan, tests), work / "trials.log")
    for line in kept.read_text().splitlines()[len(lines) :] if kept.exists() else []:
        plan.known[address(json.loads(line))] = json.loads(line)
    afresh(plan)
    found = written(plan, totals)
    asked.json.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["modules"], indent=1))
    print(sum(not one["why"] for one in found["survivors"]), "survivors without a reason")


if __name__ == "__main__":
    main()
