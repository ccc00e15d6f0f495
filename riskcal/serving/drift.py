"""`Drift`: whether requests are still what they were when the policy was calibrated, and in what they differ."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.monitor import RiskMonitor
from riskcal.monitor.inputs import run_length
from riskcal.serving.events import rotated
from riskcal.serving.reader import read_events, request_id
from riskcal.serving.strata import is_number, mapping

#: How a feature's values may differ from those of the reference, and what of a rank p is above one half on average then.
_WAYS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "higher": lambda p: 1.0 - p,
    "lower": lambda p: p,
    "more spread": lambda p: np.abs(2.0 * p - 1.0),
    "less spread": lambda p: 1.0 - np.abs(2.0 * p - 1.0),
}


_NUMBERS = {
    "prompt length": "gen_ai.usage.input_tokens",
    "output length": "gen_ai.usage.output_tokens",
    "temperature": "gen_ai.request.temperature",
}
WEIGHTS = "weights"
#: Digits of a layer's number, and tokens, beyond any model: what has more is no count.
_DIGITS, _TOKENS = 6, 2**40


class Drifted(NamedTuple):
    """What is no longer as it was.

    Attributes
    ----------
    feature : str
    way : {"higher", "lower", "more spread", "less spread"}
        Of the feature ``weights`` only that they are others.
    at : int
        Requests with the feature, after the reference, when the alarm was raised.

    Examples
    --------
    >>> drift = riskcal.serving.Drift({"prompt length": range(10, 110)})
    >>> drifted = drift.update({"prompt length": [300.0 + i for i in range(40)]}).drifted[0]
    >>> drifted.feature, drifted.way, drifted.at <= 40
    ('prompt length', 'higher', True)
    """

    feature: str
    way: str
    at: int

    def __str__(self) -> str:
        way = "other" if self.feature == WEIGHTS else self.way
        return f"{self.feature} {way} (at request {self.at:,})"


class Drift:
    r"""Test, request by request, that features of requests are still distributed as in a reference.

    Parameters
    ----------
    reference : mapping of str to sequence of float
        Values of each feature that is to be watched, of requests of the traffic that the policy was calibrated for;
        `Drift.from_log` takes them from an event log. A thousand requests are a good reference, a hundred a poor one.
    epsilon : float
        Probability that any feature ever raises a false alarm.
    average_run_length : float, optional
        Instead of epsilon: the mean number of requests to a false alarm of any feature is at least this.

    Raises
    ------
    RiskcalError
        For a reference without features, or a feature without values.

    Notes
    -----
    *What is guaranteed.* H: the requests of the reference and all since are exchangeable, as independent ones of one
    distribution are. Let p be the rank of a value among the reference and all values since, ties broken at random: under H these
    are independent and uniform (Vovk, Nouretdinov and Gammerman, *Testing exchangeability on-line*, 2003). `RiskMonitor` bets
    that the mean of p, of 1 - p, of s, the distance of 2p from 1, or of 1 - s is above one half: four tests for each of F
    features, each at ``epsilon / (4 F)``. By Ville's inequality and the union bound an alarm is ever false with probability at
    most epsilon. With an average run length A the four tests of a single feature have ``4 A`` each: their mean is a detector that
    reaches A before any of them reaches this. The ranks of one feature need not be independent of the past of another, so that
    detectors of several have no common clock, and each has ``8 F A``: that a feature's mean reaches ``2 F A`` within m requests
    has probability at most ``m / (2 F A)``, an alarm of any at most ``m / (2 A)``, and the mean of such a time, the sum over m of
    the probability that it is later, is at least A.

    Values are rounded to three digits, which needs no look at them; ties are broken by a hash of the reference and their number,
    so that a state that was saved goes on exactly.

    *What is a hint.* An alarm says that traffic changed, and its feature where to look, not that anything is wrong: the
    certificate may well hold there, and the monitor of losses watches whether it does. Traffic that has hours and weekdays is not
    exchangeable: take the reference from as many whole days as it takes to see them. After an alarm, begin anew with another one.

    Examples
    --------
    >>> drift = riskcal.serving.Drift({"prompt length": range(10, 110)})
    >>> drift.update({"prompt length": [50.0, 20.0, 90.0]}).drifted
    ()
    >>> sorted(one.way for one in drift.update({"prompt length": [300.0 + i for i in range(40)]}).drifted)
    ['higher', 'more spread']
    """

    def __init__(
        self,
        reference: Mapping[str, Iterable[float]],
        *,
        epsilon: float = 0.05,
        average_run_length: float | None = None,
    ) -> None:
        if not isinstance(reference, Mapping) or not reference:
            raise RiskcalError(
                f"reference: {_validate.shown(reference)} names no feature; give {{'prompt length': values}}."
            )
        tests = len(_WAYS) * len(reference)
        each = _validate.level(epsilon, "epsilon") / tests
        shared = 1 if len(reference) == 1 else 2  # by a union bound over features, which costs half
        self.epsilon, self.average_run_length = epsilon, run_length(average_run_length)
        length = None if average_run_length is None else average_run_length * tests * shared
        self._past: dict[str, _Past] = {}
        self._monitors: dict[str, dict[str, RiskMonitor]] = {}
        for feature, values in reference.items():
            self._past[feature] = _Past.of(_finite(values, f"reference: {feature}"))
            self._monitors[feature] = {
                way: RiskMonitor(0.5, epsilon=each, average_run_length=length) for way in _WAYS
            }
        # coins of its own for every reference: deployments must not share their luck
        told = json.dumps({feature: past.to_json() for feature, past in self._past.items()})
        self._salt = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    @classmethod
    def from_log(
        cls,
        path: str | os.PathLike[str],
        *,
        epsilon: float = 0.05,
        average_run_length: float | None = None,
    ) -> Self:
        """With the features of all requests of an event log, rotated files too, as reference; of repeated ids the first.

        Raises
        ------
        RiskcalError
            If it cannot be read or tells no feature.
        """
        found: dict[str, list[float]] = {}
        events = chain.from_iterable(read_events(file).events for file in [*rotated(path), path])
        known: set[tuple[str, str]] = set()
        for event in events:
            identity = request_id(event)
            if identity is not None:
                if (event["name"], identity) in known:
                    continue
                known.add((event["name"], identity))
            for feature, value in features(event).items():
                found.setdefault(feature, []).append(value)
        if not found:
            raise RiskcalError(
                f"{path}: tells nothing of requests that could drift; give the log of an engine that served some."
            )
        return cls(found, epsilon=epsilon, average_run_length=average_run_length)

    def update(self, values: Mapping[str, Iterable[float]]) -> Self:
        """Take values of features in the order of their requests; features without a reference are left aside."""
        for feature, some in values.items():
            past = self._past.get(feature)
            if past is None:
                continue
            ranks = np.array(
                [past.rank(f"{self._salt}\0{feature}", one) for one in _finite(some, feature)]
            )
            for way, monitor in self._monitors[feature].items():
                monitor.update(_WAYS[way](ranks))
        return self

    @property
    def drifted(self) -> tuple[Drifted, ...]:
        """What raised an alarm, the first first; it stays so."""
        found = [
            Drifted(feature, way, monitor.alarm_at)
            for feature, monitors in self._monitors.items()
            for way, monitor in monitors.items()
            if monitor.alarm_at is not None
        ]
        return tuple(sorted(found, key=lambda one: one.at))

    @property
    def reference(self) -> str:
        """A digest of the reference, by which others are told from it."""
        return self._salt

    @property
    def seen(self) -> dict[str, int]:
        """Values after the reference, by feature."""
        return {feature: monitors["higher"].n for feature, monitors in self._monitors.items()}

    def to_json(self) -> dict[str, Any]:
        """The whole state, as JSON holds it."""
        return {
            "salt": self._salt,
            "epsilon": self.epsilon,
            "average_run_length": self.average_run_length,
            "features": {
                feature: {
                    "past": past.to_json(),
                    "monitors": {w: m.to_json() for w, m in self._monitors[feature].items()},
                }
                for feature, past in self._past.items()
            },
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Go on, bit for bit, where `to_json` stood."""
        settings = {name: state[name] for name in ("epsilon", "average_run_length")}
        drift = cls(dict.fromkeys(state["features"], (0.0,)), **settings)
        drift._salt = state["salt"]
        for feature, known in state["features"].items():
            drift._past[feature] = _Past.from_json(known["past"])
            drift._monitors[feature] = {
                way: RiskMonitor.from_json(known["monitors"][way]) for way in _WAYS
            }
        return drift

    @property
    def verdict(self) -> str:
        """What can be said; nothing over no requests."""
        drifted = self.drifted
        if drifted:
            return "; ".join(map(str, drifted))
        seen = {feature: n for feature, n in self.seen.items() if n}
        if not seen:
            return "no request with a feature of the reference, so that nothing can be said"
        return f"none of {', '.join(seen)} over {max(seen.values()):,} requests"


