"""`verify`: a calibration done again from its records, and how its certificate differs from what they give."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from riskcal import fwer
from riskcal._validate import RiskcalError
from riskcal.calibration.class_result import PROCEDURE, ClassCalibration
from riskcal.calibration.classes import calibrate_classes
from riskcal.calibration.groups import of_stratum
from riskcal.calibration.posing import RANGES
from riskcal.calibration.result import Calibration
from riskcal.policy import Asked, Certificate, ExitPolicy
from riskcal.policy.columns import from_columns
from riskcal.pvalues import methods

#: Fields of a certificate that are about it, not about the records: what it was made with, and what is compared by itself.
_NOT_COMPARED = ("versions", "policy_digest", "asked")

#: What certificates did not say from the start.
_SAID_LATER = ("weighting", "asked.group", "asked.cost_named")

#: Relative difference up to which two figures are one: other platforms and versions of numpy round otherwise.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Difference:
    """A field of the certificate or of the policy that the records give otherwise.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> policy = riskcal.calibrate(runs, delta=0.1).policy()
    >>> found = riskcal.verify(policy, runs.take(np.arange(2000)))
    >>> [difference for difference in found.differences if difference.name == "n"]
    [Difference(name='n', stated=3000, found=2000)]
    """

    name: str
    stated: Any
    found: Any

    def __str__(self) -> str:
        return f"{self.name}: the policy says {self.stated!r}, the records give {self.found!r}"


@dataclass(frozen=True)
class Verification:
    """What came of doing a calibration again.

    Attributes
    ----------
    differences : tuple of Difference
        Every field of the certificate, and every recorded setting of the policy, that the records do not give; figures that
        agree to nine digits count as one.
    unrecorded : tuple of str
        Settings that the policy names and the records do not: whoever made the policy said so.
    calibration : Calibration or ClassCalibration
        What the records give.
    versions : dict of str to (str, str)
        Of what differs now from when the certificate was made: the version then, and now.
    of_class : str or None
        The class that the policy was certified for, of one of `calibrate_classes`.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> policy = riskcal.calibrate(runs, delta=0.1).policy(tokenizer="3f2a")  # which these records do not name
    >>> found = riskcal.verify(policy, runs)
    >>> found.agrees, found.unrecorded, found.calibration.threshold
    (True, ('tokenizer',), 0.45)
    """

    differences: tuple[Difference, ...]
    unrecorded: tuple[str, ...]
    calibration: Calibration | ClassCalibration
    versions: dict[str, tuple[str, str]]
    of_class: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the records give this policy and this certificate."""
        return not self.differences

    @property
    def message(self) -> str:
        """The outcome in plain words, one difference a line."""
        of_class = "" if self.of_class is None else f" of class {self.of_class!r}"
        if self.agrees:
            digest = self.calibration.records_digest
            head = [f"They agree: records {digest} give this policy{of_class}."]
        else:
            head = [f"They differ in {len(self.differences)}{of_class}:"]
            head += map(str, self.differences)
            head += [
                f"({name} was {then} then, and is {now} here.)"
                for name, (then, now) in self.versions.items()
            ]
        if self.unrecorded:
            head.append(
                f"Not in the records, but said where the policy was made: {', '.join(self.unrecorded)}."
            )
        return "\n".join(head)


