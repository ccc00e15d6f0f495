"""`check_policy`: whether a policy was certified for the model that is to serve it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from riskcal.policy import ExitPolicy
from riskcal.policy.fields import Setting


@dataclass(frozen=True)
class ModelFacts:
    """What serves: fingerprints as the decoder gives them, and how the request is decoded. None: not known.

    Attributes
    ----------
    weights, tokenizer, classifier_weights, head_weights : str or None
        Fingerprints.
    dtype : str or None
        The type that layers compute in.
    n_layers : int or None
        Decoder layers.
    config : mapping
        The settings that change tokens, by the names of Hugging Face's configs.
    temperature : float
        0 is greedy.
    top_p : float
        In (0, 1]; 1 where all tokens may be drawn.
    max_new_tokens : int or None
        The request's length limit.

    Examples
    --------
    >>> facts = riskcal.serving.ModelFacts(weights="ff9966", dtype="float32", n_layers=8)
    >>> riskcal.serving.check_policy(riskcal.ExitPolicy(threshold=0.8, weights="ff9966", n_layers=8), facts)
    ()
    """

    weights: str | None = None
    tokenizer: str | None = None
    classifier_weights: str | None = None
    head_weights: str | None = None
    dtype: str | None = None
    n_layers: int | None = None
    config: Mapping[str, Setting] = field(default_factory=dict)
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int | None = None


def check_policy(policy: ExitPolicy, facts: ModelFacts) -> tuple[str, ...]:
    """Why a policy must not be served here: one reason for each thing that differs, none if it may be.

    What the policy names and the facts do not is a reason too; what the policy does not name is not compared, except that
    a policy without ``sampling`` is one of greedy decoding, and one that names weights but no type is one of float32. The
    full model needs no certificate, so that nothing speaks against it.

    Returns
    -------
    tuple of str
        To be logged as event ``riskcal.policy.refused``; the request is then served at full depth.

    Examples
    --------
    >>> policy = riskcal.ExitPolicy(threshold=0.8, weights="ff9966", n_layers=8)
    >>> facts = riskcal.serving.ModelFacts(weights="3b21aa", dtype="float32", n_layers=8)
    >>> for reason in riskcal.serving.check_policy(policy, facts):
    ...     print(reason)
    weights: the policy was made for 'ff9966', here it is '3b21aa'
    """
    if policy.is_full_model:
        return ()
    dtype = policy.dtype or ("float32" if policy.weights is not None else None)
    expected = {
        "weights": policy.weights,
        "tokenizer": policy.tokenizer,
        "classifier_weights": policy.classifier_weights,
        "head_weights": policy.head_weights,
        "dtype": dtype,
        "n_layers": policy.n_layers,
        "max_new_tokens": policy.max_new_tokens,
    }
    pairs: list[tuple[str, Any, Any]] = [
        (n, want, getattr(facts, n)) for n, want in expected.items() if want is not None
    ]
    absent = "not known"
    pairs += [
        (f"config.{name}", want, facts.config.get(name, absent))
        for name, want in (policy.config or {}).items()
    ]
    pairs.append(("lower_is_stricter", policy.lower_is_stricter, False))
    pairs += [
        (f"coordinates.{name}", want, absent) for name, want in (policy.coordinates or {}).items()
    ]
    sampling = policy.sampling
    pairs.append(("temperature", sampling.temperature if sampling else 0.0, facts.temperature))
    if sampling is not None:
        pairs.append(("top_p", sampling.top_p, facts.top_p))
    return tuple(
        f"{name}: the policy was made for {want!r}, here it is {absent if have is None else have!r}"
        for name, want, have in pairs
        if have != want
    )