def features(event: Mapping[str, Any]) -> dict[str, float]:
    """What an event tells of a request that may drift.

    Of a request that was served: ``prompt length`` and ``output length`` in tokens, ``temperature``, ``weights`` (a number made
    of their fingerprint), ``confidence`` (the mean at exits), ``depth`` (mean exit layer) and, for every class of tokens that
    the engine was told to count, ``share of CLASS``. Of a shadow: ``agreement``, the share of tokens that are the full model's.
    What an output at full depth says of exits is no feature.
    """
    told, name = mapping(event, "attributes"), event.get("name")
    at_full_depth = bool(told.get("riskcal.full_depth"))
    found: dict[str, float] = {}
    if name == "riskcal.shadow.evaluated" and not at_full_depth:
        apart: Any = told.get("riskcal.token.disagreement")
        if is_number(apart):
            found["agreement"] = 1.0 - apart
    if name != "riskcal.request.served":
        return found
    for feature, attribute in _NUMBERS.items():
        if is_number(told.get(attribute)):
            found[feature] = told[attribute]
    if isinstance(told.get("riskcal.weights"), str):
        found[WEIGHTS] = _uniform(told["riskcal.weights"])
    classes = {
        one: _total(mapping(layers))
        for one, layers in mapping(told, "riskcal.exit.classes").items()
    }
    tokens = sum(classes.values())
    found |= {f"share of {one}": n / tokens for one, n in classes.items() if tokens}
    if at_full_depth:
        return found
    if is_number(told.get("riskcal.confidence")):
        found["confidence"] = told["riskcal.confidence"]
    layers = mapping(told, "riskcal.exit.layers")
    tokens = _total(layers)
    if tokens and all(layer.isdecimal() and len(layer) <= _DIGITS for layer in layers):
        found["depth"] = sum(int(layer) * n for layer, n in layers.items()) / tokens
    return found


