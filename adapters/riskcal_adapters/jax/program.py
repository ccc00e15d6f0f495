"""Early-exit decoding as one compiled program, from weights and prompts to tokens, exits and confidences.

A while-loop over tokens holds a while-loop over layers, which ends as soon as every row has exited. Inside the loop over
layers the cache is only read: a layer attends to the earlier positions' keys and values and to its own, which it hands back,
and those of all layers are written at once when the token is done. Rows that exited keep their state and ride along, so what
the layers make of it are the projections that a skipped layer is owed; layers that no row reached get theirs in one product.
Every row therefore decodes as if alone.

Thresholds, measures, lengths and classes of forbidden tokens are data, not part of the program: it is compiled anew for other
shapes only (those of tables of classes among them), and for the oracle, which runs all layers before it looks at the first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from riskcal_adapters.jax import measures
from riskcal_adapters.jax.guards import Guards
from riskcal_adapters.jax.layers import (
    Context,
    all_layers,
    at_position,
    decoder_layer,
    logits,
    memory_of,
    read_prompt,
)
from riskcal_adapters.jax.weights import Params, Shape

#: The axis of devices among which rows are dealt out.
ROWS = "rows"


class Request(NamedTuple):
    """What is asked of B rows."""

    input_ids: Any  #: (B, S) int32
    mask: Any  #: (B, S) bool, true at real tokens
    thresholds: Any  #: (B, T, L) float32: the confidence needed to exit; inf never exits
    measures: Any  #: (B,) int32, codes of `measures.NAMES`
    lengths: Any  #: (B,) int32: tokens at most; 0 for rows that only fill the batch


class Special(NamedTuple):
    """The ids that frame a generation."""

    pad: Any  #: () int32
    start: Any  #: () int32
    ends: Any  #: (E,) int32


class Static(NamedTuple):
    """What a program is compiled for, apart from shapes."""

    shape: Shape
    oracle: bool  #: whether any row may ask for that measure
    mesh: Mesh | None  #: devices that share the rows


class Generated(NamedTuple):
    """Each (B, T); after a row's end padding, 0, NaN and -inf."""

    tokens: Any
    exit_layers: Any
    confidence: Any
    refused: Any


class Traced(NamedTuple):
    """What every layer says along the full model's path."""

    tokens: Any  #: (B, T, L)
    confidence: Any  #: (B, T, L)
    going: Any  #: (B, T) bool, false after a row's end


Said = TypeVar("Said", Generated, Traced)


class Left(NamedTuple):
    """A position after some of its layers."""

    layers: Array  #: () that ran
    state: Array  #: (B, d), frozen where the row exited
    active: Array  #: (B,) bool, rows that have not exited
    memory: Array  #: (L, 2, B, heads, k): this position's keys and values
    said: Generated  #: each (B,)


@functools.partial(jax.jit, static_argnums=0)
def generate(
    static: Static,
    params: Params,
    special: Special,
    request: Request,
    guards: Guards | None = None,
) -> Generated:
    """Decode greedily, each token as deep as its row's thresholds ask, or as its classes of tokens do."""
    return _dealt_out(static, _generate)(params, special, request, guards)


@functools.partial(jax.jit, static_argnums=0)
def trace(static: Static, params: Params, special: Special, request: Request) -> Traced:
    """Decode greedily with all layers, and look at each of them."""
    return _dealt_out(static, _trace)(params, special, request, None)


def _dealt_out(
    static: Static, function: Callable[[Static, Params, Special, Request, Guards | None], Said]
) -> Callable[[Params, Special, Request, Guards | None], Said]:
    """Each device decodes its rows by itself: its loops end when its own rows do, and devices tell each other nothing."""
    run = functools.partial(function, static)
    if static.mesh is None:
        return run
    every, rows = PartitionSpec(), PartitionSpec(ROWS)
    tables = Guards(every, every, rows, rows)

    def dealt(params: Params, special: Special, request: Request, guards: Guards | None) -> Said:
        specs = (every, every, rows, None if guards is None else tables)
        mapped: Callable[..., Said] = jax.shard_map(
            run, mesh=static.mesh, in_specs=specs, out_specs=rows, check_vma=False
        )
        return mapped(params, special, request, guards)

    return dealt


def _generate(
    static: Static,
    params: Params,
    special: Special,
    request: Request,
    guards: Guards | None,
) -> Generated:
    shape, batch = static.shape, len(request.lengths)
    length = request.thresholds.shape[1]
    context = read_prompt(shape, params, request.input_ids, request.mask, length)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        position, previous, going, own, contexts, said = carry
        seen = at_position(shape, params, context, position, own)
        needed = lax.dynamic_index_in_dim(request.thresholds, position, 1, keepdims=False)
        holds = None if guards is None else functools.partial(guards.holds, contexts)
        left = exit_layers(
            static, params, special, seen, previous, going, needed, request.measures, holds
        )
        own = lax.dynamic_update_index_in_dim(own, left.memory, position, -2)
        said = jax.tree.map(
            lambda all, one: lax.dynamic_update_index_in_dim(all, one, position, 1), said, left.said
        )
        token = left.said.tokens
        going = _unended(special, request, position, token, going)
        contexts = None if guards is None else guards.next(contexts, token)
        return position + 1, token, going, own, contexts, said

    said: Generated = jax.tree.map(
        lambda one: jnp.broadcast_to(one[:, None], (batch, length)), _silent(special, batch)
    )
    start = jnp.broadcast_to(special.start, (batch,))
    contexts = None if guards is None else jnp.asarray(guards.start)
    carry = jnp.int32(0), start, request.lengths > 0, context.own, contexts, said
    said = lax.while_loop(lambda carry: carry[2].any(), step, carry)[-1]
    return said