def verify(policy: ExitPolicy, runs: Any, **arguments: Any) -> Verification:
    """Calibrate again as a policy's certificate says it was done, and compare.

    Parameters
    ----------
    policy : ExitPolicy
        With a certificate of `calibrate`, of one stratum of `calibrate_groups` (give ``runs.of_group(name)``, or all: the
        certificate names its group, but for those from before it did), or of one class
        of `calibrate_classes` (give the runs of all classes, since their budgets were tested together).
    runs : Runs, or (n, k) array of losses
        The records, read as they were then: with the same ``candidate_columns`` and ``costs``
        (``policy.certificate.asked`` has them).
    **arguments
        Of `calibrate`, what no certificate holds: ``proxy`` and ``unlabelled``, and ``thresholds``, ``prompts``, ``exact`` and
        ``costs`` of arrays. For
        certificates from before ``asked`` was kept also the ``cost``, ``budget`` and options of the procedure.

    Returns
    -------
    Verification
        ``agrees``, and the ``differences`` by name.

    Raises
    ------
    RiskcalError
        If the policy has no certificate, or one that does not come of a table of records (`AdaptiveCalibration`,
        `riskcal.heads.certified`), or one by class from before it said what was asked; and wherever the records are refused.

    Examples
    --------
    >>> runs = riskcal.load_example("g2p")
    >>> policy = riskcal.calibrate(runs, delta=0.1).policy()
    >>> riskcal.verify(policy, runs).agrees
    True
    >>> fewer = runs.take(np.arange(2000))
    >>> [difference.name for difference in riskcal.verify(policy, fewer).differences]
    ['n', 'pvalue', 'records_digest', 'threshold']
    """
    if not isinstance(policy, ExitPolicy):
        raise RiskcalError(
            f"policy: give an ExitPolicy, not {type(policy).__name__}; ExitPolicy.load reads one from its file."
        )
    certificate = policy.certificate
    if certificate is None:
        raise RiskcalError(
            "certificate: the policy has none, so that nothing can be verified; calibrate, and save what policy() gives."
        )
    ours = certificate.procedure in (*fwer.BY_NAME, "simultaneous", PROCEDURE)
    if (
        certificate.objective == "agreement"
        or not ours
        or _test(certificate) not in methods.BY_NAME
    ):
        raise RiskcalError(
            f"certificate: its test is {certificate.test!r}, {certificate.procedure}, with objective {certificate.objective!r}, "
            "which does not come of calibrate. Run again what made it, on the same data, and compare records_digest."
        )
    again = _classes_again if certificate.procedure == PROCEDURE else _again
    found, anew, recorded = again(policy, certificate, runs, arguments)
    settings, unrecorded = _settings(policy, recorded)
    then, now = certificate.versions, anew.versions
    of_class = certificate.asked.of_class if certificate.asked is not None else None
    return Verification(
        (*_fields(certificate, anew), *settings),
        unrecorded,
        found,
        {name: (then[name], now[name]) for name in then if then[name] != now.get(name, then[name])},
        None if of_class is None else of_class.name,
    )


def _again(
    policy: ExitPolicy, certificate: Certificate, runs: Any, arguments: dict[str, Any]
) -> tuple[Calibration, Certificate, dict[str, Any]]:
    """The calibration, its certificate, and the fields of the policy that the records hold."""
    wanted = arguments_of(certificate)
    _refuse_said(arguments, wanted)
    found = of_stratum(_of_group(runs, certificate), **wanted, **arguments)
    if isinstance(found, list):
        found = next(one for one in found if one.delta == certificate.delta)
    problem = found._problem
    recorded = _recorded(policy, problem.candidates, found.chosen, problem.beside)
    return found, found.certificate, recorded


def _of_group(runs: Any, certificate: Certificate) -> Any:
    """The runs of the stratum that a certificate names; as they are where it names none, or they have none of it."""
    if certificate.asked is None or "group" not in getattr(runs, "labels", ()):
        return runs
    named = {str(name): name for name in runs.group.tolist()}
    group = certificate.asked.group
    return runs.of_group(named[group]) if group in named else runs


def _classes_again(
    policy: ExitPolicy, certificate: Certificate, runs: Any, arguments: dict[str, Any]
) -> tuple[ClassCalibration, Certificate, dict[str, Any]]:
    """The same of a policy by class."""
    asked = certificate.asked
    of_class = None if asked is None else asked.of_class
    if asked is None or of_class is None:
        raise RiskcalError(
            "certificate: was made by class before certificates said which class and budgets; run calibrate_classes again on "
            "the same records, and compare records_digest, or deploy the policies that it gives, which can be verified."
        )
    wanted: dict[str, Any] = {
        "budgets": of_class.budgets,
        "joint": of_class.joint,
        "epsilon": certificate.epsilon,
        "objective": certificate.objective,
        "cost": asked.cost,
        "test": _test(certificate),
        **asked.options,
    }
    _refuse_said(arguments, wanted)
    there = {str(name) for name in runs.group} if "group" in getattr(runs, "labels", ()) else set()
    missing = [name for name in (of_class.name, *of_class.budgets) if name not in there]
    if missing:
        raise RiskcalError(
            f"runs: none are of class {missing[0]!r}, and the budget of {of_class.name!r} was tested beside its; give the runs "
            "of all classes, with their group."
        )
    unknown = {*arguments, *asked.options} - {"pilot_fraction"}
    if unknown:
        raise RiskcalError(
            f"{min(unknown)}: is nothing that calibrate_classes takes; leave it out."
        )
    if asked.lower_is_stricter:  # which calibrate_classes takes of the runs alone
        runs = runs.directed(True)
    found = calibrate_classes(runs, **wanted, **arguments)
    anew = found.policies()[of_class.name].certificate
    assert anew is not None
    j = found.chosen[of_class.name]
    row = None if j == len(found.candidates) else found.candidates.iloc[j]
    return found, anew, _recorded(policy, found.candidates, row, found._beside)


