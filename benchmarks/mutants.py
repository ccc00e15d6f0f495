"""Mutation testing: the code is changed in one small place at a time, and the tests that run the place have to notice.

``python benchmarks/mutants.py --json FILE`` changes comparisons, arithmetic, conditions, numbers and extremes of the tests, the
procedures and the calibration. Of each module ``--sample`` mutants are drawn with a seed. Those tests that run the changed line
are tried, first those that most often noticed others there for their time: on all mutants for the first number of
``--seconds``, then what is left on those that live and may not, up to the second. Files that numba compiles are run without its
compiler. A fresh clone, where numba has compiled nothing yet, is too slow for many tests: run the tests there once before.
``FILE.work`` keeps which tests run which line and what was tried, so that a run that was ended goes on; remove it after a change.
``mutants_judged.json`` says why a survivor may live.

Tests are collected once. Each mutant is a process forked from there, in which the function gets other code; what runs on import,
as a constant, is imported afresh.
"""

import argparse
import ast
import functools
import gc
import importlib
import importlib.machinery
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from mutations import ROOT, mutants_of, mutated

MODULES = ("riskcal/pvalues", "riskcal/fwer", "riskcal/calibration")
JUDGED = Path(__file__).with_name("mutants_judged.json")
#: CPU seconds after which a test is too slow to be tried on mutants. Without a compiler, `tests/conftest.py` ends it at 2.
QUICK = 1.0
#: Imported once, before a process is forked for each mutant: all that is slow and not riskcal's.
SLOW = "hypothesis matplotlib.pyplot mpmath numba pandas pyarrow.parquet pydantic scipy.integrate scipy.stats typer.testing"
OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "--hypothesis-seed=0",
    "--assert=plain",
    "--tb=no",
)
#: What a process ends with: a test failed; the change runs on import; a test took much longer than without it.
SURVIVED, KILLED, ON_IMPORT, SLOWER = range(4)


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


def functions() -> dict[tuple[str, str, int], list[FunctionType]]:
    """All that are in memory, of the modules that are changed, by their code."""
    folders, found = tuple(str(ROOT / module) for module in MODULES), defaultdict(list)
    for one in gc.get_objects():
        if isinstance(one, FunctionType) and one.__code__.co_filename.startswith(folders):
            found[key(one.__code__)].append(one)
    return found


def put_in_place(
    mutant: dict[str, Any], known: dict[tuple[str, str, int], list[FunctionType]]
) -> bool:
    """Whether the mutant could be made by giving functions other code: not where the change runs on import."""
    if mutant["inside"] in called_on_import(mutant["file"]):
        return False
    done = False
    for code in codes_in(compile(mutated(mutant), str(ROOT / mutant["file"]), "exec")):
        for one in known.get(key(code), ()):
            if one.__code__ != code:
                one.__code__, done = code, True
    return done


@functools.cache
def called_on_import(file: str) -> set[str]:
    """Functions whose names stand in calls outside of functions."""
    tree = ast.parse((ROOT / file).read_text())
    kinds = ast.FunctionDef | ast.ClassDef
    calls = [
        n
        for one in tree.body
        if not isinstance(one, kinds)
        for n in ast.walk(one)
        if isinstance(n, ast.Call)
    ]
    return {one.func.id for one in calls if isinstance(one.func, ast.Name)}


def passing(items: Sequence[pytest.Item], by: Path) -> int:
    """Whether tests pass, up to the first that does not, whose place is written to ``by``."""
    slower = False
    for place, item in enumerate(items):
        following = items[place + 1] if place + 1 < len(items) else None
        reports = runtestprotocol(item, log=False, nextitem=following)
        if any(report.failed for report in reports):
            by.write_text(str(place))
            return KILLED
        slower |= any(report.skipped for report in reports)  # it passed without the change
    return SLOWER if slower else SURVIVED


def hasten(items: Sequence[pytest.Item]) -> None:
    """Let hypothesis look for failures, but not for smaller ones or among older ones."""
    from hypothesis import Phase, settings

    name = "_hypothesis_internal_use_settings"
    for item in items:
        test = getattr(item, "obj", None)
        plain = getattr(test, name, None)
        if plain is not None:
            one = settings(plain, phases=(Phase.explicit, Phase.generate), database=None)
            setattr(getattr(test, "__func__", test), name, one)