def exit_layers(
    static: Static,
    params: Params,
    special: Special,
    context: Context,
    previous: Array,
    going: Array,
    needed: Array,
    measure: Array,
    holds: Callable[[Array], Array] | None = None,
) -> Left:
    """One position: run layers until every going row has exited, and make up for the layers that were skipped.

    Parameters
    ----------
    static, params, special, context
        What is compiled for, the weights, the ids that frame a generation, and what the position sees.
    previous : (B,) int32
        The tokens before.
    going : (B,) bool
        Rows that have not ended.
    needed : (B, L) float32
        The confidence needed to exit.
    measure : (B,) int32
        Codes of the rows' measures.
    holds : callable, optional
        Of tokens (B,), whether they may not leave early.
    """
    shape, n_layers, batch = static.shape, static.shape.decoder_layers, len(previous)
    state = params.embedding[previous]
    target = _last_tokens(static, params, context, state) if static.oracle else None

    def run(left: Left) -> Left:
        index = left.layers
        deeper, fresh = decoder_layer(shape, params, context, index, left.state)
        state = jnp.where(left.active[:, None], deeper, left.state)
        bar = lax.dynamic_index_in_dim(needed, index, 1, keepdims=False)
        last = index == n_layers - 1
        looked_at = left.active & (bar < jnp.inf)
        sure = measures.of_states(left.state, state, index == 0, measure, params.classifier)
        reads = measures.by_logits(measure)
        # the head is costly: it is left out where nothing can exit, and where a measure without logits says that nothing does
        tokens, read = lax.cond(
            (looked_at & (last | reads | (sure >= bar))).any(),
            lambda: measures.of_logits(logits(shape, params, state), measure, target),
            lambda: (jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)),
        )
        sure = jnp.where(reads, read, sure)
        enough = looked_at & (last | (sure >= bar))
        leaving = enough if holds is None else enough & (last | ~holds(tokens))
        said = Generated(
            tokens=jnp.where(leaving, tokens, left.said.tokens),
            exit_layers=jnp.where(leaving, index + 1, left.said.exit_layers),
            confidence=jnp.where(leaving, sure, left.said.confidence),
            refused=jnp.where(
                looked_at & ~enough & (sure > left.said.refused), sure, left.said.refused
            ),
        )
        memory = lax.dynamic_update_index_in_dim(left.memory, fresh, index, 0)
        return Left(index + 1, state, left.active & ~leaving, memory, said)

    nothing = jnp.zeros((n_layers, 2, batch, shape.heads, shape.head_width), state.dtype)
    begun = Left(jnp.int32(0), state, going, nothing, _silent(special, batch))
    left = lax.while_loop(lambda left: left.active.any(), run, begun)
    ran = jnp.arange(n_layers)[:, None, None, None, None] < left.layers
    memory = lax.cond(
        left.layers < n_layers,
        lambda: jnp.where(ran, left.memory, memory_of(shape, params, left.state)),
        lambda: left.memory,
    )
    return left._replace(memory=memory)


def _trace(
    static: Static, params: Params, special: Special, request: Request, _: Guards | None
) -> Traced:
    shape, batch = static.shape, len(request.lengths)
    length = request.thresholds.shape[1]
    context = read_prompt(shape, params, request.input_ids, request.mask, length)
    first = jnp.arange(shape.decoder_layers)[:, None] == 0

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        position, previous, going, own, traced = carry
        seen = at_position(shape, params, context, position, own)
        state = params.embedding[previous]
        states, memory = all_layers(shape, params, seen, state)
        sure = measures.of_states(
            jnp.stack([state, *states[:-1]]), states, first, request.measures, params.classifier
        )
        values = logits(shape, params, states)
        target = values[-1].argmax(-1)
        tokens, read = measures.of_logits(values, request.measures, target)
        sure = jnp.where(measures.by_logits(request.measures), read, sure)
        own = lax.dynamic_update_index_in_dim(own, memory, position, -2)
        here = Traced(tokens.T, sure.T, going)
        traced = jax.tree.map(
            lambda all, one: lax.dynamic_update_index_in_dim(all, one, position, 1), traced, here
        )
        token = jnp.where(going, tokens[-1], special.pad)
        return position + 1, token, _unended(special, request, position, token, going), own, traced

    size = (batch, length, shape.decoder_layers)
    traced = Traced(
        jnp.zeros(size, jnp.int32), jnp.zeros(size, jnp.float32), jnp.zeros((batch, length), bool)
    )
    carry = (
        jnp.int32(0),
        jnp.broadcast_to(special.start, (batch,)),
        request.lengths > 0,
        context.own,
        traced,
    )
    traced = lax.while_loop(lambda carry: carry[2].any(), step, carry)[-1]
    return traced


def _last_tokens(static: Static, params: Params, context: Context, state: Array) -> Array:
    """The last layer's tokens on the cache as it is."""
    states, _ = all_layers(static.shape, params, context, state)
    return logits(static.shape, params, states[-1]).argmax(-1)


def _silent(special: Special, batch: int) -> Generated:
    """What is said of a position of rows that have ended."""
    return Generated(
        jnp.broadcast_to(special.pad, (batch,)),
        jnp.zeros(batch, jnp.int32),
        jnp.full(batch, jnp.nan, jnp.float32),
        jnp.full(batch, -jnp.inf, jnp.float32),
    )


def _unended(
    special: Special, request: Request, position: Array, token: Array, going: Array
) -> Array:
    ended = (token[:, None] == special.ends).any(-1)
    unended: Array = going & ~ended & (position + 1 < request.lengths)
    return unended
