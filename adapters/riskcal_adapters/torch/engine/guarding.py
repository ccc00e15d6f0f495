"""Tokens that may not leave early, of many rows at once: where a row stands is a number, and what follows is looked up."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from riskcal.forbidden import Guard, Inside, Rule, State
from riskcal_adapters.torch.exits import leaves
from riskcal_adapters.torch.kernels import Floats, Ints

#: Of a row under no rules, which nothing leads out of.
_FREE = 0
_UNKNOWN = -1
#: Tokens that a table has room for at first.
_COLUMNS = 64
#: Entries of the table, of 4 bytes; then what was said is forgotten, and asked again.
_ENTRIES_AT_MOST = 4_000_000

#: Rules, and where a text stands under them.
_Stand = tuple[tuple[Rule, ...], tuple[State, ...]]


class Guards:
    """The classes of all rows of an engine, each row under those of its own policy.

    A rule is asked once of a token after a text, whatever row it comes in: there are few places where a text can stand, and
    tokens come again. What was said is in a table of places and tokens, which a compiled loop reads.

    Parameters
    ----------
    slots : int
        Rows.
    text : callable
        Of a token.
    """

    def __init__(self, slots: int, text: Callable[[int], str]) -> None:
        self._text = text
        self._guards: dict[tuple[Rule, ...], Guard] = {}
        # where requests begin under rules that do not read the prompt; these are held, so that no others have their place
        self._begun: dict[int, tuple[tuple[Rule, ...], int]] = {}
        self._state = np.full(slots, _FREE)
        self._stands: list[_Stand] = [((), ())]
        self._numbers: dict[_Stand, int] = {}
        self._columns = np.full(_COLUMNS, _UNKNOWN)  # of tokens
        self._seen = 0
        # twice what follows, and 1 where the token is held
        self._table = np.full((1, _COLUMNS), _UNKNOWN, dtype=np.int32)

    def begin(self, row: int, rules: tuple[Rule, ...], prompt: Ints) -> None:
        """A request under these rules, none perhaps, is in this row."""
        if not rules:
            self._state[row] = _FREE
            return
        begun = self._begun.get(id(rules))
        if begun is None:
            guard = self._guards.setdefault(rules, Guard(rules, self._text))
            number = self._number((rules, guard.start(prompt.tolist())))
            begun = rules, number
            if not any(isinstance(rule, Inside) and rule.prompt for rule in rules):
                self._begun[id(rules)] = begun
        self._state[row] = begun[1]

    def leave(self, rows: Ints, tokens: Ints, *, early: bool) -> NDArray[np.bool_] | None:
        """Which of the rows leave with these tokens; None where all do, as they do where it is not ``early``.

        Those that do have emitted them.
        """
        leaving = np.ones(len(rows), dtype=bool)
        done = held = 0
        while done < len(rows):
            done, more = _follow(
                done, rows, tokens, early, self._state, self._columns, self._table, leaving
            )
            held += more
            if done < len(rows):
                self._ask(int(self._state[rows[done]]), int(tokens[done]))
        return leaving if held else None

    def hold(
        self,
        at: tuple[Ints, Ints, Ints],
        needed: NDArray[np.float32],
        index: int,
        confidence: Floats,
        tokens: Ints,
        *,
        early: bool,
    ) -> None:
        """`leave` of those whose confidence suffices at an exit; that of tokens that may not leave becomes NaN.

        Which never leaves, and is not said to be refused. ``at`` is of all rows, their positions, and the places among them of
        those that have a confidence; ``needed`` is of all rows of the engine.
        """
        rows, _, places = at
        done = 0
        while True:
            done = _hold(
                *(done, *at, needed, index, early, confidence, tokens),
                *(self._state, self._columns, self._table),
            )
            if done == len(places):
                return
            self._ask(int(self._state[rows[places[done]]]), int(tokens[done]))

    def __bool__(self) -> bool:
        """Whether there was ever a rule."""
        return bool(self._guards)

    def _ask(self, state: int, token: int) -> None:
        rules, states = self._stands[state]
        guard = self._guards[rules]
        after = self._number((rules, guard.after(states, token)))
        self._make_room(token)
        held = guard.forbids(states, token)
        self._table[state, self._columns[token]] = 2 * after + held

    def _number(self, stand: _Stand) -> int:
        if stand not in self._numbers:
            self._numbers[stand] = len(self._stands)
            self._stands.append(stand)
        return self._numbers[stand]

    def _make_room(self, token: int) -> None:
        """A row for every place, a column for the token."""
        if token >= len(self._columns):
            columns = np.full(2 * token, _UNKNOWN)
            columns[: len(self._columns)] = self._columns
            self._columns = columns
        if self._columns[token] == _UNKNOWN:
            self._columns[token], self._seen = self._seen, self._seen + 1
        rows, width = self._table.shape
        if len(self._stands) <= rows and self._seen <= width:
            return
        held = self._table
        too_many = 4 * len(self._stands) * self._seen > _ENTRIES_AT_MOST
        if too_many and self._seen > 2 * len(self._state):  # those of one call always have room
            self._columns[:], self._columns[token], self._seen = _UNKNOWN, 0, 1
            held, width = held[:0, :0], _COLUMNS
        shape = 2 * len(self._stands), max(width, 2 * self._seen)
        self._table = np.full(shape, _UNKNOWN, dtype=np.int32)
        self._table[: len(held), : held.shape[1]] = held


@njit(cache=True)
def _said(row: Any, token: Any, state: Any, columns: Any, table: Any) -> Any:
    """What the table says of a token in a row; below 0 where it says nothing."""
    if token >= len(columns) or columns[token] < 0 or state[row] >= len(table):
        return _UNKNOWN
    return table[state[row], columns[token]]


@njit(cache=True)
def _follow(
    first: Any,
    rows: Any,
    tokens: Any,
    early: Any,
    state: Any,
    columns: Any,
    table: Any,
    leaving: Any,
) -> tuple[int, int]:
    """From the ``first`` row on move each that leaves, and mark those that may not.

    How far it came, which is to the first token of which the table says nothing, and how many may not.
    """
    held = 0
    for i in range(first, len(rows)):
        if state[rows[i]] == _FREE:
            continue
        said = _said(rows[i], tokens[i], state, columns, table)
        if said < 0:
            return i, held
        if early and said % 2:
            leaving[i] = False
            held += 1
        else:
            state[rows[i]] = said // 2
    return len(rows), held


@njit(cache=True)
def _hold(
    first: Any,
    rows: Any,
    positions: Any,
    places: Any,
    needed: Any,
    index: Any,
    early: Any,
    confidence: Any,
    tokens: Any,
    state: Any,
    columns: Any,
    table: Any,
) -> int:
    """`_follow` of those whose confidence suffices, of which it makes NaN where they may not leave; how far it came."""
    for i in range(first, len(places)):
        row = rows[places[i]]
        if state[row] == _FREE:
            continue
        if not leaves(confidence[i], needed[row, positions[places[i]], index], not early):
            continue
        said = _said(row, tokens[i], state, columns, table)
        if said < 0:
            return i
        if early and said % 2:
            confidence[i] = np.nan
        else:
            state[row] = said // 2
    return len(places)