class Survey:
    """Which of the tests run which line and function, and how long they take."""

    def __init__(self, file: Path, there: Container[str] | None = None) -> None:
        found = json.loads(file.read_text())
        self.seconds: dict[str, float] = found["seconds"]
        self.names = list(self.seconds)
        self.places: dict[str, list[int]] = {
            place: [test for test in tests if there is None or self.names[test] in there]
            for place, tests in found["places"].items()
        }
        self.tries: dict[str, Counter[str]] = defaultdict(Counter)
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)

    def of(self, mutant: dict[str, Any]) -> set[str]:
        """Tests of the statement, else of its function or, on import, of those that use what it defines, or of the file."""
        file, (first, last) = mutant["file"], mutant["lines"]
        for places in (
            [str(line) for line in range(first, last + 1)],
            [mutant["inside"]],
            [] if mutant["function"] else users(mutant),
        ):
            found = {test for place in places for test in self.places.get(f"{file}:{place}", ())}
            if found:
                return {self.names[test] for test in found}
        if mutant["function"]:
            return set()
        of_file = [tests for place, tests in self.places.items() if place.startswith(f"{file}:")]
        return {self.names[test] for tests in of_file for test in tests}

    def chosen(self, mutant: dict[str, Any], tried: set[str], seconds: float) -> list[str]:
        """Tests not yet ``tried``, most promising first, that take so many seconds together; at least one."""
        function, file = f"{mutant['file']}:{mutant['inside']}", mutant["file"]
        kills, tries, more_kills, more_tries = (
            self.kills[function],
            self.tries[function],
            self.kills[file],
            self.tries[file],
        )

        def promise(test: str) -> float:
            share = (kills[test] + 0.2 * more_kills[test] + 0.1) / (
                tries[test] + 0.2 * more_tries[test] + 1.0
            )
            return -share / (self.seconds[test] + 0.01)

        total, taken = 0.0, []
        for test in sorted(self.of(mutant) - tried, key=lambda test: (promise(test), test)):
            total += self.seconds[test]
            if taken and total > seconds:
                break
            taken.append(test)
        return taken

    def learn(self, mutant: dict[str, Any], tests: Sequence[str], by: str | None) -> None:
        """Count what tests noticed: ``by`` the last of them did, if any."""
        for place in (f"{mutant['file']}:{mutant['inside']}", mutant["file"]):
            self.tries[place].update(tests)
            if by is not None:
                self.kills[place][by] += 1


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


def address(mutant: dict[str, Any]) -> tuple[Any, ...]:
    return mutant["file"], mutant["line"], mutant["number"], repr(mutant["way"])


@dataclass
class Plan:
    """What is tried with what: the mutants drawn, files of tests, for how long, where results go, and those there are."""

    mutants: list[dict[str, Any]]
    files: list[str]
    seconds: list[float]
    work: Path
    #: Those that may live: no longer tests are tried on them.
    judged: Container[tuple[str, ...]] = ()
    known: dict[Any, dict[str, Any]] = field(default_factory=dict)

    def read(self) -> None:
        """What was tried up to now."""
        kept = self.work / "tried.jsonl"
        for line in kept.read_text().splitlines() if kept.exists() else ():
            self.known[address(json.loads(line))] = json.loads(line)

    def keep(
        self, mutant: dict[str, Any], outcome: str, tests: Sequence[str], by: str | None
    ) -> None:
        """Append a result."""
        found = mutant | {"outcome": outcome, "by": by, "tests": list(tests)}
        self.known[address(mutant)] = found
        with (self.work / "tried.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")

    def left(self, seconds: float) -> Iterator[tuple[dict[str, Any], set[str]]]:
        """Mutants not yet tried for so long, in the order in which they were drawn, and the tests tried on each."""
        for mutant in self.mutants:
            known = self.known.get(address(mutant))
            if known is None:
                yield mutant, set()
            elif known["outcome"] != "survived" or name_of(mutant) in self.judged:
                continue
            elif seconds > self.seconds[0]:
                yield mutant, set(known["tests"])


