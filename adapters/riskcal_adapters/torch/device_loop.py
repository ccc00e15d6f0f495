"""The decoding loop of an accelerator: which rows exit, and with which tokens, is decided where the states are.

`loop.Loop` asks after each layer which rows go on, and the host waits for the answer while the device has nothing to do. Here
layers are queued one after the other for all rows, and masks on the device say whom they concern. What the host must know (has
every row left? which have ended?) is copied to it while later layers are queued already, and looked at `LAG` layers later. A
layer that ran for nobody changes nothing: rows that exited keep their state, and what the layer made of it are the keys and
values that a skipped layer is owed anyway. How many layers run depends on the exits alone, never on who is quicker, so that
the same prompts give the same numbers.

Tokens, exits and confidences are those of `loop.Loop`, up to how products of other sizes round.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from riskcal.policy import ExitPolicy
from riskcal_adapters.torch.caches import Ints
from riskcal_adapters.torch.confidence import CONTRASTIVE
from riskcal_adapters.torch.generation import Step
from riskcal_adapters.torch.loop import Loop
from riskcal_adapters.torch.measures import OF_STATES
from riskcal_adapters.torch.run import Run

#: Layers queued beyond the one whose outcome is looked at, so that the device has work meanwhile. One is enough, if a layer
#: takes longer than a word to the host; each more is a layer in vain where all rows have left.
LAG = 1


def apart(device: torch.device) -> bool:
    """Whether asking a device means waiting for it, where copies that are under way can be waited for one by one."""
    return device.type == "cuda"


def takes(policy: ExitPolicy, needed: NDArray[np.float32]) -> bool:
    """Whether `generate` serves a policy whose rows need so much confidence (T, E, B); all others are `loop.Loop`'s.

    Not those that ask the host before a token is known: noise to draw with, texts of forbidden classes, heads whose size
    follows confidence, rows that are to be left out of a product (``"regroup"``), caches that depend on the exit layer. Nor
    a single row that may leave early: its tokens take a layer or two, to which a layer in vain would add half or all. (Reckoned
    from what a layer takes on a GPU; `benchmarks/accelerator.py` times both.)
    """
    pruning, exits = policy.pruning, np.isfinite(needed[:, :-1]).any()
    in_common = policy.pruning is None and policy.measure not in CONTRASTIVE
    return (
        (needed.shape[2] > 1 or not exits)
        and policy.sampling is None
        and not policy.forbidden
        and (pruning is None or pruning.form in ("fixed", "decaying"))
        and policy.batching != "regroup"
        and policy.cache in ("project", "deferred", "recompute")
        and (policy.max_pending is None or in_common)
    )


def generate(
    loop: Loop,
    policy: ExitPolicy,
    tokens: Tensor,
    mask: NDArray[np.bool_],
    needed: NDArray[np.float32],
) -> list[Step]:
    """As `loop.Loop.generate`, for what it `takes`."""
    run = loop.run(policy, tokens, mask, len(needed))
    return _Generation(loop, run, needed).steps()


class Notes:
    """What the device says to the host, read when it has long been said.

    Parameters
    ----------
    device : torch.device
    kinds : sequence of int
        Entries of each note, at most; later notes of a kind replace earlier ones.
    """

    def __init__(self, device: torch.device, kinds: list[int]) -> None:
        self._device, pinned = device, device.type == "cuda"
        self._held = [torch.zeros(size, dtype=torch.bool, pin_memory=pinned) for size in kinds]
        self._read = [held.numpy() for held in self._held]
        self._sent = [torch.cuda.Event() for _ in kinds] if pinned else []

    def send(self, kind: int, note: Tensor) -> None:
        """Copy a note (n,) to the host, as soon as the device gets to it."""
        self._held[kind][: len(note)].copy_(note, non_blocking=True)
        if self._sent:
            self._sent[kind].record(torch.cuda.current_stream(self._device))

    def look(self, kind: int, size: int = 1) -> NDArray[np.bool_]:
        """The latest note of its kind."""
        if self._sent:
            self._sent[kind].synchronize()
        return self._read[kind][:size]


class _Said:
    """What rows say at one position, each (B,); nothing yet."""

    def __init__(self, batch: int, pad: int, device: torch.device) -> None:
        self.tokens = torch.full((batch,), pad, device=device)
        self.exits = torch.zeros(batch, dtype=torch.long, device=device)
        self._confidence = torch.full((batch,), math.nan, device=device)
        self._refused = torch.full((batch,), -math.inf, device=device)

    def leave(self, rows: Tensor, layer: int, sure: Tensor, best: Tensor | None) -> None:
        """Where ``rows`` is true; their tokens may follow later."""
        self.exits = self.exits.masked_fill(rows, layer)
        self._confidence = torch.where(rows, sure, self._confidence)
        if best is not None:
            self.tokens = torch.where(rows, best, self.tokens)

    def stay(self, rows: Tensor, sure: Tensor) -> None:
        """Where ``rows`` is true; a NaN was not refused."""
        self._refused = torch.fmax(self._refused, sure.masked_fill(~rows, -math.inf))

    def together(self) -> Tensor:
        """(4, B): tokens, exits, confidences and what was refused."""
        parts = (self.tokens, self.exits, self._confidence, self._refused)
        return torch.stack([part.double() for part in parts])


class _Generation:
    """Rows that are generated together."""

    def __init__(self, loop: Loop, run: Run, needed: NDArray[np.float32]) -> None:
        backbone, (length, exits, batch) = loop.backbone, needed.shape
        self._loop, self._run, self._backbone = loop, run, backbone
        self._length, self._final, self._batch = length, exits - 1, batch
        #: (T, E) whether anybody may leave at an exit; at the last one all do.
        self._looks = np.asarray((needed < math.inf).any(2))
        self._looks[:, -1] = True
        self._needed = backbone.tensor(needed)
        self._ends = backbone.tensor(np.array(loop.special.ends, dtype=np.int64))
        self._rows: Ints = np.arange(batch)  # those of the batch that are left
        self._previous = backbone.tensor(np.array(run.cache.first))
        self._going = torch.ones(batch, dtype=torch.bool, device=backbone.device)
        self._pending = torch.zeros(batch, dtype=torch.long, device=backbone.device)
        self._notes = Notes(backbone.device, [1] * exits + [batch])
        # one head for all exits can wait until everybody has left, where no measure looks through it
        policy = run.policy
        self._speaks_last = (
            policy.measure in OF_STATES and not backbone.exit_heads and policy.emits == "exit"
        )

    def steps(self) -> list[Step]:
        """Position by position; one read at the end."""
        said: list[Tensor] = []
        rows: list[Ints] = []
        for position in range(self._length):
            left = self._rows
            step = self._position(position)
            if step is None:
                break
            said.append(step)
            rows.append(left)
        read = torch.cat(said, 1).cpu().numpy()
        ends = np.cumsum([len(left) for left in rows])[:-1]
        return [
            self._step(part, left)
            for part, left in zip(np.split(read, ends, axis=1), rows, strict=True)
        ]

    def _step(self, read: NDArray[np.float64], rows: Ints) -> Step:
        """What `_Said.together` was of these rows of the batch."""
        (tokens, exits), (confidence, refused) = (
            read[:2].astype(np.int64).tolist(),
            read[2:].tolist(),
        )
        step = Step(tokens, exits, confidence, refused)
        if len(rows) == self._batch:
            return step
        return step.spread(rows.tolist(), Step.blank(self._batch, self._loop.special.pad))

    def _position(self, position: int) -> Tensor | None:
        """`_Said.together`; None if all rows had ended before."""
        loop, run, backbone, notes = self._loop, self._run, self._backbone, self._notes
        policy, cache, judge = run.policy, run.cache, run.judge
        n_layers, final = loop.n_layers, self._final
        state = loop.begin(run, backbone.embed_on_device(self._previous, cache))
        ahead = None
        if policy.measure == "oracle" or policy.emits == "last":
            ahead = loop.last_scores(run, state).best()
        judge.begin(ahead)
        due = None if policy.max_pending is None else self._pending >= policy.max_pending
        said = _Said(cache.batch, loop.special.pad, backbone.device)
        active = waiting = self._going
        at_exit = state if run.exact and self._speaks_last else None
        before, sent = None, list[int]()
        alive: Ints | None = None  # rows that had not ended before
        for index in range(final + 1):
            if position and index == min(LAG, final):
                alive = np.flatnonzero(notes.look(final + 1, cache.batch))
                if not len(alive):
                    return None
            known = [one for one in sent if one < index - LAG]
            if known and not notes.look(known[-1])[0]:
                break
            if index < n_layers:
                before = state if index else None
                deeper = run.layer(index, state, cache.everyone)
                # rows that exit keep the state at which they did; with exact caches their true state goes on
                frozen = bool(sent) and not run.exact
                state = torch.where(active[:, None], deeper, state) if frozen else deeper
            if not self._looks[position, index]:
                judge.pass_by(state)
                continue
            sure, scores = judge.measured(index + 1, state, before)
            leaving = active  # at the last exit all do
            if index < final:
                needed = self._needed[position, index]
                if due is not None and index < n_layers - 1:
                    needed = needed.masked_fill(due, math.inf)
                may = active & (needed < math.inf)
                leaving = may & (sure >= needed)
                if policy.batching == "deepest":
                    waiting = waiting & ~leaving
                    leaving = active & ~waiting.any()
                said.stay(may & ~leaving, sure)
                active = active & ~leaving
                notes.send(index, active.any()[None])
                sent.append(index)
            best = None
            if policy.emits == "last":
                best = ahead
            elif not self._speaks_last:
                best = (scores or run.head.scores(index + 1, state, None)).best()
            elif at_exit is not None:
                at_exit = torch.where(leaving[:, None], state, at_exit)
            said.leave(leaving, min(index + 1, n_layers), sure, best)
        if self._speaks_last:
            kept = state if at_exit is None else at_exit
            best = run.head.scores(n_layers, kept, None).best()
            said.tokens = torch.where(self._going, best, said.tokens)
        cache.append(state)
        if due is not None:
            self._pending = torch.where(said.exits == n_layers, 0, self._pending + 1)
        self._going = self._going & ~(said.tokens[:, None] == self._ends).any(1)
        self._previous = said.tokens
        if alive is not None and 2 * len(alive) <= cache.batch:  # go on with these alone
            self._keep(alive)
        notes.send(final + 1, self._going)
        return said.together()

    def _keep(self, rows: Ints) -> None:
        """Go on without those that had ended a position ago."""
        kept = self._backbone.tensor(rows)
        self._run.keep(rows.tolist(), self._backbone.tensor)
        self._rows = self._rows[rows]
        self._needed = self._needed.index_select(2, kept)
        self._previous, self._going, self._pending = (
            part.index_select(0, kept) for part in (self._previous, self._going, self._pending)
        )
