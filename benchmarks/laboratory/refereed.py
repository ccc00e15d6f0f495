"""What the referee lets methods decide: populations whose truth is known, each with what is particular about it.

A case draws samples as a user would have logged them, and judges what a method makes of one: whether it hands over something
that is worse than promised, and how much of the possible it saves.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

import riskcal
from laboratory import worlds
from riskcal.internal import Floats

DELTA = 0.1

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Sample:
    """Rows as they were logged."""

    losses: Floats  # (n, k), candidates from the safest to the boldest
    prompts: NDArray[Any] | None = (
        None  # (n,), ids of the independent units; None: rows that have none
    )
    costs: Floats | None = None  # (n, k), where they differ between rows
    confidence: Floats | None = None  # (n, K), of the heads of a model
    agrees: Flags | None = None  # (n, K)


class Verdict(NamedTuple):
    """What one decision was worth."""

    wrong: bool  # whether anything that was called good enough is not
    reached: float  # share of the good candidates that what is handed over saves as much as
    saving: float  # share of the most that may be saved
    risk: float  # true loss of what is handed over


@dataclass(frozen=True)
class Candidates:
    """A case in which a decision is which of k candidates are good enough.

    Attributes
    ----------
    traits : frozenset of str
        What a method has to know of it: ``binary`` (losses of 0 or 1), ``nested`` (no prompt's loss falls along the
        candidates), ``monotone`` (nor does the true curve), ``clusters``, ``sorted``, ``several`` (coordinates),
        ``signed``, ``fine`` (many candidates), ``slow`` (a quarter of the draws).
    """

    name: str
    about: str
    n: int
    delta: float
    candidates: Floats  # (k,) thresholds, descending, or (k, c) of c coordinates
    risk: Floats  # (k,)
    saving: Floats  # (k,)
    draw: Callable[[np.random.Generator], Sample]
    traits: frozenset[str] = field(default_factory=frozenset)

    def sample(self, rng: np.random.Generator) -> Sample:
        """Draw rows."""
        return self.draw(rng)

    def judge(self, decision: Flags) -> Verdict:
        """A false certificate earns nothing extra: savings count at most as much as the best that keeps delta."""
        good = self.risk <= self.delta
        saved, risk = 0.0, 0.0
        if decision.any():
            chosen = int(np.where(decision, self.saving, -np.inf).argmax())
            saved, risk = float(self.saving[chosen]), float(self.risk[chosen])
        worthwhile = self.saving[good & (self.saving > 0)]
        if not worthwhile.size:
            return Verdict(bool((decision & ~good).any()), np.nan, np.nan, risk)
        best = float(worthwhile.max())
        return Verdict(
            bool((decision & ~good).any()),
            float((saved >= worthwhile - 1e-12).mean()),
            min(saved, best) / best,
            risk,
        )


@dataclass(frozen=True)
class Heads:
    """A case in which a decision is one threshold per exit head; the population is tokens, each a prompt of its own."""

    name: str
    about: str
    n: int
    delta: float
    confidence: Floats  # (N, K)
    right: Floats  # (N, K), probability that the head agrees with the full model
    best: float  # the largest saving of layers at which every head keeps its agreement
    traits: frozenset[str] = frozenset({"heads"})

    def sample(self, rng: np.random.Generator) -> Sample:
        """Draw tokens."""
        token = rng.integers(len(self.confidence), size=self.n)
        right = rng.random((self.n, self.right.shape[1])) < self.right[token]
        ids = identifiers(self.n)
        return Sample(np.empty((self.n, 0)), ids, None, self.confidence[token], right)

    def judge(self, decision: Floats) -> Verdict:
        """In the cascade: a token leaves at the first head whose threshold it reaches; every head has to keep the promise."""
        reached = self.confidence >= decision
        first = reached & (np.cumsum(reached, axis=1) == 1)
        share, wrong = first.mean(0), (first * (1 - self.right)).mean(0)
        saved = float(share @ np.arange(len(share), 0, -1)) / (len(share) + 1)
        return Verdict(
            bool((wrong > self.delta * share + 1e-12).any()),
            float(np.isfinite(decision).mean()),
            min(saved, self.best) / self.best,
            float(wrong.sum() / max(share.sum(), 1e-300)),
        )


Case = Candidates | Heads


def identifiers(n: int) -> NDArray[Any]:
    """Ids of n prompts, given to them before they were run."""
    return np.array([f"prompt {i}" for i in range(n)])


def cases() -> Iterator[Case]:
    """All cases, in the order of the table."""
    coins = _coins(20)
    yield _of_world(
        "coins, few",
        "losses of 0 or 1, 20 thresholds, one just above delta",
        coins,
        50,
        "binary nested monotone",
    )
    yield _of_world("coins, many", "the same", coins, 2000, "binary nested monotone")
    fine = _coins(1040)
    yield _of_world(
        "fine grid",
        "losses of 0 or 1, 1,040 thresholds, of which a model that stops thinking is asked for one",
        fine,
        50,
        "binary nested monotone fine",
    )
    yield _of_world(
        "small variance",
        "losses within .01 of their mean, one threshold just above delta",
        worlds.tiny_variance(),
        500,
        "nested monotone",
    )
    yield _of_world(
        "mostly 0", "text distances: 0, or Beta(2, 3)", worlds.steady(20), 500, "nested monotone"
    )
    yield _of_world(
        "rises and falls",
        "the curve touches delta, falls, and rises past it",
        worlds.non_monotone(),
        500,
        "",
    )
    yield clustered()
    yield _of_world(
        "sorted rows",
        "coins without ids, the easy prompts first",
        coins,
        200,
        "binary nested monotone sorted",
    )
    yield heads()
    yield related_heads()
    yield cascade()
    yield _of_world(
        "nothing to find",
        "six candidates, all just above delta, dependent in six ways",
        worlds.dependent(),
        200,
        "binary",
    )
    yield _of_records("textual", 0.05, 500)
    yield _of_records("risk", 0.02, 1000)


def _coins(k: int) -> worlds.World:
    """Losses of 0 or 1, k thresholds, the first bad one just above delta."""
    good = round(0.45 * k)
    risk = np.r_[
        np.linspace(0.01, 0.09, good),
        DELTA * (1 + 1e-9),
        np.linspace(0.11, 0.2, k - good - 1),
    ]
    return worlds.World(
        name=f"0 or 1, {k} thresholds",
        thresholds=np.linspace(1 - 0.5 / k, 0.5 / k, k),
        risk=risk,
        saving=np.linspace(0.05, 0.95, k),
        delta=DELTA,
        losses_at=lambda u: (u < risk).astype(np.float64),
    )


def _of_world(name: str, about: str, world: worlds.World, n: int, traits: str) -> Candidates:
    """A laboratory's world; ``sorted`` says that rows come without ids, by their number of losses."""

    def draw(rng: np.random.Generator) -> Sample:
        losses = world.sample(n, rng)
        if "sorted" in traits:
            return Sample(losses[np.argsort(losses.sum(1), kind="stable")])
        return Sample(losses, identifiers(n))

    return Candidates(
        name,
        about,
        n,
        world.delta,
        world.thresholds,
        world.risk,
        world.saving,
        draw,
        frozenset(traits.split()),
    )


