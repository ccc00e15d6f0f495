"""Classes of tokens that may not leave early, as tables that a compiled program reads.

A class of `riskcal.forbidden` is a finite machine: few states, and of a state and a token it says whether the token is held and
which state comes next. So nothing asks the host while a program runs, and what it does is what `riskcal.forbidden.Guard` says,
token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from numpy.typing import NDArray

from riskcal.forbidden import Guard, Rule, State


class Guards(NamedTuple):
    """What is asked of B rows of up to K classes each, by R different classes of up to S states."""

    forbidden: Any  #: (R, S, V) bool: whether a token is held; the first class holds none
    after: Any  #: (R, S, V) int32: the state that comes next
    classes: Any  #: (B, K) int32, of each row
    start: Any  #: (B, K) int32, states before the first generated token

    def holds(self, states: Array, tokens: Array) -> Array:
        """(B, K) and (B,): which rows' tokens may not leave early, (B,)."""
        held: Array = self.forbidden[self.classes, states, tokens[:, None]].any(-1)
        return held

    def next(self, states: Array, tokens: Array) -> Array:
        """(B, K), after the rows emitted their tokens (B,)."""
        found: Array = self.after[self.classes, states, tokens[:, None]]
        return found


@dataclass(frozen=True, eq=False)
class Machine:
    """A class of tokens over a vocabulary."""

    states: dict[State, int]
    forbidden: NDArray[np.bool_]
    after: NDArray[np.int32]


def machine(rule: Rule, texts: Sequence[str]) -> Machine:
    """All that a class says of these tokens, from the states that they can lead to."""
    states, found = {rule.start(): 0}, [rule.start()]
    forbidden, after = [], []
    for state in found:  # grows meanwhile
        follows = {text: rule.after(state, text) for text in dict.fromkeys(texts)}
        for one in follows.values():
            if one not in states:
                states[one] = len(found)
                found.append(one)
        forbidden.append([rule.forbids(state, token, text) for token, text in enumerate(texts)])
        after.append([states[follows[text]] for text in texts])
    return Machine(states, np.array(forbidden), np.array(after, dtype=np.int32))


class Machines:
    """Those of one decoder's vocabulary, each made once."""

    def __init__(self, text: Callable[[int], str], vocabulary: int) -> None:
        self._text, self._vocabulary = text, vocabulary
        self._texts: list[str] = []
        self._made: dict[Rule, Machine] = {}

    def guard(self, rules: tuple[Rule, ...]) -> Guard:
        """The same on the host."""
        return Guard(rules, self._text)

    def guards(
        self, rules: Sequence[tuple[Rule, ...]], prompts: Sequence[list[int]], rows: int
    ) -> Guards:
        """Tables for a batch of ``rows``, of which these are real: their classes and their prompts' tokens."""
        known = list(dict.fromkeys(rule for own in rules for rule in own))
        made = [self._machine(rule) for rule in known]
        size = max(len(one.states) for one in made)
        shape = (len(made) + 1, size, self._vocabulary)
        forbidden, after = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int32)
        for place, one in enumerate(made, start=1):
            forbidden[place, : len(one.states)] = one.forbidden
            after[place, : len(one.states)] = one.after
        most = max(map(len, rules))
        classes = np.zeros((rows, most), dtype=np.int32)
        start = np.zeros((rows, most), dtype=np.int32)
        for row, (own, prompt) in enumerate(zip(rules, prompts, strict=True)):
            classes[row, : len(own)] = [known.index(rule) + 1 for rule in own]
            states = self.guard(own).start(prompt)
            start[row, : len(own)] = [
                self._machine(rule).states[state] for rule, state in zip(own, states, strict=True)
            ]
        return Guards(forbidden, after, classes, start)

    def _machine(self, rule: Rule) -> Machine:
        if not self._texts:
            self._texts = [self._text(token) for token in range(self._vocabulary)]
        if rule not in self._made:
            self._made[rule] = machine(rule, self._texts)
        return self._made[rule]


def hold(
    guard: Guard,
    prompts: Sequence[list[int]],
    said: NDArray[Any],
    going: NDArray[np.bool_],
    confidence: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Confidences (B, T, L) of a trace, NaN where what an early layer said may not leave there."""
    held = confidence.copy()
    for row, prompt in enumerate(prompts):
        states = guard.start(prompt)
        for position in np.flatnonzero(going[row]):
            early = said[row, position, :-1].tolist()
            free = [not guard.forbids(states, token) for token in early]
            held[row, position, :-1] = np.where(free, held[row, position, :-1], np.nan)
            states = guard.after(states, int(said[row, position, -1]))
    return held