class Trials:
    """A plugin of pytest that, instead of running what was collected, runs it on mutants."""

    def __init__(self, plan: Plan, survey: Path) -> None:
        self.plan, self.file = plan, survey

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Look first which test runs what, then try."""
        items = {item.nodeid: item for item in session.items}
        hasten(session.items)
        warm()
        known = functions()
        gc.freeze()
        if not self.file.exists():
            apart(lambda: surveyed(session.items, self.file), self.plan.work / "survey.log")
        survey = Survey(self.file, items)
        for found in self.plan.known.values():
            if found["tests"]:
                survey.learn(found, [t for t in found["tests"] if t in items], found["by"])
        by = self.plan.work / "by"
        spent = 0.0
        for seconds in self.plan.seconds:
            for mutant, tried in list(self.plan.left(seconds)):
                names = survey.chosen(mutant, tried, seconds - spent)
                if not names:
                    if not tried:
                        self.plan.keep(mutant, "not reached", [], None)
                    continue
                tests = [items[name] for name in names]

                def run(mutant: dict[str, Any] = mutant, tests: Any = tests) -> int:
                    return passing(tests, by) if put_in_place(mutant, known) else ON_IMPORT

                code = apart(run, self.plan.work / "mutant.log", 2.0 * (seconds - spent) + 3.0)
                if code != ON_IMPORT:  # else it is for `afresh`
                    killed = code == KILLED and by.exists()
                    names = names[: int(by.read_text()) + 1] if killed else names
                    by.unlink(missing_ok=True)
                    last = names[-1] if killed else None
                    survey.learn(mutant, names, last)
                    self.plan.keep(mutant, outcome(code), [*sorted(tried), *names], last)
            spent = seconds
        return True


def surveyed(items: Sequence[pytest.Item], file: Path) -> int:
    """Write which test runs which line and function, and in how many CPU seconds."""
    folders = tuple(str(ROOT / module) for module in MODULES)
    seen: set[str] = set()
    named: dict[CodeType, str] = {}

    def called(frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code not in named:
            path = code.co_filename
            named[code] = str(Path(path).relative_to(ROOT)) if path.startswith(folders) else ""
        if not named[code]:
            return None
        seen.add(f"{named[code]}:{code.co_qualname.partition('.<locals>')[0]}")
        if named[code] in KERNELS:
            return None
        return ran

    def ran(frame: FrameType, event: str, argument: object) -> Any:
        seen.add(f"{named[frame.f_code]}:{frame.f_lineno}")
        return ran

    seconds: dict[str, float] = {}
    places: dict[str, list[int]] = defaultdict(list)
    signal.signal(signal.SIGPROF, _end)
    for item, following in zip(items, [*items[1:], None], strict=True):
        seen.clear()
        started = time.process_time()
        try:
            signal.setitimer(signal.ITIMER_PROF, QUICK, QUICK)
            sys.settrace(called)
            reports = runtestprotocol(item, log=False, nextitem=following)
        except TooSlow:
            reports = []
        finally:
            sys.settrace(None)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        took = time.process_time() - started
        if took > QUICK or not reports or any(not report.passed for report in reports):
            print(f"left out: {item.nodeid} {took:.1f}", flush=True)
            continue
        if seen:
            for place in seen:
                places[place].append(len(seconds))
            seconds[item.nodeid] = round(took, 4)
    file.write_text(json.dumps({"seconds": seconds, "places": places}))
    return 0


def outcome(code: int) -> str:
    return {SURVIVED: "survived", KILLED: "killed"}.get(code, "out of time")


def afresh(plan: Plan, file: Path) -> None:
    """Try what is left: mutants of what runs on import, each in a process that imports it."""
    survey = Survey(file)
    for mutant, tried in list(plan.left(plan.seconds[0])):
        tests = survey.chosen(mutant, tried, plan.seconds[-1])
        limit = 2.0 * plan.seconds[-1] + 30.0
        code = apart(lambda m=mutant, t=tests: imported(m, t), plan.work / "mutant.log", limit)
        plan.keep(mutant, outcome(code), tests, None)


def imported(mutant: dict[str, Any], tests: list[str]) -> int:
    """Pytest's exit code where the mutant is imported in the place of its file."""
    file, plain = str(ROOT / mutant["file"]), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        return compile(mutated(mutant), file, "exec") if self.path == file else plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return int(pytest.main([*OPTIONS, "-x", *tests]))


def warm() -> None:
    """Load once what numba has compiled, rather than in each process."""
    import riskcal

    if os.environ["NUMBA_DISABLE_JIT"] == "1":
        return
    runs = riskcal.load_example("g2p")
    for test in riskcal.pvalues.BY_NAME:
        if test != "binomial":
            riskcal.calibrate(runs, delta=0.1, test=test)
    riskcal.calibrate(runs, delta=[0.1, 0.2])
    riskcal.plan(0.1, losses=runs.losses("textual")[:, 9])
    riskcal.run_trials(runs, deltas=[0.1], n_trials=2)


