"""`EarlyExitT5`: the decoder that `riskcal_adapters.torch.EarlyExitT5` is, for JAX.

Requests are checked on the host, padded to the shapes of a compiled program, and decoded by it in one call.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from riskcal import RiskcalError, internal
from riskcal.forbidden import Rule
from riskcal.policy import ExitPolicy
from riskcal.records import Traces
from riskcal_adapters import fingerprint, generation_config, request_checks
from riskcal_adapters.jax import measures, program, weights
from riskcal_adapters.jax.generation import Generation
from riskcal_adapters.jax.given import backend, given, prompts_of, round_rows, round_tokens
from riskcal_adapters.jax.guards import Guards, Machines, hold
from riskcal_adapters.jax.program import Request, Special, Static
from riskcal_adapters.jax.weights import T5, Classifier, Params

#: What this decoder knows no other way of doing than the default.
_DEFAULTS_ONLY = ("pruning", "cache", "max_pending", "emits", "batching", "sampling")


class _Asked(NamedTuple):
    """What policies ask of a padded batch: of a `Request` its own, on the devices, and what else makes the program."""

    oracle: bool  # whether anything asks it
    rules: list[tuple[Rule, ...]]  # forbidden classes of each real row; empty where no row has any
    thresholds: Any
    measures: Any
    lengths: Any


class EarlyExitT5:
    """A T5 that may stop each token's computation early; a batch is decoded by one compiled program.

    A program is compiled for a number of rows, of prompt tokens and of generated tokens, each rounded up: rows to 1, 2, 4, 8
    and multiples of 8, tokens to powers of two from 16. What falls into the same sizes, whatever the policy's thresholds,
    schedule or measure, is decoded without compiling again (the measure ``"oracle"`` apart). The first call of each size
    takes seconds.

    Parameters
    ----------
    model : T5
        From `load_t5` or `from_torch`. The decoder holds rearranged copies of its weights on the devices.
    tokenizer : tokenizers.Tokenizer, optional
        Needed by `encode` and `decode` only. A fast tokenizer of transformers serves as well.
    classifier : object with ``weight`` (d,) and ``bias``, optional
        A linear exit classifier on raw states, for policies with measure ``"classifier"``.
    dtype : {"float32", "bfloat16"}
        What layers compute in, whatever the weights are stored in. float32 is computed in full on every device, without the
        shorter types that GPUs and TPUs would multiply in, as these move confidences. Attention weights, logits and
        confidences are float32 in any case.
    devices : sequence of jax.Device, optional
        Rows are dealt out among them, weights copied to each. Default: JAX's default device.
    stacked : bool, optional
        Whether decoder layers are one array that is indexed at run time, which compiles faster, or a branch each, which runs
        faster on CPUs. Default: branches on CPUs, else stacked. Results are the same.

    Attributes
    ----------
    model
        The model given.
    params
        Its weights as a pytree on the devices.
    n_layers : int
        Decoder layers L; exits are numbered 1..L, and L is the full model.
    weights, classifier_weights, tokenizer_digest, dtype, settings
        By what a policy knows the decoder that it was calibrated on: fingerprints, the type that layers compute in, and what
        else of the model's configs changes tokens. A policy that names another is refused.

    Raises
    ------
    RiskcalError
        If the model is no `T5`, lacks its padding, end or start id, if its generation config asks for anything but greedy
        decoding, if the classifier does not fit it, for another dtype, or for no devices.

    Examples
    --------
    >>> from riskcal_adapters.jax import load_example
    >>> decoder = load_example("g2p")  # is EarlyExitT5(model, tokenizer, classifier=classifier)
    >>> generation = decoder.generate(*decoder.encode(["calm"]), policy=riskcal.ExitPolicy(threshold=0.5))
    >>> decoder.decode(generation.tokens), int(generation.exit_layers.max()) <= decoder.n_layers
    (['K AA M'], True)
    """

    def __init__(
        self,
        model: T5,
        tokenizer: Any = None,
        *,
        classifier: Any = None,
        dtype: str = "float32",
        devices: Sequence[jax.Device] | None = None,
        stacked: bool | None = None,
    ) -> None:
        if not isinstance(model, T5):
            raise RiskcalError(
                f"model: {type(model).__name__} is no riskcal_adapters.jax.T5; make one with load_t5(folder) or "
                "from_torch(model)."
            )
        generation_config.greedy_only(model.generation_config)
        internal.choice(dtype, "dtype", ("float32", "bfloat16"))
        if tokenizer is not None and not hasattr(backend(tokenizer), "encode_batch"):
            raise RiskcalError(
                f"tokenizer: a {type(tokenizer).__name__} has no fast tokenizer (tokenizers.Tokenizer) behind it; leave it out, "
                "and give generate the ids that it makes."
            )
        #: Tokens at most where neither caller nor policy says: the generation config's limit, else 64.
        self.default_length = generation_config.default_length(model.generation_config)
        self.model = model
        self.tokenizer = tokenizer
        self.n_layers = model.shape.decoder_layers
        self._special = generation_config.special_tokens(
            model.generation_config, model.shape.vocabulary
        )
        self.dtype = dtype
        shape = model.shape
        #: What changes tokens beside the weights, which a policy is bound to.
        self.settings = request_checks.settings(
            self._special,
            epsilon=shape.epsilon,
            activation=shape.activation,
            gated=shape.gated,
            reach=shape.reach,
            scaled=shape.tied,
            logits="float32",
        )
        self._measures = [
            name for name in measures.NAMES if name != "classifier" or classifier is not None
        ]
        if devices is not None and not len(devices):
            raise RiskcalError(
                "devices: is empty; give at least one, jax.devices() for all, or leave it out."
            )
        self._mesh = None if devices is None else Mesh(np.array(devices), (program.ROWS,))
        place = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        if stacked is None:
            stacked = (jax.default_backend() if devices is None else devices[0].platform) != "cpu"
        arranged = weights.arrange(model, dtype, stacked=stacked)
        if classifier is not None:
            arranged = arranged._replace(
                classifier=Classifier(
                    *request_checks.classifier_parts(classifier, model.shape.width)
                )
            )
        self.params = jax.device_put(arranged, place)
        ids = (
            np.array(values, dtype=np.int32)
            for values in (self._special.pad, self._special.start, self._special.ends)
        )
        self._framing = jax.device_put(Special(*ids), place)
        self._last_asked: tuple[ExitPolicy, int, int | None, _Asked] | None = None
        self._machines = Machines(functools.cache(self._text), shape.vocabulary)

    @functools.cached_property
    def tokenizer_digest(self) -> str | None:
        """Fingerprint of the tokenizer, None without one."""
        return None if self.tokenizer is None else fingerprint.of_tokenizer(self.tokenizer)

    @functools.cached_property
    def weights(self) -> str:
        """Fingerprint of the model's weights, by which a policy knows the model that it was calibrated on."""
        return fingerprint.of_weights(self.model.weights.items())

    @functools.cached_property
    def classifier_weights(self) -> str | None:
        """Fingerprint of the exit classifier, None without one."""
        own = self.params.classifier
        return None if own is None else fingerprint.of_classifier(own.weight, own.bias)

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        policy: ExitPolicy | Sequence[ExitPolicy] = ExitPolicy.full_model(),
        max_new_tokens: int | None = None,
    ) -> Generation:
        """Decode greedily; each token exits as its row's policy says.

        Parameters
        ----------
        input_ids : (B, S) int
            Prompts, padded on either side.
        attention_mask : (B, S), optional
            1 for real tokens, 0 for padding. Default: all are real, as in Hugging Face's ``generate``.
        policy : ExitPolicy or sequence of B of them
            Default: the full model. Any measure of one exit at a time, threshold, schedule, minimum layer and forbidden
            classes, which may differ from row to row; everything else as it is by default.
        max_new_tokens : int, optional
            Length limit. Default: the one the policy was calibrated with, else the generation config's ``max_new_tokens``, else
            its ``max_length`` less the start token, else 64.

        Returns
        -------
        Generation
            Every row as if it had been generated alone.

        Raises
        ------
        RiskcalError
            Naming the argument and the first offending row: for empty or wholly masked prompts, shapes that do not fit,
            ids out of the vocabulary, an unknown measure, a measure whose classifier is missing, and for policies that ask
            for more than this decoder knows, or were made for other weights, another number of layers or of prompts, or
            another ``max_new_tokens``.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        asked = self._asked(policy, len(tokens), max_new_tokens)
        request = self._request(tokens, mask, asked)
        guards = self._guards(asked, tokens, mask)
        generated = jax.device_get(program.generate(*self._whole(asked.oracle), request, guards))
        rows = len(tokens)
        length = int((generated.exit_layers[:rows] > 0).sum(1).max())
        chosen, exits, *sure = (array[:rows, :length] for array in generated)
        return Generation(chosen.astype(np.int64), exits.astype(np.int64), *sure)

    def trace(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        max_new_tokens: int | None = None,
        prompts: ArrayLike | None = None,
        policy: ExitPolicy = ExitPolicy.full_model(),
    ) -> Traces:
        """Every layer's confidence along the full model's own path, and whether its token is the full model's.

        Parameters
        ----------
        input_ids, attention_mask : (B, S)
            As in `generate`.
        max_new_tokens : int, optional
            Length limit. Default: as in `generate`.
        prompts : (B,) array_like, optional
            Ids of the prompts. Default: 0 to B - 1.
        policy : ExitPolicy
            Its measure and forbidden classes are used; thresholds are not.

        Returns
        -------
        riskcal.Traces
            One row per generated token, the end token included; no confidence where a layer's token is forbidden.
        """
        tokens, mask = self._checked(input_ids, attention_mask)
        limit = request_checks.length(max_new_tokens, [], self.default_length)
        ids = request_checks.prompt_ids(prompts, len(tokens))
        [template] = self._policies(policy, len(tokens))
        asked = self._asked(ExitPolicy.full_model(), len(tokens), limit)
        code = measures.NAMES.index(template.measure)
        codes = np.full(asked.measures.shape, code, dtype=np.int32)
        request = self._request(tokens, mask, asked._replace(measures=codes))
        said, confidence, going = jax.device_get(program.trace(*self._whole(False), request))
        if template.forbidden:
            guard, read = self._machines.guard(template.forbidden), prompts_of(tokens, mask)
            confidence = hold(guard, read, said, going, confidence)
        positions, rows = np.nonzero(going.T)
        return Traces.from_arrays(
            prompt=ids[rows],
            position=positions,
            confidence=confidence[rows, positions],
            agrees=said[rows, positions] == said[rows, positions, -1:],
        )

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids and attention mask of texts, each (B, S)."""
        if isinstance(texts, str) or not len(texts):
            raise RiskcalError("texts: give a list of at least one string.")
        encoded = self._reader.encode_batch(list(texts))
        width = max(len(one.ids) for one in encoded)
        ids = np.full((len(encoded), width), self._special.pad, dtype=np.int32)
        mask = np.zeros_like(ids)
        for row, one in enumerate(encoded):
            ids[row, : len(one.ids)], mask[row, : len(one.ids)] = one.ids, one.attention_mask
        return ids, mask

    def decode(self, tokens: ArrayLike) -> list[str]:
        """One text per row of token ids (B, T), without special tokens."""
        texts: list[str] = self._need_tokenizer().decode_batch(
            np.asarray(tokens).tolist(), skip_special_tokens=True
        )
        return texts

    def _text(self, token: int) -> str:
        """Of a token where it follows another, with its space; none of a special token, or without a tokenizer."""
        if self.tokenizer is None:
            return ""
        pair = [[token], [token, token]]
        once, twice = self._need_tokenizer().decode_batch(pair, skip_special_tokens=True)
        return str(twice[len(once) :])

    def _need_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise RiskcalError(
                "tokenizer: none was given; make the decoder with EarlyExitT5(model, tokenizer)."
            )
        return backend(self.tokenizer)

    @functools.cached_property
    def _reader(self) -> Any:
        """The tokenizer without the truncation and padding that its file, or whoever used it last, asked of it."""
        own = self._need_tokenizer()
        whole = type(own).from_str(own.to_str())
        whole.no_truncation()
        whole.no_padding()
        return whole

    def _checked(
        self, input_ids: Any, attention_mask: Any
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        tokens = given(input_ids, "input_ids")
        real = None if attention_mask is None else given(attention_mask, "attention_mask")
        return tokens, request_checks.prompt_mask(
            tokens, real, self._special, self.model.shape.vocabulary
        )

    def _policies(self, policy: Any, rows: int) -> list[ExitPolicy]:
        asked = request_checks.policies(policy, rows, self._measures)
        request_checks.defaults_only(asked, _DEFAULTS_ONLY)
        request_checks.same_model(asked, self)
        request_checks.texts_known(asked, self.tokenizer)
        return asked

    def _guards(
        self, asked: _Asked, tokens: NDArray[Any], mask: NDArray[np.bool_]
    ) -> Guards | None:
        if not asked.rules:
            return None
        return self._machines.guards(asked.rules, prompts_of(tokens, mask), len(asked.lengths))

    def _asked(
        self, policy: ExitPolicy | Sequence[ExitPolicy], rows: int, max_new_tokens: int | None
    ) -> _Asked:
        # One policy serves many prompts, and none ever changes: what the last one says is kept.
        last = self._last_asked
        if last is not None and last[0] is policy and last[1:3] == (rows, max_new_tokens):
            return last[3]
        asked = self._policies(policy, rows)
        limit = request_checks.length(max_new_tokens, asked, self.default_length)
        batch = round_rows(rows, 1 if self._mesh is None else self._mesh.size)
        thresholds = np.full((batch, round_tokens(limit), self.n_layers), np.inf, dtype=np.float32)
        thresholds[:rows, :limit] = request_checks.exit_thresholds(
            asked, rows, self.n_layers, limit
        ).transpose(2, 0, 1)
        codes = np.zeros(batch, dtype=np.int32)
        # a policy that never exits is the full model, whatever it would have looked at
        codes[:rows] = [
            0 if one.is_full_model else measures.NAMES.index(one.measure) for one in asked
        ]
        lengths = np.zeros(batch, dtype=np.int32)
        lengths[:rows] = limit
        place = (
            None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec(program.ROWS))
        )
        oracle = bool((codes == measures.ORACLE).any())
        rules = [() if one.is_full_model else one.forbidden for one in asked]
        rules = rules * (rows // len(rules)) if any(rules) else []
        found = _Asked(oracle, rules, *jax.device_put((thresholds, codes, lengths), place))
        if isinstance(policy, ExitPolicy):
            self._last_asked = policy, rows, max_new_tokens, found
        return found

    def _request(self, tokens: NDArray[Any], mask: NDArray[np.bool_], asked: _Asked) -> Request:
        rows, width = tokens.shape
        ids = np.full((len(asked.lengths), round_tokens(width)), self._special.pad, dtype=np.int32)
        ids[:rows, :width] = tokens
        real = np.zeros(ids.shape, dtype=bool)
        real[:rows, :width] = mask
        # rows that only fill the batch; without a token to attend to they would be NaN
        real[rows:, 0] = True
        return Request(ids, real, asked.thresholds, asked.measures, asked.lengths)

    def _whole(self, oracle: bool) -> tuple[Static, Params, Special]:
        return Static(self.model.shape, oracle, self._mesh), self.params, self._framing
