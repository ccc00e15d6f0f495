"""A T5's layers as pure functions of its weights, for prompts as a whole and for one decoder position at a time.

B rows, S prompt positions, T decoder positions, L decoder layers, d the model's width, h of all heads together, k of one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from riskcal_adapters.jax.weights import ACTIVATIONS, Layer, Params, Shape


class Context(NamedTuple):
    """What a decoder position sees: keys and values (first axis 0 and 1 of a layer's) of earlier positions and the prompt."""

    own: Array  #: (L, 2, B, heads, T, k)
    own_bias: (
        Array  #: (L or 1, heads, T), -inf from the present position on; 1: all layers share it
    )
    bias: Array  #: (L or 1, heads), of a position on itself
    prompt: Array  #: (L, 2, B, heads, S, k)
    prompt_bias: Array  #: (B, 1, S), -inf at padding


def read_prompt(
    shape: Shape, params: Params, input_ids: Array, mask: Array, length: int
) -> Context:
    """Encode prompts (B, S), and what the first of ``length`` decoder positions sees."""
    batch = len(input_ids)
    prompt_bias = jnp.where(mask, 0.0, -jnp.inf)[:, None, :]
    encoded = encode(shape, params, input_ids, prompt_bias)
    prompt = product(encoded, params.cross_memory).reshape(
        batch, -1, shape.decoder_layers, 2, *_heads(shape)
    )
    empty = jnp.zeros(
        (shape.decoder_layers, 2, batch, shape.heads, length, shape.head_width), encoded.dtype
    )
    own_bias, bias = _bias_on_earlier(shape, params, jnp.int32(0), length)
    return Context(empty, own_bias, bias, prompt.transpose(2, 3, 0, 4, 1, 5), prompt_bias)


def at_position(
    shape: Shape, params: Params, context: Context, position: Array, own: Array
) -> Context:
    """The context of another position, with what is known of the ones before it."""
    own_bias, _ = _bias_on_earlier(shape, params, position, own.shape[-2])
    return context._replace(own=own, own_bias=own_bias)


def encode(shape: Shape, params: Params, input_ids: Array, prompt_bias: Array) -> Array:
    """The encoder's normed output (B, S, d), without the norm's gain."""
    batch, width = input_ids.shape
    positions = np.arange(width)
    buckets = _buckets(shape, positions[:, None] - positions, two_sided=True)
    # (layers or 1, heads, S, S)
    biases = jnp.moveaxis(params.encoder_bias.astype(jnp.float32)[:, buckets], -1, 1)

    def block(state: Array, own: tuple[Layer, Array]) -> tuple[Array, None]:
        layer, index = own
        bias = _of_layer(biases, index) + prompt_bias[:, None]
        projected = product(normed(shape, state), layer.self_in).reshape(
            batch, width, 3, *_heads(shape)
        )
        query, key, value = (projected[:, :, part] for part in range(3))
        weights = jax.nn.softmax(_einsum("bqhk,bshk->bhqs", query, key, fine=True) + bias, -1)
        attended = _einsum("bhqs,bshk->bqhk", weights.astype(value.dtype), value)
        state = state + product(attended.reshape(batch, width, -1), layer.self_out)
        return state + _feed_forward(shape, layer, state), None

    state, _ = lax.scan(
        block, params.embedding[input_ids], (params.encoder, jnp.arange(shape.encoder_layers))
    )
    return normed(shape, state)


def decoder_layer(
    shape: Shape, params: Params, context: Context, index: Array, state: Array
) -> tuple[Array, Array]:
    """One layer, chosen at run time: states (B, d) to (B, d), and the position's keys and values (2, B, heads, k)."""
    if isinstance(params.decoder, Layer):
        stacked = (params.decoder, context.own, context.prompt)
        layer, own, prompt = jax.tree.map(
            lambda array: lax.dynamic_index_in_dim(array, index, 0, keepdims=False), stacked
        )
        return _block(shape, context, index, layer, own, prompt, state)
    branches = [
        lambda state, i=i, layer=layer: _block(
            shape, context, i, layer, context.own[i], context.prompt[i], state
        )
        for i, layer in enumerate(params.decoder)
    ]
    done: tuple[Array, Array] = lax.switch(index, branches, state)
    return done


def all_layers(shape: Shape, params: Params, context: Context, state: Array) -> tuple[Array, Array]:
    """States (L, B, d) after every layer, and the position's keys and values (L, 2, B, heads, k)."""
    if isinstance(params.decoder, Layer):

        def run(
            state: Array, chosen: tuple[Array, Layer, Array, Array]
        ) -> tuple[Array, tuple[Array, Array]]:
            state, memory = _block(shape, context, *chosen, state)
            return state, (state, memory)

        stacked = (jnp.arange(shape.decoder_layers), params.decoder, context.own, context.prompt)
        both: tuple[Array, Array] = lax.scan(run, state, stacked)[1]
        return both
    states, memories = [], []
    for i, layer in enumerate(params.decoder):
        state, memory = _block(shape, context, i, layer, context.own[i], context.prompt[i], state)
        states.append(state)
        memories.append(memory)
    return jnp.stack(states), jnp.stack(memories)


def memory_of(shape: Shape, params: Params, state: Array) -> Array:
    """Keys and values (L, 2, B, heads, k) that every decoder layer makes of states (B, d)."""
    projected = product(normed(shape, state), params.self_memory)
    return jnp.moveaxis(
        projected.reshape(len(state), shape.decoder_layers, 2, *_heads(shape)), 0, 2
    )


def logits(shape: Shape, params: Params, state: Array) -> Array:
    """Final norm and head: states (..., d) to float32 (..., V)."""
    return jnp.matmul(
        normed(shape, state),
        params.head,
        precision=_precision(state),
        preferred_element_type=jnp.float32,
    )


def normed(shape: Shape, state: Array) -> Array:
    """T5's norm without its gain, which is in the weights that follow."""
    fine = state.astype(jnp.float32)
    return (fine * lax.rsqrt(jnp.square(fine).mean(-1, keepdims=True) + shape.epsilon)).astype(
        state.dtype
    )


def product(states: Array, matrix: Array) -> Array:
    """Matrix product; of float32 in full float32 on every device, where some would round to shorter types."""
    return jnp.matmul(states, matrix, precision=_precision(states))


def _block(
    shape: Shape,
    context: Context,
    index: Array | int,
    layer: Layer,
    own: Array,
    prompt: Array,
    state: Array,
) -> tuple[Array, Array]:
    batch = len(state)
    projected = product(normed(shape, state), layer.self_in).reshape(batch, 3, *_heads(shape))
    query, key, value = (projected[:, part] for part in range(3))
    # A softmax over the earlier positions and, apart, the present one: the cache is not written before the token is done.
    scores = _einsum("bhk,bhtk->bht", query, own[0], fine=True) + _of_layer(context.own_bias, index)
    score = _einsum("bhk,bhk->bh", query, key, fine=True) + _of_layer(context.bias, index)
    highest = jnp.maximum(scores.max(-1), score)
    weights, weight = jnp.exp(scores - highest[..., None]), jnp.exp(score - highest)
    total = weights.sum(-1) + weight
    attended = _einsum("bht,bhtk->bhk", (weights / total[..., None]).astype(value.dtype), own[1])
    attended = attended + (weight / total)[..., None].astype(value.dtype) * value
    state = state + product(attended.reshape(batch, -1), layer.self_out)
    query = product(normed(shape, state), layer.cross_query).reshape(batch, *_heads(shape))
    weights = jax.nn.softmax(
        _einsum("bhk,bhsk->bhs", query, prompt[0], fine=True) + context.prompt_bias, -1
    )
    attended = _einsum("bhs,bhsk->bhk", weights.astype(value.dtype), prompt[1])
    state = state + product(attended.reshape(batch, -1), layer.cross_out)
    return state + _feed_forward(shape, layer, state), jnp.stack([key, value])


def _feed_forward(shape: Shape, layer: Layer, state: Array) -> Array:
    hidden = product(normed(shape, state), layer.ff_in)
    if shape.gated:
        gate, linear = jnp.split(hidden, 2, -1)
        return product(ACTIVATIONS[shape.activation](gate) * linear, layer.ff_out)
    return product(ACTIVATIONS[shape.activation](hidden), layer.ff_out)


def _bias_on_earlier(
    shape: Shape, params: Params, position: Array, length: int
) -> tuple[Array, Array]:
    """(L or 1, heads, T): attention's bias at a position on all earlier ones, and (L or 1, heads): on itself."""
    buckets = _buckets(shape, np.arange(length), two_sided=False)
    by_distance = jnp.moveaxis(params.decoder_bias.astype(jnp.float32)[:, buckets], -1, 1)
    distance = position - jnp.arange(length)
    return jnp.where(
        distance > 0, by_distance[..., jnp.maximum(distance, 0)], -jnp.inf
    ), by_distance[..., 0]


def _of_layer(biases: Array, index: Array | int) -> Array:
    """A layer's own bias, or the one that all share."""
    return (
        biases[0]
        if len(biases) == 1
        else lax.dynamic_index_in_dim(biases, index, 0, keepdims=False)
    )


def _buckets(shape: Shape, distance: NDArray[Any], *, two_sided: bool) -> NDArray[Any]:
    """The bucket of each distance, query's position less key's: small ones one by one, larger ones by their logarithm."""
    count, bucket = shape.buckets, np.zeros_like(distance)
    if two_sided:
        count //= 2
        bucket, distance = np.where(distance < 0, count, 0), np.abs(distance)
    single = count // 2
    share = np.log(np.maximum(distance, 1).astype(np.float32) / single) / math.log(
        shape.reach / single
    )
    coarse = np.minimum(single + (share * (count - single)).astype(np.int32), count - 1)
    return np.asarray(bucket + np.where(distance < single, distance, coarse))


def _heads(shape: Shape) -> tuple[int, int]:
    return shape.heads, shape.head_width


def _einsum(subscripts: str, *arrays: Array, fine: bool = False) -> Array:
    """As `product`; the result in float32 if ``fine``."""
    wanted = jnp.float32 if fine else None
    return jnp.einsum(
        subscripts, *arrays, precision=_precision(arrays[0]), preferred_element_type=wanted
    )


def _precision(array: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if array.dtype == jnp.float32 else None
