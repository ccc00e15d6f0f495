"""A T5's weights as a pytree, rearranged once from the names that Hugging Face gives them.

Projections of one input are one matrix, each matrix is stored (inputs, outputs), and each norm's gain is multiplied into the
weights that follow it: then the keys and values of one state in all layers are a single product.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from riskcal import RiskcalError
from riskcal_adapters._checkpoints import MODEL_TYPES, UNUSED

#: Feed-forward nonlinearities by the names that configs use.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


class Shape(NamedTuple):
    """What of a T5's config its computation depends on. Hashable: programs are compiled for one of these."""

    width: int  #: d
    heads: int
    head_width: int
    feed_forward: int
    vocabulary: int
    encoder_layers: int
    decoder_layers: int
    activation: str
    gated: bool
    buckets: int
    reach: int  #: relative distances beyond this are all the same
    epsilon: float
    tied: bool  #: whether logits are scaled by d ** -0.5
    bias_per_layer: bool = (
        False  #: whether each layer has a bias on positions, as in a UMT5, or all share the first's
    )


@dataclass(frozen=True, eq=False)
class T5:
    """A T5 checkpoint on the host, as it was stored.

    Attributes
    ----------
    shape : Shape
        What its config says of the model.
    weights : mapping of str to (...) ndarray
        By Hugging Face's names, of any floating type.
    generation_config : types.SimpleNamespace
        Padding, end and start ids, and whatever else the checkpoint says of generation.

    Examples
    --------
    >>> from riskcal_adapters.jax import load_example
    >>> model = load_example("g2p").model
    >>> model.weights["shared.weight"].shape, model.generation_config.eos_token_id
    ((68, 128), 1)
    """

    shape: Shape
    weights: Mapping[str, NDArray[Any]]
    generation_config: SimpleNamespace


class Layer(NamedTuple):
    """One block, or all blocks of a stack along a first axis; h is the width of all heads together, f the feed-forward's."""

    self_in: Any  #: (d, 3h): queries, keys, values
    self_out: Any  #: (h, d)
    ff_in: Any  #: (d, f), or (d, 2f): gate and linear part
    ff_out: Any  #: (f, d)
    cross_query: Any = None  #: (d, h); the encoder has no cross-attention
    cross_out: Any = None  #: (h, d)


class Classifier(NamedTuple):
    """The linear classifier of the measure ``classifier``, in float32."""

    weight: Any  #: (d,)
    bias: Any  #: ()


class Params(NamedTuple):
    """All weights, as arrays of numpy or JAX. A stack is one `Layer` with a first axis of layers, or a tuple of layers."""

    embedding: Any  #: (V, d)
    encoder: Layer  #: stacked
    decoder: Layer | tuple[Layer, ...]
    self_memory: Any  #: (d, L * 2h): keys and values of a state in every decoder layer
    cross_memory: Any  #: (d, L * 2h): keys and values of the encoded prompt
    head: Any  #: (d, V), after the decoder's final norm
    encoder_bias: Any  #: (layers, buckets, heads), or (1, buckets, heads) where layers share it
    decoder_bias: Any  #: (L, buckets, heads), or (1, buckets, heads)
    classifier: Classifier | None = None


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """Read what matters of a Hugging Face config; ``where`` names it in errors."""
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise RiskcalError(f"{where}: does not describe a T5 (model_type 't5', 'mt5' or 'umt5').")
    for name in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "vocab_size"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise RiskcalError(
                f"{where}: {name} is {config.get(name)!r}; give the config of a whole T5 checkpoint."
            )
    projection = str(config.get("feed_forward_proj") or "relu")
    activation = "gelu_new" if projection == "gated-gelu" else projection.removeprefix("gated-")
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise RiskcalError(
            f"{where}: feed_forward_proj {projection!r} is not known; choose {known}, gated- or not."
        )
    return Shape(
        width=config["d_model"],
        heads=config["num_heads"],
        head_width=config["d_kv"],
        feed_forward=config["d_ff"],
        vocabulary=config["vocab_size"],
        encoder_layers=config["num_layers"],
        decoder_layers=config.get("num_decoder_layers") or config["num_layers"],
        activation=activation,
        gated=projection.startswith("gated-"),
        buckets=config.get("relative_attention_num_buckets", 32),
        reach=config.get("relative_attention_max_distance", 128),
        epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        # transformers 5 writes tie_word_embeddings: true whatever the head, and tells by this whether a T5 scales; its mT5
        # never does, its UMT5 always
        tied=kind == "umt5"
        or (
            kind == "t5"
            and bool(
                config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
            )
        ),
        bias_per_layer=kind == "umt5",
    )


def check(weights: Mapping[str, NDArray[Any]], shape: Shape, where: str) -> None:
    """Refuse weights that are missing, unknown, of another shape or not floating-point, each by its key."""
    expected = expected_shapes(shape)
    if "lm_head.weight" in weights:
        expected["lm_head.weight"] = expected["shared.weight"]
    for name, size in expected.items():
        if name not in weights:
            raise RiskcalError(f"{where}: lacks {name}; give the folder of a whole T5 checkpoint.")
        if weights[name].shape != size:
            raise RiskcalError(
                f"{where}: {name} has shape {weights[name].shape}, but the config asks for {size}."
            )
        if not jnp.issubdtype(weights[name].dtype, jnp.floating):
            raise RiskcalError(
                f"{where}: {name} holds {weights[name].dtype}; give floating-point weights."
            )
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", UNUSED}
    for name in weights:
        if name not in expected and name not in copies:
            raise RiskcalError(
                f"{where}: holds {name}, which is no weight of a T5; give the folder of a whole T5 checkpoint."
            )