def _refuse_said(arguments: dict[str, Any], wanted: dict[str, Any]) -> None:
    again = [name for name in arguments if name in wanted]
    if again:
        raise RiskcalError(f"{again[0]}: the certificate says what it was; leave it out.")


def arguments_of(certificate: Certificate) -> dict[str, Any]:
    """What `calibrate` was called with, as far as the certificate says."""
    asked = certificate.asked
    wanted: dict[str, Any] = {
        "epsilon": certificate.epsilon,
        "attempt": certificate.attempt,
        "test": _test(certificate),
    }
    if certificate.procedure != "simultaneous":
        wanted["procedure"] = certificate.procedure
        if certificate.starts > 1:  # also among the options of `asked`, where that was kept
            wanted["starts"] = certificate.starts
    if certificate.weighting in ("clusters", "requests"):
        wanted |= {"weighting": certificate.weighting, "max_cluster": certificate.max_cluster}
    wanted |= _losses(certificate)
    if asked is not None:
        wanted |= {"cost": asked.wanted_cost, "lower_is_stricter": asked.lower_is_stricter}
        wanted |= asked.options
        wanted["delta"] = wanted["delta"] if asked.deltas is None else asked.deltas
    elif certificate.procedure == "simultaneous":
        wanted["delta"] = [certificate.delta]
    return wanted


def _test(certificate: Certificate) -> str:
    """The test that was asked for; that a proxy helped it stands behind its name."""
    return certificate.test.removesuffix("_with_proxy")


def _losses(certificate: Certificate) -> dict[str, Any]:
    """Which losses were tested, and which costs beside them, at which tolerances."""
    delta, asked = certificate.delta, certificate.asked
    if certificate.objective == "losses":
        return {"delta": delta, "lower": certificate.lower, "upper": certificate.upper}
    if not isinstance(delta, Mapping):
        return {"delta": delta, "objective": certificate.objective}
    losses = {name: value for name, value in delta.items() if name in RANGES}
    found: dict[str, Any] = {"delta": losses}
    if len(losses) == 1:
        ((objective, value),) = losses.items()
        found = {"delta": value, "objective": objective}
    if asked is not None and asked.largest:
        found["budget"] = {name: (delta[name], most) for name, most in asked.largest.items()}
    return found


def _fields(stated: Certificate, found: Certificate) -> list[Difference]:
    """Where two certificates differ."""
    names = [name for name in Certificate.model_fields if name not in _NOT_COMPARED]
    pairs = [(name, getattr(stated, name), getattr(found, name)) for name in names]
    pairs += [
        (f"asked.{name}", getattr(stated.asked, name), getattr(found.asked, name))
        for name in Asked.model_fields
        if stated.asked is not None
    ]
    return [
        Difference(name, one, other)
        for name, one, other in pairs
        if not _same(one, other) and not (name in _SAID_LATER and one is None)
    ]


def _recorded(
    policy: ExitPolicy,
    columns: pd.DataFrame,
    chosen: pd.Series | None,
    beside: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of the policy that the records hold: in the chosen candidate's row of ``columns``, and ``beside`` it."""
    schedule = None if chosen is None else policy.schedule
    recorded = from_columns(ExitPolicy, columns, chosen, schedule)
    return recorded if chosen is None else {**beside, **recorded}


def _settings(
    policy: ExitPolicy, recorded: dict[str, Any]
) -> tuple[list[Difference], tuple[str, ...]]:
    """Where a policy differs from what was recorded, and which of its settings were not."""
    chosen = ExitPolicy(**recorded)
    differences = [
        Difference(name, getattr(policy, name), getattr(chosen, name))
        for name in recorded
        if not _same(getattr(policy, name), getattr(chosen, name))
    ]
    others = policy.model_fields_set - set(recorded) - {"certificate", "schema_version"}
    usual = ExitPolicy()
    said = [n for n in ExitPolicy.model_fields if n in others]
    return differences, tuple(n for n in said if getattr(policy, n) != getattr(usual, n))


def _same(one: Any, other: Any) -> bool:
    """Whether two fields are one, figures up to rounding."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float | int):
        return math.isclose(one, other, rel_tol=_TOLERANCE)
    return bool(one == other)
