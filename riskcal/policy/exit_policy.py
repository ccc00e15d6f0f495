"""`ExitPolicy`: the one thing that changes which tokens an early-exit decoder emits, with the certificate it was given."""

import hashlib
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field, model_validator

from riskcal import _showing, _validate
from riskcal._validate import RiskcalError
from riskcal.policy import sentences
from riskcal.policy.certificate import Certificate
from riskcal.policy.columns import (
    DEFAULTS,
    FIELDS_ELSEWHERE,
    from_columns,
    refuse_unrecorded_schedule,
    to_columns,
)
from riskcal.policy.fields import (
    Contrast,
    Coordinate,
    RiskLimit,
    Sampling,
    Setting,
    Threshold,
    TokenClasses,
    calibrated_fields,
)
from riskcal.policy.pruning import Pruning
from riskcal.policy.saved import Saved
from riskcal.policy.schedules import Constant, Decaying


class ExitPolicy(Saved):
    """When a decoder may stop before its last layer.

    Parameters
    ----------
    threshold : float
        Exit at the first layer whose confidence is at least this (after the schedule). ``inf``, in JSON ``"full"``, is the
        full model; no finite number is. Default: the full model.
    thresholds : dict of int to float, optional
        One threshold per exit layer (1-based) instead; layers that are not listed never exit. One for the last layer is
        for a head that stands there beside the model's final one; without such a head it changes nothing.
    learned : riskcal.policy.RiskLimit, optional
        The learned risk, and its largest value, that the ``thresholds`` stand for.
    measure : str, optional
        Name of the confidence measure, as the adapter knows it. Like ``cache`` and ``batching`` it is None where nobody named
        it: a policy written by hand then means ``"softmax"``, ``"project"`` and ``"diverge"``; a certified one says no more
        than its records did, and a decoder refuses it (see `named`).
    schedule : Constant or Decaying
        How the threshold depends on the token's position. Decay is for measures from 0 to 1.
    min_layer : int
        No exit before this layer.
    lower_is_stricter : bool
        Whether an exit is where the measure is at most the threshold instead, as with an entropy. For the system that made
        the records to read; riskcal's decoders exit where a confidence is high, and refuse such a policy. The full model is
        ``inf`` all the same.
    pruning : Pruning, optional
        A head that looks at part of the vocabulary after ``min_layer``.
    contrast : Contrast
        Of a contrastive measure; other measures do not look at it.
    cache : {"project", "deferred", "recompute", "copy", "first"}, optional
        What later tokens see of a token in the layers that it skipped. ``"project"``: the keys and values that these layers
        make of the state at its exit. ``"deferred"``: exact ones; the layers are made up for, all positions at once, when a
        later token runs them. ``"recompute"``: exact ones as well, by running all tokens since the last full pass again.
        Two that lose quality and are there to show it: ``"copy"``, the exit layer's own keys and values; ``"first"``,
        projections of the state after the first layer.
    max_pending : int, optional
        With exact caches: after so many early exits in a row the next token runs all layers.
    emits : {"exit", "last"}
        ``"last"`` emits the last layer's token although the cache holds the exit's states: it tells what exits cost through
        the cache from what they cost through the token. It saves nothing.
    batching : {"diverge", "regroup", "deepest"}, optional
        ``"diverge"``: every row as if alone; rows that exited ride along. ``"regroup"``: the same tokens, only rows that go
        deeper are computed. ``"deepest"``: the whole batch exits where its last row does, so that tokens depend on the batch.
    sampling : Sampling, optional
        Default: greedy.
    forbidden : list of riskcal.serving.Inside, Tokens or Pattern, optional
        Classes of tokens that never leave early, whatever their confidence: a row whose candidate is in one, after the text
        that was generated so far, goes deeper. Default: none.
    max_new_tokens : int, optional
        Length limit that the policy was calibrated with.
    n_layers : int, optional
        Decoder layers of the model that the policy was calibrated on.
    weights : str, optional
        Fingerprint of that model's weights, as its decoder gives it. A decoder refuses a policy made for other weights.
    classifier_weights : str, optional
        The same of the exit classifier that the measure ``"classifier"`` reads.
    head_weights : str, optional
        The same of the decoder's exit heads, whose confidences the thresholds are compared with.
    dtype : str, optional
        The type that the decoder's layers computed in, ``"float32"`` for instance; others round confidences and tokens
        elsewhere. A policy that names weights and no type was made before types were named, and is one of float32.
    tokenizer : str, optional
        Fingerprint of the tokenizer that made the prompts' ids.
    config : dict, optional
        The decoder's settings beside its weights that change tokens, by the names of Hugging Face's configs: end, padding
        and start ids, the norms' epsilon, activation and so on. A decoder that has
        others refuses the policy, as where its weights, type or tokenizer are others.
    coordinates : dict of str to number, text or bool, optional
        Whatever else told the calibrated candidates apart, by the names of the records: a cascade's further thresholds, a
        variant. For the system that made the records to read; riskcal's decoders refuse a policy that has any.
    certificate : Certificate, optional
        What calibration showed; None for a policy written by hand.

    Raises
    ------
    RiskcalError
        For unknown fields, a NaN threshold, both ``threshold`` and ``thresholds``, or settings that do not fit together.

    Examples
    --------
    >>> policy = riskcal.ExitPolicy(threshold=0.8, measure="softmax", min_layer=2)
    >>> policy.save("policy.json")
    >>> riskcal.ExitPolicy.load("policy.json") == policy
    True
    >>> riskcal.ExitPolicy().is_full_model  # the default stops nowhere
    True
    """

    called: ClassVar[str] = "policy"

    schema_version: Literal[1] = 1
    threshold: Threshold = math.inf
    thresholds: dict[Annotated[int, Field(ge=1)], Threshold] | None = None
    learned: RiskLimit | None = None
    measure: str | None = Field(default=None, min_length=1)
    schedule: Annotated[Constant | Decaying, Field(discriminator="kind")] = Constant()
    min_layer: int = Field(default=1, ge=1)
    lower_is_stricter: bool = False
    pruning: Pruning | None = None
    contrast: Contrast = Contrast()
    cache: Literal["project", "deferred", "recompute", "copy", "first"] | None = None
    max_pending: int | None = Field(default=None, ge=1)
    emits: Literal["exit", "last"] = "exit"
    batching: Literal["diverge", "regroup", "deepest"] | None = None
    sampling: Sampling | None = None
    forbidden: TokenClasses = ()
    max_new_tokens: int | None = Field(default=None, ge=1)
    n_layers: int | None = Field(default=None, ge=1)
    weights: str | None = Field(default=None, min_length=1)
    classifier_weights: str | None = Field(default=None, min_length=1)
    head_weights: str | None = Field(default=None, min_length=1)
    dtype: str | None = Field(default=None, min_length=1)
    tokenizer: str | None = Field(default=None, min_length=1)
    config: dict[str, Setting] | None = None
    coordinates: dict[Annotated[str, Field(min_length=1)], Coordinate] | None = None
    certificate: Certificate | None = None

    @model_validator(mode="after")
    def _one_kind_of_threshold(self) -> Self:
        if self.thresholds is not None and not math.isinf(self.threshold):
            raise ValueError("give threshold= or thresholds= (one per exit layer), not both")
        if self.learned is not None and not self.thresholds:
            raise ValueError("learned: says what thresholds stand for; give thresholds= too")
        return self

    @model_validator(mode="after")
    def _settings_that_fit(self) -> Self:
        if self.max_pending is not None and self.cache not in ("deferred", "recompute"):
            raise ValueError(
                f"max_pending: means nothing to cache {self.cache!r}; name cache 'deferred' or 'recompute' too, or leave it out"
            )
        if self.contrast.plausible == "kept" and self.pruning is None:
            raise ValueError("contrast: plausible 'kept' is what pruning keeps; give pruning= too")
        if self.batching == "regroup" and self.cache not in (None, "project"):
            raise ValueError(f"batching: 'regroup' works with cache 'project', not {self.cache!r}")
        return self

    @model_validator(mode="after")
    def _certified_as_it_is(self) -> Self:
        if self.certificate is not None and self.certificate.policy_digest not in (
            None,
            self.digest(),
        ):
            raise ValueError(
                "certificate: was issued for other settings than these; calibrate what you run, or leave the certificate out"
            )
        return self

    @classmethod
    def full_model(cls) -> Self:
        """The policy that never exits early."""
        return cls()

    @classmethod
    def static(cls, layer: int, **fields: Any) -> Self:
        """The policy under which every token exits at one layer; further fields as for any policy."""
        return cls(thresholds={layer: -float(np.finfo(np.float32).max)}, **fields)

    @property
    def is_full_model(self) -> bool:
        """Whether all thresholds are infinite, so that no token can exit before the last layer of any model."""
        needed = self.thresholds.values() if self.thresholds is not None else [self.threshold]
        return all(math.isinf(value) for value in needed)

    def digest(self) -> str:
        """BLAKE2b of all settings that change tokens, 32 hexadecimal digits; the certificate is not among them."""
        settings = self.model_dump(mode="json", exclude={"certificate"}, exclude_defaults=True)
        for name, default in DEFAULTS.items():  # not the fields' own, which are None
            if settings.get(name) == default:
                del settings[name]
        if self.batching == "regroup":  # the tokens of "diverge"
            del settings["batching"]
        unnamed = [name for name in DEFAULTS if getattr(self, name) is None]
        if unnamed and not self.is_full_model:
            settings["unnamed"] = unnamed
        return hashlib.blake2b(
            json.dumps(settings, sort_keys=True).encode(), digest_size=16
        ).hexdigest()

    def named(self) -> Self:
        """The policy as a decoder runs it: with ``measure``, ``cache`` and ``batching``.

        Raises
        ------
        RiskcalError
            If a certificate vouches for a policy that does not name one of them, or that has ``coordinates`` or the other
            direction (``lower_is_stricter``): what the decoder
            would take instead was not certified. The full model needs none.
        """
        open_ = [name for name in DEFAULTS if getattr(self, name) is None]
        if open_ and self.certificate is not None and not self.is_full_model:
            shell = " ".join(f"--{name} {DEFAULTS[name]}" for name in open_)
            raise RiskcalError(
                f"{open_[0]}: the certified policy does not name it, as its records did not. If they were made with one that "
                f"this decoder has, say so where the policy is made (riskcal calibrate {shell}): calibration.policy("
                + ", ".join(f"{name}={DEFAULTS[name]!r}" for name in open_)
                + ")."
            )
        self._refuse_lower()
        if self.coordinates and not self.is_full_model:
            raise RiskcalError(
                f"coordinates: {next(iter(self.coordinates))!r} is no setting of this decoder; the policy belongs to the system "
                "whose records it was calibrated on."
            )
        return self.model_copy(update={name: DEFAULTS[name] for name in open_}) if open_ else self

    def _refuse_lower(self) -> None:
        if self.lower_is_stricter and not self.is_full_model:
            raise RiskcalError(
                "lower_is_stricter: this decoder exits where a confidence is at least the threshold, and the policy where a "
                "value is at most that; it belongs to the system whose records it was calibrated on."
            )

    def certified(self, certificate: Certificate) -> Self:
        """The policy with a certificate that was issued for it."""
        named = certificate.model_copy(update={"policy_digest": self.digest()})
        return self.model_copy(update={"certificate": named})

    def other_fields(self) -> str:
        """The fields that have no column of their own in a table of runs, as its column ``policy`` holds them: JSON.

        What it leaves out had its default: a table with that column names everything.
        """
        usual = {name for name, default in DEFAULTS.items() if getattr(self, name) == default}
        return self.model_dump_json(exclude=FIELDS_ELSEWHERE | usual, exclude_defaults=True)

    def to_columns(self) -> dict[str, Any]:
        """The policy as a row's columns in a table of runs: its threshold, and all that such a table says of a candidate.

        Raises
        ------
        RiskcalError
            For a policy with ``thresholds`` that are not those of a learned risk: a column holds one.
        """
        return to_columns(self)

    @classmethod
    def from_columns(
        cls,
        table: pd.DataFrame,
        chosen: pd.Series | None,
        beside: Mapping[str, Any] = MappingProxyType({}),
        **fields: Any,
    ) -> Self:
        """The policy that a candidate ran with, from its columns in a table of runs.

        Parameters
        ----------
        table : DataFrame
            The candidates' columns, one row each: ``threshold`` and every further coordinate, nothing else.
        chosen : Series or None
            The row of one candidate; None for the full model.
        beside : mapping
            Fields that the records hold beside the table, unless it has them.
        **fields
            What neither says.

        Raises
        ------
        RiskcalError
            If a field that is given is not what was recorded, or a column cannot fill the field of its name.
        """
        recorded = from_columns(cls, table, chosen, fields.get("schedule"))
        if chosen is not None:  # the full model has neither direction nor schedule
            if "schedule" in beside and "schedule" not in recorded:
                refuse_unrecorded_schedule(fields.get("schedule"))
            recorded = {**beside, **recorded}
        return cls(**calibrated_fields(recorded, fields))

    def exit_thresholds(
        self, n_layers: int, length: int, *, own_last: bool = False
    ) -> NDArray[np.float32]:
        """The confidence needed to exit, for every position and layer: all that a decoder has to know of a policy.

        Parameters
        ----------
        n_layers : int
            Decoder layers L.
        length : int
            Positions T, counted from the first generated token.
        own_last : bool
            Whether the last layer has a head of its own, which speaks before the model's final one does. The final one is then
            an exit more.

        Returns
        -------
        (T, L) float32, or (T, L + 1) with ``own_last``
            ``inf`` where no exit is allowed, ``-inf`` at the last one, the full model, which always accepts. Rounded up to
            float32, so that comparing float32 confidences with it decides exactly as the float64 threshold would.

        Raises
        ------
        RiskcalError
            If ``min_layer`` or a layer of ``thresholds`` is not one of the model, or the policy was made for another depth.
        """
        self._refuse_lower()
        _validate.count(n_layers, "n_layers", least=1)
        if self.n_layers not in (None, n_layers):
            raise RiskcalError(
                f"n_layers: the policy was made for {self.n_layers} layers, the model has {n_layers}."
            )
        _validate.count(length, "length", least=0)
        if self.min_layer > n_layers:
            raise RiskcalError(
                f"min_layer: {self.min_layer} exceeds the model's {n_layers} layers."
            )
        per_layer = np.full(n_layers, self.threshold)
        if self.thresholds is not None:
            foreign = [layer for layer in self.thresholds if layer > n_layers]
            if foreign:
                raise RiskcalError(
                    f"thresholds: layer {foreign[0]} exceeds the model's {n_layers} layers."
                )
            per_layer[[layer - 1 for layer in self.thresholds]] = list(self.thresholds.values())
        per_layer[: self.min_layer - 1] = math.inf
        exact = self.schedule.local_threshold(per_layer[None, :], np.arange(length)[:, None])
        # beyond float32 is inf, which no float32 confidence but inf reaches either
        with np.errstate(over="ignore"):
            rounded = np.array(exact, dtype=np.float32)
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(math.inf)), rounded)
        accepting = np.full((length, 1), -math.inf)
        rounded = np.hstack([rounded if own_last else rounded[:, :-1], accepting])
        return rounded.astype(np.float32)

    def plot(self, ax: Any = None) -> Any:
        """The confidence needed to exit: by position, or by layer where each has its own; returns the matplotlib axes.

        By position up to ``max_new_tokens``, else to where a decay is complete.
        """
        from riskcal import plots

        if self.thresholds is not None:
            return plots.needed_confidence(self.thresholds, ax=ax)
        decay = self.schedule.max_length if isinstance(self.schedule, Decaying) else 32
        length = self.max_new_tokens or decay
        return plots.needed_confidence(
            self.schedule.local_threshold(self.threshold, np.arange(length)), ax=ax
        )

    def __str__(self) -> str:
        table = self._told()
        return sentences.of_policy(self) + ("\n" + _showing.text(table) if len(table) else "")

    def _repr_html_(self) -> str:
        table = self._told()
        said = _showing.paragraph(sentences.of_policy(self))
        return said + (_showing.html(table) if len(table) else "")

    def _told(self) -> pd.DataFrame:
        """The settings that are not as they are by default."""
        told = self.model_dump(exclude={"certificate"}, exclude_defaults=True)
        whole = self.model_dump(mode="json")  # also what is as by default within a schedule
        return pd.DataFrame(
            {"setting": list(told), "value": [sentences.setting(whole[name]) for name in told]}
        )
