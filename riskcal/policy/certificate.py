"""`Certificate`: what was shown about a policy, on which records, by which test."""

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from riskcal import _validate
from riskcal.policy.fields import Frozen, Stop

#: A probability of error that somebody chose.
Level = Annotated[float, Field(gt=0, lt=1)]
#: An option of a procedure: a number, or numbers of candidates or of pairs of them.
Option = int | FiniteFloat | list[int] | list[FiniteFloat] | list[list[FiniteFloat]]


class OfClass(Frozen):
    """Of `riskcal.calibrate_classes`: a policy's class, the budgets of all classes, and that of all requests together."""

    name: str
    budgets: dict[str, FiniteFloat]
    joint: FiniteFloat | None = None


class Asked(Frozen):
    """What a calibration was asked for beyond what its certificate says elsewhere, so that it can be done again.

    ``options`` are those of the procedure (starts, order, weights, transitions, pilot_fraction), ``deltas`` the whole list where
    simultaneous bounds served one, ``largest`` the bounds of budgets, ``of_class`` is of a calibration by class.
    ``candidate_columns`` and ``costs`` were named where the records were read. ``group`` is that of all prompts, where they are
    of one stratum.
    """

    cost: str
    options: dict[str, Option] = Field(default_factory=dict)
    deltas: list[FiniteFloat] | None = None
    largest: dict[str, FiniteFloat] = Field(default_factory=dict)
    candidate_columns: list[str] = Field(default_factory=list)
    costs: list[str] = Field(default_factory=list)
    lower_is_stricter: bool = False
    of_class: OfClass | None = None
    group: str | None = None

    @property
    def whose(self) -> str:
        """The prompts that the certificate is about, in words; nothing where these are all."""
        if self.of_class is not None:
            return f" for prompts of class {self.of_class.name!r}"
        return "" if self.group is None else of_group(self.group)


def of_group(name: str) -> str:
    """The prompts of a stratum, in words."""
    return f" for prompts of group {name!r}"


class Certificate(Frozen):
    """What was shown about a policy, on which records, by which test.

    The statement: with probability at least ``1 - epsilon_spent`` over the draw of the calibration prompts, the expected
    loss of a new prompt is at most ``delta``. It is about the mean over the population the prompts were drawn from, not
    about a single prompt or a stratum. ``weighting`` says which mean: over ``"prompts"``, over ``"clusters"`` of them, each
    counting alike whatever its size, or over the ``"requests"`` of clusters of at most ``max_cluster``; None in certificates
    from before this was said (prompts, or clusters where the records had them).

    Objective ``"agreement"`` (`riskcal.heads.certified`) is about each head that is used, and about all of them together:
    ``delta`` is 1 - agreement, and the loss of a prompt of at most ``max_tokens`` tokens is that of
    `riskcal.heads.request_loss`, whose mean is at most delta exactly where of all tokens that exit a share of at least 1 - delta
    agrees with the full model, along the text on which they were recorded. Where ``layers_given`` is false nobody said after
    which layers the heads stand, and the columns were taken for layers 1 to K.

    With several risks at once ``delta`` has one entry for each objective. ``pvalue`` is None where nothing could be certified
    and the policy is the full model, and where simultaneous bounds were used instead. ``pilot_n`` units, whose ids hash to
    ``pilot_digest``, chose the order of the tests and were not tested. ``stopped`` says by which tests a recording left lower
    thresholds out, None if it did not. ``policy_digest`` names the policy that was certified: a file in which a setting was
    changed since is refused. By ``asked`` `riskcal.verify` does the calibration again; it is None in certificates from before
    it was kept.

    Examples
    --------
    >>> certificate = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1).policy().certificate
    >>> certificate.delta, certificate.epsilon_spent, certificate.n, certificate.test, certificate.weighting
    (0.1, 0.05, 3000, 'betting', 'prompts')
    """

    delta: FiniteFloat | dict[str, FiniteFloat]
    epsilon: Level
    epsilon_spent: Level
    attempt: Annotated[int, Field(ge=1)] | None
    objective: str
    lower: FiniteFloat
    upper: FiniteFloat
    test: str
    procedure: str
    starts: int = Field(ge=1)
    n: int = Field(ge=1, description="independent units: prompts, or clusters of prompts")
    k: int = Field(ge=0, description="candidates tested, the full model not counted")
    pvalue: Annotated[float, Field(ge=0, le=1)] | None
    records_digest: str
    pilot_n: int = Field(default=0, ge=0)
    pilot_digest: str | None = None
    stopped: Stop | None = None
    preregistered: str | None = Field(
        default=None, description="digest of an order, weights and transitions that were given"
    )
    policy_digest: str | None = Field(
        default=None, description="digest of the certified policy's settings"
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="of heads: the most tokens that a prompt can have"
    )
    layers_given: bool | None = Field(
        default=None, description="of heads: whether their layers were said, or counted"
    )
    weighting: Literal["prompts", "clusters", "requests"] | None = Field(
        default=None, description="what the certified mean is taken over"
    )
    max_cluster: int | None = Field(
        default=None, ge=1, description="most requests of a cluster, fixed beforehand"
    )
    asked: Asked | None = None
    versions: dict[str, str]

    @model_validator(mode="after")
    def _as_calibrations_write_them(self) -> Self:
        """Figures that contradict each other were edited: what the certificate says would be true of nothing."""
        rounded = 1 + _validate.TOLERANCE
        if self.epsilon_spent > self.epsilon * rounded:
            raise ValueError(
                f"epsilon_spent {self.epsilon_spent:g} is above epsilon {self.epsilon:g}; keep it as calibration wrote it"
            )
        if self.pvalue is not None and self.pvalue > self.epsilon_spent * rounded:
            raise ValueError(
                f"pvalue {self.pvalue:g} is above epsilon_spent {self.epsilon_spent:g}, at which nothing is certified by it; "
                "keep it as calibration wrote it"
            )
        if isinstance(self.delta, float) and not self.lower < self.delta < self.upper:
            raise ValueError(
                f"delta {self.delta:g} is not between the losses' bounds {self.lower:g} and {self.upper:g}; keep it as "
                "calibration wrote it"
            )
        return self


def ids_digest(ids: Sequence[Any]) -> str:
    """By which a certificate names the units that chose an order."""
    return hashlib.blake2b("\x1f".join(map(str, ids)).encode(), digest_size=16).hexdigest()


def versions() -> dict[str, str]:
    """Of what a certificate's figures were computed with."""
    found = {"python": platform.python_version()}
    for package in ("riskcal-ltt", "numpy", "scipy", "numba"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a checkout that was never installed
            found[package] = "not installed"
    return found
