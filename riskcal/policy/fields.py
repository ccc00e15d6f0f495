"""Types of a policy's fields, and the smaller objects that stand in one: `Contrast`, `Sampling`, `RiskLimit`, `Stop`."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    PlainSerializer,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.forbidden import Inside, Pattern, Tokens


def _full_to_inf(value: Any) -> Any:
    return math.inf if isinstance(value, str) and value == "full" else value


def _not_nan(value: Any) -> Any:
    number = _full_to_inf(value)
    if isinstance(number, bool) or not _validate.is_number(number):
        raise ValueError(f"{_validate.shown(value)} is neither a number nor 'full'")
    try:
        found = float(number)
    except OverflowError:
        raise ValueError(
            f"{_validate.shown(value)} is beyond all floats; give inf for the full model"
        ) from None
    if math.isnan(found) or found == -math.inf:
        raise ValueError(
            f"{value} is no threshold; give a number, or inf (in JSON: 'full') for the full model"
        )
    return found


Threshold = Annotated[
    float,
    BeforeValidator(_not_nan),
    PlainSerializer(lambda value: "full" if math.isinf(value) else value, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"const": "full"}]}),
]

#: A setting of a model's config, as JSON has it.
Setting = bool | int | FiniteFloat | str | list[int] | None

#: What a candidate may be told apart by that has no field of its own.
Coordinate = bool | int | FiniteFloat | str


def _kind(value: Any) -> str | None:
    """Of a class of tokens; where what equals its default is left out, the field that only this kind has tells it."""
    if not isinstance(value, dict):
        return getattr(value, "kind", None)
    own = {"context": "inside", "ids": "tokens", "pattern": "pattern"}
    return value.get("kind") or next((own[name] for name in own if name in value), None)


TokenClass = Annotated[
    Annotated[Inside, Tag("inside")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Pattern, Tag("pattern")],
    Discriminator(
        _kind,
        custom_error_type="token_class",
        custom_error_message="is no class of tokens; give riskcal.serving.Inside, Tokens or Pattern",
    ),
]


def _listed(value: Any) -> Any:
    if isinstance(value, str | dict) or not isinstance(value, Iterable):
        raise ValueError(f"{_validate.shown(value)} is no list of classes of tokens; put it in one")
    return tuple(value)


TokenClasses = Annotated[tuple[TokenClass, ...], BeforeValidator(_listed)]


class Frozen(BaseModel):
    """A frozen object that refuses fields it does not know, by a `RiskcalError`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise refusal(type(self).__name__, error) from None

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """What is not as it is by default: of forty fields few say anything."""
        for name, value in super().__repr_args__():
            field = None if name is None else type(self).model_fields.get(name)
            if (
                field is None
                or field.is_required()
                or value != field.get_default(call_default_factory=True)
            ):
                yield name, value


class Contrast(Frozen):
    """What a contrastive measure compares: a layer's distribution with an earlier, less able layer's.

    Parameters
    ----------
    alpha : float
        In (0, 1]: tokens of at least ``alpha`` times the largest probability are plausible and contrasted.
    alpha_decay : float
        Rate r, at least 0: with r > 0 the share at layer i is ``alpha / (1 + r i) * (1 - c)``, c the layer's softmax margin;
        surer layers contrast more tokens. 0 keeps ``alpha`` constant.
    plausible : {"alpha", "kept"}
        ``"kept"``: all tokens that a pruned head keeps are plausible instead (the mixed form; needs ``pruning``).

    Examples
    --------
    >>> contrast = riskcal.Contrast(alpha=0.2)
    >>> riskcal.ExitPolicy(threshold=0.5, measure="contrastive", contrast=contrast).contrast.alpha
    0.2
    """

    alpha: FiniteFloat = Field(default=0.1, gt=0, le=1)
    alpha_decay: FiniteFloat = Field(default=0.0, ge=0)
    plausible: Literal["alpha", "kept"] = "alpha"