def _total(counts: Mapping[str, Any]) -> int:
    numbers = list(counts.values())
    return sum(numbers) if all(_validate.is_whole(n) and 0 <= n <= _TOKENS for n in numbers) else 0


def _finite(values: Iterable[float], name: str) -> list[float]:
    found: list[float] = _validate.array(list(values), name, ndim=(1,)).tolist()
    return found


class _Past:
    """How often each value was seen, the reference's and those since: all that ranks need."""

    def __init__(self, values: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        self._values, self._counts = values, counts

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        return cls(*np.unique([_rounded(one) for one in values], return_counts=True))

    @property
    def size(self) -> int:
        return int(self._counts.sum())

    def rank(self, salt: str, value: float) -> float:
        """The share of all seen so far that is larger, the value itself among its ties; it is seen from now on."""
        value = _rounded(value)
        place = int(np.searchsorted(self._values, value))
        known = place < len(self._values) and self._values[place] == value
        if not known:
            self._values = np.insert(self._values, place, value)
            self._counts = np.insert(self._counts, place, 0)
        larger, size = int(self._counts[place + 1 :].sum()), self.size
        self._counts[place] += 1
        return (larger + _uniform(f"{salt}\0{size}") * int(self._counts[place])) / (size + 1)

    def to_json(self) -> list[Any]:
        return [self._values.tolist(), self._counts.tolist()]

    @classmethod
    def from_json(cls, state: list[Any]) -> Self:
        values, counts = state
        return cls(np.array(values, dtype=float), np.array(counts, dtype=int))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _uniform(text: str) -> float:
    """In (0, 1), by a hash."""
    drawn = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(drawn) + 0.5) / 2.0**64