def _of_records(objective: str, delta: float, n: int) -> Candidates:
    """The shipped records, words drawn with replacement; the truth is the mean over all 3,000."""
    world = worlds.recorded(riskcal.load_example("g2p"), delta=delta, objective=objective)
    what = {
        "textual": "distance to the full model",
        "risk": "rise in phoneme error, which may be negative",
    }
    name = {"textual": "records", "risk": "records, signed"}[objective]
    traits = "signed" if objective == "risk" else "monotone"
    about = f"the shipped words, resampled: {what[objective]}"
    return _of_world(name, about, world, n, traits)


def clustered(clusters: int = 60, questions: int = 10, k: int = 20) -> Candidates:
    """Questions on one paragraph share its difficulty: the logit of an error has a normal effect of it, of deviation 1.5."""
    world = _coins(k)
    effects = 1.5 * special.ndtri((np.arange(2000) + 0.5) / 2000)
    logit = np.array(
        [
            optimize.brentq(lambda b, r=r: special.expit(b + effects).mean() - r, -30, 10)
            for r in world.risk
        ]
    )
    ids = np.repeat(np.array([f"paragraph {i}" for i in range(clusters)]), questions)

    def draw(rng: np.random.Generator) -> Sample:
        effect = np.repeat(rng.choice(effects, clusters), questions)[:, None]
        losses = rng.random((clusters * questions, 1)) < special.expit(logit + effect)
        return Sample(losses.astype(np.float64), ids)

    return Candidates(
        "clusters",
        f"{clusters} paragraphs with {questions} questions each, which share their difficulty",
        clusters * questions,
        world.delta,
        world.thresholds,
        world.risk,
        world.saving,
        draw,
        frozenset({"binary", "nested", "monotone", "clusters"}),
    )