class Sampling(Frozen):
    """Tokens drawn at random instead of the likeliest.

    The noise of a token is a function of ``seed``, the prompt's text and the position alone. So two policies that differ in
    where they exit draw with the same random numbers, and a loss between them is an expectation over prompts and noise.

    Parameters
    ----------
    temperature : float
        Divides the logits, above 0. Confidences are those of the logits as they are.
    top_p : float
        In (0, 1]: only the likeliest tokens whose probabilities add up to this are drawn.
    seed : int
        At least 0.

    Examples
    --------
    >>> sampling = riskcal.Sampling(temperature=0.7, top_p=0.9, seed=1)
    >>> riskcal.ExitPolicy(threshold=0.8, sampling=sampling).sampling.top_p
    0.9
    """

    temperature: FiniteFloat = Field(default=1.0, gt=0)
    top_p: FiniteFloat = Field(default=1.0, gt=0, le=1)
    seed: int = Field(default=0, ge=0)


class RiskLimit(Frozen):
    """The learned risk that stands behind a policy's thresholds: a token leaves where its risk is at most ``max_risk``.

    Each layer's threshold is the least confidence of such a risk, by the maps of a `riskcal.heads.LearnedRisk`.

    Parameters
    ----------
    max_risk : float
        In (0, 1).
    risk : str
        Digest of these maps.
    fit_fraction : float
        In (0, 1): the share of all prompts, by a hash of their ids, that the maps were fitted on. `riskcal.calibrate` refuses
        them.

    Examples
    --------
    >>> learned = riskcal.heads.learn_risk(riskcal.load_example("g2p-traces"), fit_fraction=0.3)
    >>> limit = learned.policy(0.1).learned
    >>> limit.max_risk, limit.fit_fraction
    (0.1, 0.3)
    """

    max_risk: FiniteFloat = Field(gt=0, lt=1)
    risk: str = Field(min_length=1)
    fit_fraction: FiniteFloat = Field(gt=0, lt=1)


class Stop(Frozen):
    """When a recording may leave the lower thresholds out: once fixed-sequence testing has failed.

    The thresholds are then tested from the highest down while they are recorded. A fixed sequence at these settings never
    gets below its first failure, so that nothing is lost; at other settings, or over other losses of the same runs, it ends
    at the lowest recorded threshold at the latest, so that nothing more is certified than on the whole grid.

    Parameters
    ----------
    delta : float
        Tolerated expected loss.
    epsilon : float
        In (0, 1): the probability that a false certificate is issued.
    objective : {"textual", "risk", "risk_clipped"}
        Which loss is tested.
    test : str
        As in `riskcal.calibrate`.

    Raises
    ------
    RiskcalError
        For a delta that is not strictly between the bounds of the objective's loss; `riskcal_adapters.record` refuses a test
        that `riskcal.calibrate` does not have.

    Examples
    --------
    >>> stop = riskcal.Stop(delta=0.1, objective="risk")
    >>> stop.epsilon, stop.test  # for riskcal_adapters.record(..., stop=stop)
    (0.05, 'betting')
    """

    delta: FiniteFloat
    epsilon: FiniteFloat = Field(default=0.05, gt=0, lt=1)
    objective: Literal["textual", "risk", "risk_clipped"] = "textual"
    test: str = "betting"

    @model_validator(mode="after")
    def _delta_of_its_objective(self) -> Self:
        _validate.tolerance(self.delta, -1.0 if self.objective == "risk" else 0.0, 1.0)
        return self


def calibrated_fields(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's fields: what is ``known`` of what was calibrated, and what was ``given`` besides.

    Raises
    ------
    RiskcalError
        If a field is given that calibration finds, or that is known to be another.
    """
    for name in ("threshold", "thresholds", "learned", "coordinates", "certificate"):
        if name in given:
            raise RiskcalError(
                f"{name}: is what was calibrated; leave it out, or write an ExitPolicy of your own."
            )
    for name, value in known.items():
        wanted = given.get(name, value)
        if (tuple(wanted) if isinstance(wanted, list) else wanted) != value:
            raise RiskcalError(f"{name}: {wanted!r} is not the recorded {value!r}; leave it out.")
    return {**known, **given}


def refusal(name: str, error: ValidationError) -> RiskcalError:
    """Pydantic's first complaint, in one line that names the field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RiskcalError):  # from a check that names its own field
        return RiskcalError(f"{field}.{cause}".removeprefix("."))
    field = field or name
    unknown = dict.fromkeys(
        ("extra_forbidden", "unexpected_keyword_argument"), "is not a field; remove it"
    )
    return RiskcalError(f"{field}: {unknown.get(first['type'], cause or first['msg'])}")
