"""Names for a model's weights and its tokenizer, the same in every framework and file format; policies are bound to them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Fields of `ExitPolicy` that say what it was made for, by the attributes of a decoder that say it of the decoder: strings
#: that tell its weights, its exit classifier's, its exit heads' and its tokenizer from others, the type that it computes in,
#: and a dict of its other settings that change tokens, of JSON's types.
BINDING = {
    "weights": "weights",
    "classifier_weights": "classifier_weights",
    "head_weights": "head_weights",
    "dtype": "dtype",
    "tokenizer": "tokenizer_digest",
    "config": "settings",
}


def binding(decoder: Any, field: str) -> Any:
    """What a decoder says of itself for a field of `BINDING`; None where it says nothing."""
    value = getattr(decoder, BINDING[field], None)
    return value if isinstance(value, dict if field == "config" else str) else None


#: Names of token embeddings, of which a model has one, and names under which it may stand again.
_EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight", "transformer.wte.weight")
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")


#: Numbers that are converted at a time: the whole of a large model in float32 may not fit beside it.
_PART = 1 << 22


def of_weights(named: Iterable[tuple[str, Any]], read: Callable[[Any], Any] = np.asarray) -> str:
    """32 hexadecimal digits: BLAKE2b over names, shapes and values in float32, in the order of the names.

    Parameters
    ----------
    named : iterable of (str, array_like)
        A Hugging Face state dict's entries. Copies of one weight under several names may be there or not: what equals the
        token embedding is left out.
    read : callable
        Makes a part of an entry, one-dimensional, readable by numpy.

    Notes
    -----
    float16 and bfloat16 weights have the fingerprint of their values in float32; weights that were rounded to a shorter
    type are other weights.
    """
    weights = {
        name: values if hasattr(values, "reshape") else np.asarray(values) for name, values in named
    }
    shared = next((weights[name] for name in _EMBEDDINGS if name in weights), None)
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        values = weights[name]
        if name in _COPIES and shared is not None and _equal(values, shared, read):
            continue
        hasher.update(f"{name}\x00{tuple(values.shape) or (1,)}\x00".encode())
        for part in _parts(values, read):
            hasher.update(part.data)
    return hasher.hexdigest()


def _parts(values: Any, read: Callable[[Any], Any]) -> Iterator[NDArray[np.float32]]:
    flat = values.reshape(-1)
    for start in range(0, flat.shape[0], _PART):
        yield np.ascontiguousarray(read(flat[start : start + _PART]), dtype="<f4")


def _equal(one: Any, other: Any, read: Callable[[Any], Any]) -> bool:
    if one is other:
        return True
    parts = zip(_parts(one, read), _parts(other, read), strict=False)
    return tuple(one.shape) == tuple(other.shape) and all(np.array_equal(a, b) for a, b in parts)


def of_heads(heads: Mapping[int, Any]) -> str:
    """The same for exit heads, by the layers and fingerprints of each."""
    told = json.dumps([(layer, heads[layer].fingerprint) for layer in sorted(heads)])
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def of_classifier(weight: Any, bias: Any) -> str:
    """The same for an exit classifier's parameters, d weights and a bias of any shape, as numpy can read them."""
    return of_weights(
        (name, np.ravel(np.asarray(values)))
        for name, values in (("bias", bias), ("weight", weight))
    )


#: Texts that a tokenizer without a file of its own is told from others by, beside its vocabulary.
_PROBES = ("The 2nd risk, controlled?", " a  b\n", "Ünïcode é 你好 🙂", "</s> <pad>")


def of_tokenizer(tokenizer: Any) -> str:
    """32 hexadecimal digits of how a tokenizer reads texts: the same for one file in every framework.

    Truncation and padding are not part of it: decoders read texts whole, and mask padding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = json.loads(backend.to_str())
        told = {
            key: content[key] for key in content if key not in ("version", "truncation", "padding")
        }
    else:
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
        read = [list(map(int, tokenizer(text)["input_ids"])) for text in _PROBES]
        told = {"kind": type(tokenizer).__name__, "vocabulary": vocabulary, "read": read}
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest()