def collected(plan: Plan, survey: Path) -> int:
    """Collect, and try all that can be tried with what is imported then."""
    for module in MODULES:
        for path in (ROOT / module).glob("*.py"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return int(pytest.main([*OPTIONS, *plan.files], plugins=[Trials(plan, survey)]))


def compiled_by_numba() -> set[str]:
    """Files of which numba compiles functions."""
    paths = [path for module in MODULES for path in (ROOT / module).glob("*.py")]
    return {p.relative_to(ROOT).as_posix() for p in paths if "@njit" in p.read_text()}


KERNELS = compiled_by_numba()


def part(plan: Plan, *, interpreted: bool) -> int:
    """Try the mutants of the files that numba compiles, without its compiler, or those of the others."""
    os.environ["NUMBA_DISABLE_JIT"] = "1" if interpreted else "0"
    for name in SLOW.split():
        importlib.import_module(name)
    mine = [one for one in plan.mutants if (one["file"] in KERNELS) == interpreted]
    own = Plan(mine, plan.files, plan.seconds, plan.work, plan.judged)
    own.read()
    survey = plan.work / f"reached_{'interpreted' if interpreted else 'compiled'}.json"
    if list(own.left(plan.seconds[-1])):
        apart(lambda: collected(own, survey), plan.work / "trials.log")
        own.read()
        afresh(own, survey)
    return 0


def name_of(mutant: dict[str, Any]) -> tuple[str, ...]:
    return tuple(mutant[part] for part in ("file", "inside", "text", "is"))


def judged() -> dict[tuple[str, ...], str]:
    """Why survivors may live, by their names."""
    found = json.loads(JUDGED.read_text()) if JUDGED.exists() else []
    return {name_of(one): one["why"] for one in found}


def written(plan: Plan, totals: dict[str, int]) -> dict[str, Any]:
    """Counts by module, and the survivors with the reasons that are known."""
    reasons = judged()
    results = [plan.known[address(one)] for one in plan.mutants if address(one) in plan.known]
    modules = {
        module: {"mutants": total}
        | Counter(one["outcome"] for one in results if one["file"].startswith(module))
        for module, total in totals.items()
    }
    survivors = [
        {part: one[part] for part in ("file", "line", "inside", "text", "is", "outcome")}
        | {"tests": len(one["tests"]), "why": reasons.get(name_of(one), "")}
        for one in results
        if one["outcome"] in ("survived", "not reached")
    ]
    survivors.sort(key=lambda one: (one["file"], one["line"]))
    return {"modules": modules, "survivors": survivors}


def main() -> None:
    """Draw, try, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sample", type=int, default=10_000, help="mutants of each module")
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, choices=MODULES, help="these alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=[2.0, 10.0], help="of tests for each mutant"
    )
    parser.add_argument("--again", action="store_true", help="try the survivors again")
    parser.add_argument("tests", nargs="*", help="default: the core's, tests/test_*.py")
    asked = parser.parse_args()
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    work = asked.json.with_name(f"{asked.json.name}.work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    drawn, totals = [], {}
    for module in asked.modules:
        files = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / module).glob("*.py"))
        every = [mutant for file in files for mutant in mutants_of(file)]
        totals[module] = len(every)
        random.Random(asked.seed).shuffle(every)
        drawn += every[: asked.sample]
    random.Random(asked.seed).shuffle(drawn)
    tests = asked.tests or sorted(map(str, Path("tests").glob("test_*.py")))
    plan = Plan(drawn, tests, sorted(asked.seconds), work, judged())
    if asked.again and (work / "tried.jsonl").exists():
        plan.read()
        (work / "tried.jsonl").rename(work / "tried_before.jsonl")
        for mutant in plan.known.values():
            if mutant["outcome"] == "killed":
                plan.keep(mutant, "killed", mutant["tests"], mutant["by"])
    for interpreted in (False, True):
        apart(lambda i=interpreted: part(plan, interpreted=i), work / f"part_{interpreted}.log")
    plan.read()
    found = {
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip(),
        "asked": " ".join(sys.argv[1:]),
        **written(plan, totals),
    }
    asked.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(found["modules"], indent=1))
    print(sum(not one["why"] for one in found["survivors"]), "survivors without a reason")


if __name__ == "__main__":
    main()