def cascade(n: int = 1000, size: int = 20_000) -> Candidates:
    """Three models at prices of 1, 4 and 20: 8 x 8 pairs of thresholds on the confidence of the two small ones.

    The population is ``size`` requests. A request is answered by the first model that is confident enough; its loss is 1 where
    that answer is not the large model's. It pays for every model that it asked, and savings are against the large one alone.
    """
    rng = np.random.default_rng(11)
    difficulty = rng.normal(size=size)
    logit = np.stack([1.5 - 1.6 * difficulty, 3.2 - 1.6 * difficulty], axis=1)
    wrong = rng.random((size, 2)) >= special.expit(logit)
    confidence = special.expit(logit + 0.8 * rng.normal(size=(size, 2)))
    grid = np.array([0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6])
    pairs = np.array([(first, second) for first in grid for second in grid])
    at_first = confidence[:, :1] >= pairs[:, 0]
    at_second = ~at_first & (confidence[:, 1:] >= pairs[:, 1])
    losses = np.where(at_first, wrong[:, :1], np.where(at_second, wrong[:, 1:], False)).astype(
        float
    )
    price = np.where(at_first, 1.0, np.where(at_second, 5.0, 25.0))

    def draw(rng: np.random.Generator) -> Sample:
        row = rng.integers(size, size=n)
        return Sample(losses[row], identifiers(n), price[row])

    return Candidates(
        "cascade",
        "three models at prices 1, 4 and 20, 8 x 8 pairs of thresholds",
        n,
        DELTA,
        pairs,
        losses.mean(0),
        1 - price.mean(0) / 20,
        draw,
        frozenset({"binary", "several", "slow"}),
    )


def heads(n: int = 2000, n_heads: int = 4, size: int = 40_000) -> Heads:
    """Four heads that know nothing of each other, whose errors rise with the cube of their doubt; one token per prompt."""
    confidence = np.random.default_rng(1).random((size, n_heads))
    right = 0.98 - np.linspace(0.8, 0.5, n_heads) * (1 - confidence) ** 3
    about = f"{n_heads} heads that know nothing of each other; an agreement of .95 at each, in the cascade"
    return Heads("heads", about, n, 0.05, confidence, right, boldest_heads(confidence, right, 0.05))


def related_heads(n: int = 2000, n_heads: int = 4, size: int = 40_000) -> Heads:
    """A token is as hard for one head as for the next; deeper heads master more, and all judge themselves with noise."""
    rng = np.random.default_rng(2)
    mastery = np.linspace(-0.2, 1.2, n_heads) - rng.normal(size=(size, 1))
    confidence = special.expit(2 * (mastery + 0.5 * rng.normal(size=mastery.shape)))
    right = 1 - 0.9 * special.expit(-2 * mastery - 1)
    about = f"{n_heads} heads that find the same tokens hard; an agreement of .9 at each, in the cascade"
    best = boldest_heads(confidence, right, 0.1)
    return Heads("related heads", about, n, 0.1, confidence, right, best)


def boldest_heads(confidence: Floats, right: Floats, delta: float) -> float:
    """The most that is saved where every head keeps its promise: for each choice of heads, each as bold as it may be in turn."""
    size, n_heads = confidence.shape
    most = 0.0
    for used in itertools.product([False, True], repeat=n_heads):
        waiting, share = np.ones(size, dtype=bool), np.zeros(n_heads)
        for j in np.flatnonzero(used):
            order = np.flatnonzero(waiting)[np.argsort(-confidence[waiting, j])]
            fine = np.cumsum(1 - right[order, j]) <= delta * np.arange(1, len(order) + 1)
            taken = order[: int(np.flatnonzero(fine)[-1]) + 1] if fine.any() else order[:0]
            waiting[taken], share[j] = False, len(taken) / size
        most = max(most, float(share @ np.arange(n_heads, 0, -1)) / (n_heads + 1))
    return most
