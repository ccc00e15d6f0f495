"""`Strata`: what an event log says by task, by difficulty and by class of tokens, however finely its events tell it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

from riskcal import _validate
from riskcal.serving.estimates import Interval, mean_interval

#: Number and sum of what was seen of a stratum.
Seen = tuple[int, float]
#: Of a task, by difficulty or by class of tokens.
ByName = dict[str, Seen]


class Stratum(NamedTuple):
    """One line of the estimates.

    Attributes
    ----------
    task : str
        Empty where events name none.
    kind : {"task", "difficulty", "class"}
    name : str
        Of the difficulty or the class; empty for a task as a whole.
    n : int
        Requests: shadowed ones of the task, of the difficulty, or with tokens of the class.
    mean : float
        Their mean loss; of a class, the mean share of its tokens that were not the full model's.
    interval : Interval
        Where the mean is with 95% confidence at all times, each line alone, if it stays the same.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> log.write("riskcal.shadow.evaluated", {
    ...     "gen_ai.response.id": "r1", "riskcal.task": "news", "riskcal.difficulty": "hard", "riskcal.loss": 0.5
    ... })
    >>> watch = riskcal.serving.EventWatch(riskcal.RiskMonitor(delta=0.1)).read("events.jsonl")
    >>> [(line.kind, line.name, line.n, line.mean) for line in watch.estimates()]
    [('task', '', 1, 0.5), ('difficulty', 'hard', 1, 0.5)]
    """

    task: str
    kind: str
    name: str
    n: int
    mean: float
    interval: Interval


@dataclass
class Strata:
    """Sums, by task and below it. They are updated in place, and written to JSON and back without loss.

    Attributes
    ----------
    difficulties : dict of str to dict of str to (n, sum)
        Losses by task and ``riskcal.difficulty``; an event that names none is not here.
    classes : dict of str to dict of str to (n, sum)
        By task and class of tokens: requests that had tokens of the class, and the sum of the shares that differed.
    layers : dict of str to dict of str to Counter
        Tokens by exit layer, by task and class.
    drafts : dict of str to (drafted, rejected)
        Tokens that were drafted for verification, and those of them that it rejected, by task.
    weights, temperatures : Counter
        Requests by ``riskcal.weights`` and ``gen_ai.request.temperature``, of those that name them.

    Examples
    --------
    >>> log = riskcal.serving.EventLog("events.jsonl")
    >>> log.write("riskcal.shadow.evaluated", {
    ...     "gen_ai.response.id": "r1", "riskcal.task": "news", "riskcal.difficulty": "hard", "riskcal.loss": 0.5
    ... })
    >>> watch = riskcal.serving.EventWatch(riskcal.RiskMonitor(delta=0.1)).read("events.jsonl")
    >>> watch.strata.difficulties
    {'news': {'hard': (1, 0.5)}}
    """

    difficulties: dict[str, ByName] = field(default_factory=dict)
    classes: dict[str, ByName] = field(default_factory=dict)
    layers: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    drafts: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: Counter[str] = field(default_factory=Counter)
    temperatures: Counter[str] = field(default_factory=Counter)

    def served(self, task: str, told: Mapping[str, Any]) -> None:
        """Take the attributes of a request that ended."""
        for name, layers in mapping(told, "riskcal.exit.classes").items():
            counts = {layer: n for layer, n in mapping(layers).items() if _validate.is_whole(n)}
            self.layers.setdefault(task, {}).setdefault(name, Counter()).update(counts)
        drafted: Any = told.get("riskcal.draft.tokens")
        rejected: Any = told.get("riskcal.draft.rejected")
        if all(map(_validate.is_whole, (drafted, rejected))) and 0 <= rejected <= drafted:
            before = self.drafts.get(task, (0, 0))
            self.drafts[task] = (before[0] + int(drafted), before[1] + int(rejected))
        weights, temperature = told.get("riskcal.weights"), told.get("gen_ai.request.temperature")
        if isinstance(weights, str):
            self.weights[weights] += 1
        if is_number(temperature):
            self.temperatures[f"{temperature:g}"] += 1

    def evaluated(self, task: str, told: Mapping[str, Any], loss: float) -> None:
        """Take the attributes of a shadow, and the loss that it fed."""
        difficulty = told.get("riskcal.difficulty")
        if isinstance(difficulty, str) and difficulty:
            add(self.difficulties.setdefault(task, {}), difficulty, loss)
        for name, pair in mapping(told, "riskcal.token.classes").items():
            if isinstance(pair, list) and len(pair) == 2 and all(map(_validate.is_whole, pair)):
                differing, tokens = pair
                if 0 <= differing <= tokens and tokens:
                    add(self.classes.setdefault(task, {}), name, differing / tokens)

    def estimates(
        self, losses: Mapping[str, Seen], lower: float, upper: float
    ) -> Iterator[Stratum]:
        """Every stratum with its interval, those of a task after it; ``losses`` are by task."""
        for task in sorted({*losses, *self.difficulties, *self.classes}):
            if task in losses:
                yield _line(task, "task", "", losses[task], lower, upper)
            for name, seen in sorted(self.difficulties.get(task, {}).items()):
                yield _line(task, "difficulty", name, seen, lower, upper)
            for name, seen in sorted(self.classes.get(task, {}).items()):
                yield _line(task, "class", name, seen, 0.0, 1.0)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """What `to_json` gave; what an earlier state does not say is empty."""
        pairs = ("difficulties", "classes")
        found: dict[str, Any] = {
            kind: {
                task: {name: (n, total) for name, (n, total) in by_name.items()}
                for task, by_name in state.get(kind, {}).items()
            }
            for kind in pairs
        }
        found["layers"] = {
            task: {name: Counter(layers) for name, layers in by_name.items()}
            for task, by_name in state.get("layers", {}).items()
        }
        found["drafts"] = {task: (a, b) for task, (a, b) in state.get("drafts", {}).items()}
        for kind in ("weights", "temperatures"):
            found[kind] = Counter(state.get(kind, {}))
        return cls(**found)


def add(sums: ByName, name: str, value: float) -> None:
    """One more of a name."""
    n, total = sums.get(name, (0, 0.0))
    sums[name] = (n + 1, total + value)


def _line(task: str, kind: str, name: str, seen: Seen, lower: float, upper: float) -> Stratum:
    n, total = seen
    interval = mean_interval(n, total, lower=lower, upper=upper)
    return Stratum(task, kind, name, n, total / n, interval)


def mapping(told: Any, name: str | None = None) -> dict[str, Any]:
    """An attribute that should be an object; empty where it is none."""
    found = told.get(name) if name is not None else told
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> bool:
    """Whether JSON held a number that is finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
