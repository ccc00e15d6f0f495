"""Many generations at once, each at its own layer and position: depth-wise continuous batching.

A layer runs for all rows that wait for it. Rows whose confidence suffices emit their token and wait for the first layer again,
the others for the next; rows that ended make room. So a layer call serves rows of many depths and positions, and no row pays
for the depth of another. Every row's tokens and exits are those of `Loop.step` for the row alone.

All bookkeeping is in numpy, over rows; confidences and tokens are read once a call.
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from riskcal.efficiency.kernels import nothing_ran
from riskcal.policy import ExitPolicy
from riskcal_adapters.torch import exits, heads, kernels, sampling
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.confidence import Judge
from riskcal_adapters.torch.engine import bookkeeping
from riskcal_adapters.torch.engine.guarding import Guards
from riskcal_adapters.torch.loop import Loop
from riskcal_adapters.torch.scores import Scores


@dataclass(frozen=True, eq=False)
class Newcomer:
    """A prompt that is to be generated from.

    Attributes
    ----------
    prompt : (S,) int64
        Token ids.
    policy : ExitPolicy
        Named, of the measures that `Slots` can take.
    needed : (T, L) float32, or (T, L + 1): a row's of `Decoder.needed`
        The confidence needed to exit; T is the length limit.
    key : int
        Of its noise.
    """

    prompt: Ints
    policy: ExitPolicy
    needed: NDArray[np.float32]
    key: int


class Ended(NamedTuple):
    """A generation that ended, of one row."""

    row: int
    tokens: Ints
    exit_layers: Ints
    confidence: NDArray[np.float32]
    refused: NDArray[np.float32]
    first_token: float  # when it was there, by time.monotonic


class Slots:
    """Rows in flight.

    Parameters
    ----------
    loop : Loop
        For its backbone, classifier and special tokens.
    slots : int
        Rows at most.
    prompt, length : int
        Tokens of a prompt and of an output, at most.
    least : int
        In the turn of the deeper layers one that fewer rows wait for is passed over.
    max_wait : float
        Seconds after which a row goes before all others.
    """

    def __init__(
        self, loop: Loop, slots: int, prompt: int, length: int, least: int, max_wait: float
    ) -> None:
        self._loop, self._backbone = loop, loop.backbone
        self.size, self.prompt, self.length = slots, prompt, length
        self._least, self._max_wait = least, max_wait
        self._ran = nothing_ran()
        self._cache = self._backbone.pool(slots, prompt, length)
        self.active = np.zeros(slots, dtype=bool)
        self._layer = np.zeros(slots, dtype=np.int64)  # that runs next
        self._position = np.zeros(slots, dtype=np.int64)
        self._since = np.zeros(slots)
        self._first_token = np.zeros(slots)
        self._limit = np.zeros(slots, dtype=np.int64)
        self._needed = np.full((slots, length, self._backbone.n_exits), math.inf, dtype=np.float32)
        self._tokens = np.zeros((slots, length), dtype=np.int64)
        self._exits = np.zeros((slots, length), dtype=np.int64)
        self._confidence = np.zeros((slots, length), dtype=np.float32)
        self._refused = np.zeros((slots, length), dtype=np.float32)
        self._policies: list[ExitPolicy | None] = [None] * slots
        self._judges: dict[str, tuple[Judge, heads.Head]] = {}
        self._measure = np.zeros(slots, dtype=np.int64)
        self._measures: list[str] = []
        self._ends = np.array(loop.special.ends, dtype=np.int64)
        self._keys, self._draws = [0] * slots, False  # whether any policy ever drew
        self._guards = Guards(slots, loop.text)
        # states that enter the layer each row waits for
        self._state = self._cache.states.new_zeros(slots, self._backbone.width)
        self.calls = self.rows_computed = 0

    @property
    def free(self) -> Ints:
        """Rows that are not in use."""
        return np.flatnonzero(~self.active)

    @property
    def memory_bytes(self) -> int:
        """Of keys, values and states, allocated once."""
        held, memories = [self._cache.states, self._state], 0
        for own in self._cache.layers.values():
            held.append(own.rows)
            memories += own.memory.bytes if own.memory else 0
        own_bytes = sum(part.numel() * part.element_size() for part in held)
        return own_bytes + memories + self._needed.nbytes

    def admit(self, newcomers: list[Newcomer]) -> Ints:
        """Read their prompts, all in one; gives each its row. There must be as many `free` ones."""
        rows = self.free[: len(newcomers)]
        first = self._backbone.admit(self._cache, rows, [one.prompt for one in newcomers])
        self._position[rows] = self._layer[rows] = 0
        self._since[rows] = time.monotonic()
        for row, one in zip(rows.tolist(), newcomers, strict=True):
            limit = len(one.needed)
            self._limit[row] = limit
            self._needed[row, :limit] = one.needed
            self._refused[row] = -math.inf
            self._policies[row], self._keys[row] = one.policy, one.key
            self._measure[row] = self._measure_of(one.policy)
            self._draws |= one.policy.sampling is not None
            self._guards.begin(row, one.policy.forbidden, one.prompt)
        self.active[rows] = True
        self._embed(rows, np.array(first))
        return rows

    def drop(self, row: int) -> None:
        """Forget a row that did not end."""
        self.active[row] = False

    def full_depth(self, rows: Ints) -> None:
        """No early exit of these rows from their next token on."""
        for row in rows.tolist():
            begun = self._position[row] + (self._layer[row] > 0)
            self._needed[row, begun:, :-1] = math.inf

    def advance(self) -> list[Ended]:
        """Run one layer for the rows that wait for it, and give those that ended."""
        index, rows, positions = bookkeeping.next_rows(
            self.active,
            self._layer,
            self._position,
            self._since,
            time.monotonic() - self._max_wait,
            self._least,
            self._ran,
            self._loop.n_layers,
        )
        self.calls += 1
        self.rows_computed += len(rows)
        if (
            len(self._measures) == 1
            and self._measures[0] in kernels.OF_LOGITS
            and self._backbone.compiled
            and not self._draws
        ):
            return self._advance_compiled(index, rows, positions)
        before = self._backbone.of(self._state, rows)
        state = self._backbone.layer_of_rows(index, before, rows, positions, self._cache)
        leaving, tokens = rows[:0], rows[:0]
        staying = np.arange(len(rows))
        # after the last layer come its own head, if it has one, and the final head for whoever is left
        last = index + 1 == self._loop.n_layers
        for exit_ in range(index, self._backbone.n_exits if last else index + 1):
            asked = exits.asking(rows, positions, staying, self._needed, exit_)
            if not len(asked):
                continue
            left, said = self._judged(
                exit_, asked, rows, positions, state, before if index else None
            )
            if len(leaving):
                left, said = np.concatenate([leaving, left]), np.concatenate([tokens, said])
            leaving, tokens = left, said
            staying = exits.others(len(rows), leaving)
        if len(staying):
            going = rows[staying]
            self._backbone.put(state, staying, self._state, going)
            self._layer[going] = index + 1
            self._since[going] = time.monotonic()
        return self._left(rows[leaving], leaving, tokens, state) if len(leaving) else []

    def _advance_compiled(self, index: int, rows: Ints, positions: Ints) -> list[Ended]:
        """`advance` in compiled loops, where all tokens are the most probable ones, and confidence is of logits."""
        asked = exits.asking(rows, positions, np.arange(len(rows)), self._needed, index)
        measure = kernels.OF_LOGITS.index(self._measures[0])
        state, confidence, best = self._backbone.layer_and_surest(
            measure, index, self._state, (rows, positions, asked), self._cache
        )
        if self._guards:
            early = index + 1 < self._loop.n_layers
            at = rows, positions, asked
            self._guards.hold(at, self._needed, index, confidence, best, early=early)
        ended = bookkeeping.leave(
            rows,
            positions,
            asked,
            state,
            confidence,
            best,
            index,
            index + 1 == self._loop.n_layers,
            self._needed,
            self._confidence,
            self._refused,
            self._cache.states.numpy(),
            self._state.numpy(),
            self._backbone.embedding.numpy(),
            self._emitting(),
        )
        return [self._ended(row) for row in ended.tolist()]

    def _emitting(self) -> bookkeeping.Emitting:
        return bookkeeping.Emitting(
            *(self._ends, time.monotonic(), self._tokens, self._exits, self._layer, self._position),
            *(self._limit, self._since, self._first_token, self.active),
        )

    def _judged(
        self,
        index: int,
        asked: Ints,
        rows: Ints,
        positions: Ints,
        state: Tensor,
        before: Tensor | None,
    ) -> tuple[Ints, Ints]:
        """Which of the ``asked`` leave at exit ``index``, from 0, by their places among ``rows``, and their tokens."""
        leaving, tokens = [], []
        several = len(self._measures) > 1
        measures = self._measure[rows[asked]] if several else asked[:1]
        for number in np.unique(measures) if several else [0]:
            places = asked[measures == number] if several else asked
            judge, head = self._judges[self._measures[number]]
            judge.begin()
            own = state if len(places) == len(rows) else self._backbone.of(state, places)
            behind = before
            if before is not None and own is not state:
                behind = self._backbone.of(before, places)
            confidence, scores = judge.look(index + 1, own, behind)
            final = index + 1 == self._backbone.n_exits
            out = exits.decide(
                rows, positions, places, self._needed, index, confidence, self._refused, final
            )
            if not len(out):
                continue
            left = places[out]
            at, when = rows[left], positions[left]
            chosen = self._chosen(scores or head.scores(index + 1, own, None), out, at, when)
            if self._guards:
                free = self._guards.leave(at, chosen, early=not final)
                if free is not None:
                    out, left, at, when, chosen = (
                        part[free] for part in (out, left, at, when, chosen)
                    )
            self._confidence[at, when] = confidence[out]
            tokens.append(chosen)
            leaving.append(left)
        if len(leaving) == 1:
            return leaving[0], tokens[0]
        return (np.concatenate(leaving), np.concatenate(tokens)) if leaving else (asked[:0],) * 2

    def _chosen(self, scores: Scores, places: Ints, rows: Ints, positions: Ints) -> Ints:
        best = scores.tokens()[places]
        if not self._draws:
            return best
        for i, row in enumerate(rows.tolist()):
            policy = self._policies[row]
            drawing = None if policy is None else policy.sampling
            if drawing is not None:
                place, key, at = [int(places[i])], [self._keys[row]], int(positions[i])
                [best[i]] = sampling.draw(
                    scores, place, key, at, drawing, self._backbone.vocabulary
                )
        return best

    def _left(self, rows: Ints, places: Ints, tokens: Ints, state: Tensor) -> list[Ended]:
        """Rows that leave a layer emit their tokens, and go on to the next position unless they end."""
        held = self._position[rows] * self.size + rows
        self._backbone.put(state, places, self._cache.states.flatten(0, 1), held)
        ended, going, entering = bookkeeping.emit(rows, tokens, self._emitting())
        if len(going):
            self._embed(going, entering)
        return [self._ended(row) for row in ended.tolist()]

    def _ended(self, row: int) -> Ended:
        size = self._position[row]
        return Ended(
            row,
            self._tokens[row, :size].copy(),
            self._exits[row, :size].copy(),
            self._confidence[row, :size].copy(),
            self._refused[row, :size].copy(),
            float(self._first_token[row]),
        )

    def _embed(self, rows: Ints, tokens: Ints) -> None:
        self._backbone.embed_into(self._state, tokens, rows, self._position[rows], self._cache)

    def _measure_of(self, policy: ExitPolicy) -> int:
        """The number of a policy's measure: rows of one are judged together."""
        measure = policy.measure
        assert measure is not None
        if measure not in self._measures:
            head = heads.of(policy, self._backbone)
            self._judges[measure] = Judge(head, policy, self._loop.classifier), head
            self._measures.append(measure)
        return self._measures.index(measure)