def arrange(model: T5, dtype: str, *, stacked: bool) -> Params:
    """The pytree of a model's weights on the host, in ``dtype``; decoder layers as a tuple unless ``stacked``."""
    weights, shape = model.weights, model.shape

    def plain(*names: str) -> NDArray[Any]:
        return np.concatenate(
            [np.asarray(weights[f"{name}.weight"], np.float32).T for name in names], axis=1
        )

    def after(norm: str, *names: str, scale: float = 1.0) -> NDArray[Any]:
        gain = np.asarray(weights[f"{norm}.weight"], np.float32) * np.float32(scale)
        product: NDArray[Any] = gain[:, None] * plain(*names)
        return product

    def layer(block: str, *, cross: bool) -> Layer:
        dense = f"{block}.layer.{1 + cross}"
        entries = ["wi_0", "wi_1"] if shape.gated else ["wi"]
        own = f"{block}.layer.0"
        made = Layer(
            self_in=after(f"{own}.layer_norm", *(f"{own}.SelfAttention.{part}" for part in "qkv")),
            self_out=plain(f"{own}.SelfAttention.o"),
            ff_in=after(
                f"{dense}.layer_norm", *(f"{dense}.DenseReluDense.{entry}" for entry in entries)
            ),
            ff_out=plain(f"{dense}.DenseReluDense.wo"),
        )
        if not cross:
            return made
        other = f"{block}.layer.1"
        return made._replace(
            cross_query=after(f"{other}.layer_norm", f"{other}.EncDecAttention.q"),
            cross_out=plain(f"{other}.EncDecAttention.o"),
        )

    encoder = [layer(f"encoder.block.{i}", cross=False) for i in range(shape.encoder_layers)]
    blocks = [f"decoder.block.{i}" for i in range(shape.decoder_layers)]
    decoder = [layer(block, cross=True) for block in blocks]
    inner = shape.heads * shape.head_width
    memory = [
        after(
            "encoder.final_layer_norm",
            *(f"{block}.layer.1.EncDecAttention.{part}" for part in "kv"),
        )
        for block in blocks
    ]
    # a checkpoint's own head counts, whatever the config says of tied embeddings
    head = "lm_head" if "lm_head.weight" in weights else "shared"
    arranged = Params(
        embedding=np.asarray(weights["shared.weight"], np.float32),
        encoder=_stack(encoder),
        decoder=_stack(decoder) if stacked else tuple(decoder),
        self_memory=np.concatenate([one.self_in[:, inner:] for one in decoder], axis=1),
        cross_memory=np.concatenate(memory, axis=1),
        head=after(
            "decoder.final_layer_norm", head, scale=shape.width**-0.5 if shape.tied else 1.0
        ),
        encoder_bias=np.stack(
            [np.asarray(weights[name], np.float32) for name in _biases(shape, "encoder")]
        ),
        decoder_bias=np.stack(
            [np.asarray(weights[name], np.float32) for name in _biases(shape, "decoder")]
        ),
    )
    typed: Params = jax.tree.map(lambda array: array.astype(jnp.dtype(dtype)), arranged)
    return typed


def _stack(layers: list[Layer]) -> Layer:
    stacked: Layer = jax.tree.map(lambda *arrays: np.stack(arrays), *layers)
    return stacked


def _biases(shape: Shape, stack: str) -> list[str]:
    depth = shape.encoder_layers if stack == "encoder" else shape.decoder_layers
    layers = range(depth if shape.bias_per_layer else 1)
    return [
        f"{stack}.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in layers
    ]


def expected_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every weight's shape, (outputs, inputs) for matrices."""
    width, inner = shape.width, shape.heads * shape.head_width
    expected: dict[str, tuple[int, ...]] = {"shared.weight": (shape.vocabulary, width)}
    for stack, depth in (("encoder", shape.encoder_layers), ("decoder", shape.decoder_layers)):
        expected |= dict.fromkeys(_biases(shape, stack), (shape.buckets, shape.heads))
        expected[f"{stack}.final_layer_norm.weight"] = (width,)
        attentions = ["SelfAttention"] + ["EncDecAttention"] * (stack == "decoder")
        for block in (f"{stack}.block.{i}.layer" for i in range(depth)):
            for place, attention in enumerate(attentions):
                expected[f"{block}.{place}.layer_norm.weight"] = (width,)
                expected |= {
                    f"{block}.{place}.{attention}.{part}.weight": (inner, width) for part in "qkv"
                }
                expected[f"{block}.{place}.{attention}.o.weight"] = (width, inner)
            dense = f"{block}.{len(attentions)}"
            expected[f"{dense}.layer_norm.weight"] = (width,)
            for entry in ("wi_0", "wi_1") if shape.gated else ("wi",):
                expected[f"{dense}.DenseReluDense.{entry}.weight"] = (shape.feed_forward, width)
            expected[f"{dense}.DenseReluDense.wo.weight"] = (width, shape.feed_forward)
    return expected
