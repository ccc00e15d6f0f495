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
    ``cost_named`` says whether the cost was asked for by its name; None in certificates from before this was said.
    ``candidate_columns`` and ``costs`` were named where the records were read. ``group`` is that of all prompts, where they are
    of one stratum.
    """

    cost: str
    cost_named: bool | None = None
    options: dict[str, Option] = Field(default_factory=dict)
    deltas: list[FiniteFloat] | None = None
    largest: dict[str, FiniteFloat] = Field(default_factory=dict)
    candidate_columns: list[str] = Field(default_factory=list)
    costs: list[str] = Field(default_factory=list)
    lower_is_stricter: bool = False
    of_class: OfClass | None = None
    group: str | None = None

    @property
    def wanted_cost(self) -> str | None:
        """The cost that was asked for by its name; None for the default. ``"layers"`` was taken for it before that was said."""
        by_default = self.cost == "layers" if self.cost_named is None else not self.cost_named
        return None if by_default else self.cost

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
    about a single prompt or a stratum.

    Objective ``"agreement"`` (`riskcal.heads.certified`) is about each head that is used, and about all of them together:
    ``delta`` is 1 - agreement, and the loss of a prompt of at most ``max_tokens`` tokens is that of
    `riskcal.heads.request_loss`, whose mean is at most delta exactly where of all tokens that exit a share of at least 1 - delta
    agrees with the full model, along the text on which they were recorded.

    Attributes
    ----------
    delta : float or dict
        The tolerated expected loss; with several risks at once one entry for each.
    epsilon : float
        The probability of error that was asked for: of all planned attempts together, or of all classes.
    epsilon_spent : float
        What of it this certificate may fail with: epsilon, or an attempt's or a class's part.
    attempt : int or None
        Which of a planned series; attempt j spends ``6 epsilon / (pi j)^2``. None: the only one, with all of epsilon.
    objective : str
        Names of what is controlled, joined by ``+``.
    lower, upper : float
        The losses' known bounds; with several risks the widest of those that are no costs.
    test, procedure : str
        Names of the test of one candidate, and of the procedure over all.
    starts : int
        Of a fixed sequence, from how many places it began; otherwise 1.
    n : int
        Independent units that were tested: prompts, or clusters of prompts.
    k : int
        Candidates that were tested, the full model not counted.
    pvalue : float or None
        Of the policy that was chosen. None where nothing could be certified and the policy is the full model, and where
        simultaneous bounds were used instead.
    records_digest : str
        Fingerprint of the records, by which `riskcal.verify` tells whether it was given the same.
    pilot_n : int
        Units that chose the order of the tests and were not tested.
    pilot_digest : str or None
        What their ids hash to.
    stopped : Stop or None
        By which tests a recording left lower thresholds out, None if it did not.
    preregistered : str or None
        Digest of an order, weights and transitions that were given.
    policy_digest : str or None
        Of the certified policy's settings: a file in which one was changed since is refused.
    max_tokens : int or None
        Of heads: the most tokens that a prompt can have.
    layers_given : bool or None
        Of heads: whether somebody said after which layers they stand; otherwise the columns were taken for layers 1 to K.
    weighting : {"prompts", "clusters", "requests"} or None
        Which mean is certified: over prompts, over clusters of them, each counting alike whatever its size, or over the
        requests of clusters of at most ``max_cluster``. None in certificates from before this was said (prompts, or clusters
        where the records had them).
    max_cluster : int or None
        The most requests of a cluster, fixed beforehand.
    asked : Asked or None
        By which `riskcal.verify` does the calibration again; None in certificates from before it was kept.
    versions : dict
        Of what the figures were computed with.

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
    n: int = Field(ge=1)
    k: int = Field(ge=0)
    pvalue: Annotated[float, Field(ge=0, le=1)] | None
    records_digest: str
    pilot_n: int = Field(default=0, ge=0)
    pilot_digest: str | None = None
    stopped: Stop | None = None
    preregistered: str | None = None
    policy_digest: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    layers_given: bool | None = None
    weighting: Literal["prompts", "clusters", "requests"] | None = None
    max_cluster: int | None = Field(default=None, ge=1)
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
