"""The decoding loop: one position after the other, in which every row may leave at an earlier layer.

It knows a decoder by its `riskcal_adapters.torch.backbone`: layers, cache, logits. What users hand over is checked, and what
comes out put together, in `riskcal_adapters.torch.decoder`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from riskcal.forbidden import Guard
from riskcal.policy import ExitPolicy
from riskcal_adapters import generation_config
from riskcal_adapters.torch import exits, heads, sampling
from riskcal_adapters.torch.backbone import Backbone
from riskcal_adapters.torch.caches import Cache, Ints
from riskcal_adapters.torch.confidence import CONTRASTIVE, Judge
from riskcal_adapters.torch.generation import Step
from riskcal_adapters.torch.measures import Linear
from riskcal_adapters.torch.run import Run
from riskcal_adapters.torch.scores import Scores


def _no_text(token: int) -> str:
    return ""


#: Where there is no exit, and so none that agrees.
_NO_TOKEN = -1
_NONE = np.float32(-math.inf)


@dataclass(eq=False)
class Loop:
    """Decodes rows with a backbone.

    Attributes
    ----------
    backbone : Backbone
    special : riskcal_adapters.generation_config.SpecialTokens
        Ids of padding, start and end tokens.
    classifier : Linear or None
        The exit classifier, for policies that ask for it.
    text : callable
        Of a token, for policies that forbid some by their texts.
    """

    backbone: Backbone
    special: generation_config.SpecialTokens
    classifier: Linear | None = None
    text: Callable[[int], str] = _no_text

    @property
    def n_layers(self) -> int:
        """Decoder layers L."""
        return self.backbone.n_layers

    def run(self, policy: ExitPolicy, tokens: Tensor, mask: NDArray[np.bool_], length: int) -> Run:
        """What `step` goes on from, after the prompts were read; nothing is decoded yet."""
        backbone, batch = self.backbone, len(tokens)
        policy = policy.named()
        head = heads.of(policy, backbone)
        guard = Guard(policy.forbidden, self.text) if policy.forbidden else None
        prompts = zip(tokens.cpu().numpy(), mask, strict=True) if guard else ()
        return Run(
            policy=policy,
            backbone=backbone,
            cache=backbone.start(tokens, mask, length),
            head=head,
            judge=Judge(head, policy, self.classifier),
            keys=sampling.noise_keys(tokens.cpu().numpy(), mask) if policy.sampling else [],
            pending=[0] * batch,
            gathers=policy.batching == "regroup" and batch > 1,
            exact=policy.cache in ("deferred", "recompute"),
            guard=guard,
            contexts=[guard.start(row[real].tolist()) for row, real in prompts] if guard else [],
        )

    def generate(
        self,
        policy: ExitPolicy,
        tokens: Tensor,
        mask: NDArray[np.bool_],
        needed: NDArray[np.float32],
    ) -> list[Step]:
        """The positions of rows that share ``policy``, but for the confidence ``needed`` to exit.

        This is what `Decoder.needed` gives, (T, L, B) or (T, L + 1, B): T is the length limit.
        """
        batch = len(tokens)
        run = self.run(policy, tokens, mask, len(needed))
        full = policy.is_full_model and not np.isfinite(needed[:, :-1]).any()
        chosen, going = run.cache.first, list(range(batch))
        steps, rows = [], going  # rows: which of the batch's those of the run are
        for position in range(len(needed)):
            if full:
                step = self.full_step(run, chosen, going)
            else:
                step = self.step(run, chosen, going, needed[position])
            steps.append(
                step
                if len(rows) == batch
                else step.spread(rows, Step.blank(batch, self.special.pad))
            )
            chosen = step.tokens
            going = [row for row in going if chosen[row] not in self.special.ends]
            if not going:
                break
            # once half of the batch has ended, go on with the others alone
            if 2 * len(going) <= len(rows):
                run.keep(going, self.backbone.tensor)
                needed = needed[:, :, going]
                rows, chosen = [rows[row] for row in going], [chosen[row] for row in going]
                going = list(range(len(rows)))
        return steps

    def step(
        self, run: Run, previous: list[int], going: list[int], needed: NDArray[np.float32]
    ) -> Step:
        """The next token of each row.

        ``going`` are the rows that have not ended (the others get padding), ``needed`` (L, B) is of this position;
        (L + 1, B) where the last layer has a head of its own: the final head comes after it, as an exit without a layer.
        """
        policy, cache, judge = run.policy, run.cache, run.judge
        step = Step.blank(cache.batch, self.special.pad)
        state = after_first = self.begin(run, self.backbone.embed(previous, run.cache))
        ahead = (
            self.last_scores(run, state)
            if policy.measure == "oracle" or policy.emits == "last"
            else None
        )
        judge.begin(None if ahead is None else ahead.best())
        by_row = self._by_row(run, needed)
        together = policy.batching == "deepest"
        # Rows that exit keep the state at which they did; with exact caches their true state goes on with the others'.
        freezes = not (together or run.gathers or run.exact)
        # of rows that have states, the places of those that have not left
        rows, places = cache.everyone, np.array(going)
        moving = self._column(going, cache) if freezes else None
        at_exit = None  # (B, d), of each row, where a layer's states are those of some rows only
        if run.gathers:
            at_exit = state.clone()
            rows, places = places, np.arange(len(going))
            state = self._of(state, rows, cache)
        waiting = set(going)  # rows of a "deepest" batch that have not reached their threshold yet
        before, n_layers, final = None, self.n_layers, len(needed) - 1
        now, refused = np.zeros(cache.batch, np.int64), np.full((cache.batch, 1), _NONE)
        for index in range(final + 1):
            if index < n_layers:
                before = state if index else None
                deeper = run.layer(index, state, rows)
                state = deeper if moving is None else torch.where(moving, deeper, state)
            if index == 0:
                after_first = state
            last = index == final  # there all leave; a last layer's own head is not that exit
            asked = places if last else exits.asking(rows, now, places, by_row, index)
            if not len(asked):
                judge.pass_by(state)
                continue
            confidence, scores = judge.look(index + 1, state, before)
            sure, noted = confidence[asked], refused.copy() if together else refused
            leaving = asked[exits.decide(rows, now, asked, by_row, index, sure, noted, last)]
            if together and not last:
                waiting.difference_update(leaving.tolist())
                leaving = places[:0] if waiting else places
            if len(leaving):
                emitting = ahead if policy.emits == "last" else scores
                emitting = emitting or run.head.scores(index + 1, state, None)
                layer = min(index + 1, n_layers)
                leaving = self._leave(
                    run, step, layer, rows, leaving, confidence, emitting, early=not last
                )
            if not len(leaving):
                if together:  # none did, however sure
                    refused[asked, 0] = np.fmax(refused[asked, 0], sure)
                continue
            if at_exit is not None:
                exiting = self.backbone.tensor(leaving)
                at_exit.index_copy_(
                    0, self.backbone.tensor(rows[leaving]), state.index_select(0, exiting)
                )
            places = np.array([one for one in places.tolist() if not step.exits[rows[one]]])
            if not len(places):
                break
            moving = self._column(places, cache) if freezes else None
            if run.gathers:
                kept = self.backbone.tensor(places)
                state = state.index_select(0, kept)
                before = None if before is None else before.index_select(0, kept)
                judge.keep(kept)
                rows, places = rows[places], np.arange(len(places))
        step.refused = refused[:, 0].tolist()
        if at_exit is not None:
            state = at_exit
        cache.append(after_first if policy.cache == "first" else state)
        # of one row, or of rows that left together: `request_checks.rows_by_settings`
        if policy.cache == "copy":
            self.backbone.copy_upwards(cache, max(step.exits))
        for row in going:
            run.pending[row] = 0 if step.exits[row] == self.n_layers else run.pending[row] + 1
            if run.guard is not None:
                run.contexts[row] = run.guard.after(run.contexts[row], step.tokens[row])
        return step

    def full_step(self, run: Run, previous: list[int], going: list[int]) -> Step:
        """`step` of `ExitPolicy.full_model`, of which nobody is asked before the last exit."""
        cache = run.cache
        step = Step.blank(cache.batch, self.special.pad)
        state = self.backbone.embed(previous, cache)
        for index in range(self.n_layers):
            state = self.backbone.layer(index, state, cache)
        run.judge.begin()
        confidence, scores = run.judge.look(self.backbone.n_exits, state, None)
        assert scores is not None
        sure, tokens = confidence.tolist(), self._choose(run, scores, going, going)
        for row, token in zip(going, tokens, strict=True):
            step.tokens[row], step.confidence[row] = token, sure[row]
            step.exits[row] = self.n_layers
        cache.append(state)
        return step

    def begin(self, run: Run, state: Tensor) -> Tensor:
        """Gives ``state``, which is embedded; a cache that is recomputed notes it, and goes back to the last full pass."""
        if run.policy.cache == "recompute":
            deepest = run.cache.layers.get(self.n_layers - 1)
            full, position = 0 if deepest is None else deepest.filled, run.cache.position
            if full < position:
                run.cache.rewind(full)
                for again in run.embedded[full:position]:
                    run.cache.append(again)
            run.embedded.append(state)
        return state

    def last_scores(self, run: Run, state: Tensor) -> Scores:
        """The last layer's logits on the cache as it is; the cache is left as if they had not been asked for."""
        cache = run.cache
        position, states = cache.position, cache.states[: cache.position].clone()
        for index in range(self.n_layers):
            state = run.layer(index, state, cache.everyone)
        cache.rewind(position)
        cache.states[:position] = states
        return Scores(self.backbone.logits(state))

    def _by_row(self, run: Run, needed: NDArray[np.float32]) -> NDArray[np.float32]:
        """``needed`` as `exits` reads it, (B, 1, L); rows that exited ``max_pending`` times in a row need what none is."""
        by_row, limit = needed.T[:, None].copy(), run.policy.max_pending
        if limit is not None:
            by_row[np.array(run.pending) >= limit, :, : self.n_layers - 1] = math.inf
        return by_row

    def _leave(
        self,
        run: Run,
        step: Step,
        layer: int,
        rows: Ints,
        places: Ints,
        confidence: NDArray[np.float32],
        scores: Scores,
        *,
        early: bool,
    ) -> Ints:
        """The ``rows`` at some places, which are those in the scores and confidences, emit their tokens.

        Gives the places of those that did: ``early``, those whose tokens are not forbidden, of a "deepest" batch all or none.
        """
        tokens = self._choose(run, scores, rows[places].tolist(), places.tolist())
        guard = run.guard
        if guard is not None and early:
            free = [
                not guard.forbids(run.contexts[row], token)
                for row, token in zip(rows[places].tolist(), tokens, strict=True)
            ]
            if run.policy.batching == "deepest" and not all(free):
                return places[:0]
            places = places[free]
            tokens = [token for token, is_free in zip(tokens, free, strict=True) if is_free]
        sure = confidence[places].tolist()
        for row, token, one in zip(rows[places].tolist(), tokens, sure, strict=True):
            step.tokens[row], step.exits[row], step.confidence[row] = token, layer, one
        return places

    def _choose(self, run: Run, scores: Scores, rows: list[int], places: list[int]) -> list[int]:
        drawing = run.policy.sampling
        if drawing is None:
            best = scores.tokens().tolist()
            return [best[place] for place in places]
        keys = [run.keys[row] for row in rows]
        return sampling.draw(
            scores, places, keys, run.cache.position, drawing, self.backbone.vocabulary
        )

    def all_exits(
        self, run: Run, previous: list[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Confidence and token (B, L) at every exit, of a step that skips no layer; the last token is the full model's."""
        policy, cache, judge = run.policy, run.cache, run.judge
        begins = (
            policy.min_layer if policy.pruning is not None or policy.measure in CONTRASTIVE else 1
        )
        everyone = list(range(cache.batch))
        states = [self.backbone.embed(previous, cache)]
        for index in range(self.n_layers):
            states.append(self.backbone.layer(index, states[-1], cache))
        last = Scores(self.backbone.logits(states[-1]))
        judge.begin(last.best() if policy.measure == "oracle" else None)
        if self.backbone.n_exits > self.n_layers:
            states.append(states[-1])  # the final head reads what the last layer's own does
        confidence, best = [], []
        scores: Scores | None
        for layer, state in enumerate(states[1:], start=1):
            if layer < begins or not self.backbone.exits_at(layer):
                judge.pass_by(state)
                sure = np.full(cache.batch, np.float32(math.nan))
                if not self.backbone.exits_at(layer):
                    confidence.append(sure)
                    best.append([_NO_TOKEN] * cache.batch)
                    continue
                scores = self.backbone.scores(layer, state)
            else:
                before = states[min(layer, self.n_layers) - 1] if layer > 1 else None
                sure, scores = judge.look(layer, state, before)
            confidence.append(sure)
            best.append(
                self._choose(run, scores or run.head.scores(layer, state, None), everyone, everyone)
            )
        best[-1] = self._choose(run, last, everyone, everyone)
        cache.append(states[-1])
        return np.stack(confidence, axis=1), np.array(best).T

    def hold(
        self, run: Run, sure: NDArray[np.float32], best: NDArray[np.int64], going: list[int]
    ) -> None:
        """Of `all_exits`: the confidences that a guard withholds, NaN; a row's text then goes on with the last layer's token."""
        if run.guard is None:
            return
        for row in going:
            context = run.contexts[row]
            for index, token in enumerate(best[row, :-1].tolist()):
                if token != _NO_TOKEN and run.guard.forbids(context, token):
                    sure[row, index] = math.nan
            run.contexts[row] = run.guard.after(context, int(best[row, -1]))

    def _of(self, state: Tensor, rows: Ints, cache: Cache) -> Tensor:
        """These rows' states."""
        if len(rows) == cache.batch:
            return state
        return state.index_select(0, self.backbone.tensor(rows))

    def _column(self, rows: Ints | list[int], cache: Cache) -> Tensor | None:
        """(B, 1), true at these rows; None if these are all."""
        if len(rows) == cache.batch:
            return None
        chosen = np.zeros((cache.batch, 1), dtype=bool)
        chosen[rows] = True
        return self.backbone.tensor(chosen)
