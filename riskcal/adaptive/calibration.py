"""`AdaptiveCalibration`: candidates are run on one prompt after the other, only until enough is certified."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _showing, _validate, policy, records
from riskcal._validate import RiskcalError
from riskcal.adaptive.capital import SPLITS, bet, opening
from riskcal.adaptive.state import Parameters, State
from riskcal.fwer.procedures import spent_by_attempt
from riskcal.policy import Certificate, ExitPolicy
from riskcal.policy.sentences import as_text, at_least
from riskcal.records import columns as table_columns


class AdaptiveCalibration:
    """Calibrate prompt by prompt, and stop as soon as enough is certified.

    It says which prompt comes next; you run the candidates on it and hand in their losses. It may be stopped at any time,
    for any reason, and what is certified by then holds: with probability at least ``1 - epsilon`` no candidate whose
    expected loss is above delta is ever certified.

    Parameters
    ----------
    prompts : sequence of int or str
        Ids of all prompts that may be used, distinct: a sample of the population that will be served, one id per
        independent unit. They are asked for in the order of `riskcal.records.tested_order`, which depends on the ids alone
        and is not the user's to choose.
    thresholds : (k,)
        Candidates, finite and distinct, fixed beforehand. Losses are handed in in this order; candidates are tested from
        the highest threshold down.
    delta : float
        Tolerated expected loss, in the loss's own units.
    epsilon : float
        Probability that a false certificate is ever issued.
    bets : {"combined", "mixture", "hedged"}
        ``"mixture"`` bets constant shares and is quick where the margin is wide. ``"hedged"`` makes the bets of
        `riskcal.pvalues.betting` for ``n_max`` prompts: it certifies most by the end, but seldom early. ``"combined"``
        gives each half of the capital, and comes close to the better of the two.
    n_max : int, optional
        At most so many prompts are asked for (default: all). The hedger is tuned for it.
    target : float, optional
        Stop as soon as a threshold of at most this is certified. Default: go on until all are, or no prompt is left.
    lower, upper : float
        Known bounds of the losses.
    objective : {"losses", "textual", "risk", "risk_clipped"}
        What the losses are, for the certificate.
    attempt : int, optional
        Which planned attempt this is; attempt j spends ``6 epsilon / (pi^2 j^2)`` (see `riskcal.calibrate`).

    Raises
    ------
    RiskcalError
        For invalid arguments, naming them. A refused update changes nothing.

    Notes
    -----
    *The claim holds at any stopping time.* For one candidate let ``x_1, x_2, ...`` be its losses on the prompts in the
    order asked for, mapped to the unit interval, and suppose that ``E[x_t | x_1 ... x_{t-1}] >= delta``, as it is for
    i.i.d. prompts of a mean of at least delta. Every account is multiplied by ``1 + b_t (delta - x_t)``, where ``b_t`` is
    at least 0, less than ``1 / (1 - delta)`` and depends on earlier losses alone. So the factor is positive and its
    conditional mean at most 1, and the capital ``W_t``, a weighted mean of the accounts that starts at 1, is a nonnegative
    supermartingale. By Ville's inequality ``P(W_t >= 1 / epsilon for some t) <= epsilon``.

    A candidate is certified once its capital has reached ``1 / epsilon`` and so has that of every higher threshold, each
    at some time. Let m be the highest threshold whose expected loss is above delta; it is fixed by the population, not by
    the data. Certifying any such candidate needs m's capital to have reached ``1 / epsilon`` at some time, which happens
    with probability at most epsilon, however the candidates depend on each other and whenever anyone stops. A candidate
    whose capital has arrived need not be run on further prompts (`needed`): its later losses cannot matter.

    Sources: Ville 1939; Waudby-Smith and Ramdas 2023 (betting); Angelopoulos et al. 2021 (fixed sequence); Zecchin and
    Simeone 2024 (adaptive Learn then Test).

    Examples
    --------
    >>> calibration = riskcal.AdaptiveCalibration(range(500), [0.9, 0.5], delta=0.1, target=0.5)
    >>> for prompt in calibration:
    ...     losses = [0.0, 0.01]  # run both candidates on the prompt
    ...     _ = calibration.update(prompt, losses)
    >>> calibration.threshold, calibration.prompts_used
    (0.5, 52)
    """

    def __init__(
        self,
        prompts: Sequence[int] | Sequence[str] | NDArray[Any],
        thresholds: ArrayLike,
        *,
        delta: float,
        epsilon: float = 0.05,
        bets: str = "combined",
        n_max: int | None = None,
        target: float | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        objective: str = "losses",
        attempt: int | None = None,
    ) -> None:
        self.lower, self.upper = _validate.bounds(lower, upper)
        self.delta = _validate.tolerance(delta, self.lower, self.upper)
        self.epsilon = _validate.level(epsilon, "epsilon")
        self.attempt = None if attempt is None else _validate.count(attempt, "attempt", least=1)
        self.bets = _validate.choice(bets, "bets", SPLITS)
        self.objective = _validate.choice(objective, "objective", ("losses", *records.OBJECTIVES))
        self.target = None if target is None else _validate.number(target, "target")
        self.thresholds = _validate.threshold_grid(thresholds, allow_full=False)
        ids = _identifiers(prompts)
        self.n_max = len(ids) if n_max is None else _validate.count(n_max, "n_max", least=2)
        if self.n_max > len(ids):
            raise RiskcalError(
                f"n_max: {self.n_max} exceeds the {len(ids)} prompts; give more prompts or a smaller n_max."
            )
        self.prompts: list[int | str] = [ids[i] for i in records.tested_order(ids)[: self.n_max]]
        self.prompts_used = 0
        k = self.thresholds.size
        self._capital = opening(k, self._unit(self.delta), straddles=self.lower < 0.0 < self.upper)
        self._loss_sum, self._rows = np.zeros(k), np.zeros(k, dtype=np.int64)
        self._digest = hashlib.blake2b(self.thresholds.tobytes(), digest_size=16).hexdigest()

    def next_prompt(self) -> int | str:
        """The id of the prompt to run next; the same one until its losses are handed in.

        Raises
        ------
        RiskcalError
            If the calibration is done.
        """
        if self.done:
            raise RiskcalError(f"prompts: no further prompt is needed. {self.message}")
        return self.prompts[self.prompts_used]

    def __iter__(self) -> Iterator[int | str]:
        """Ask for one prompt after the other until done; each must be answered with `update` before the next."""
        while not self.done:
            position = self.prompts_used
            yield self.prompts[position]
            if self.prompts_used == position:
                raise RiskcalError(
                    f"prompts: no losses were handed in for {self.prompts[position]!r}; call update with them."
                )

    def update(self, prompt: int | str, losses: ArrayLike) -> Self:
        """Hand in the losses of the prompt that was asked for.

        Parameters
        ----------
        prompt : int or str
            The id that `next_prompt` gave.
        losses : (k,)
            One per threshold, in the order of ``thresholds``, within [lower, upper]. Where `needed` is false the value is
            not looked at, and may be NaN.

        Returns
        -------
        AdaptiveCalibration
            Itself.

        Raises
        ------
        RiskcalError
            For another prompt than the one asked for, a wrong number of losses, or losses that are NaN or out of bounds.
        """
        expected = self.next_prompt()
        if isinstance(prompt, bool) or not np.isscalar(prompt) or prompt != expected:
            raise RiskcalError(
                f"prompt: {_validate.shown(prompt)} was not asked for; it is {expected!r}'s turn. The order is fixed: a choice "
                "of prompts by what they contain would make the certificate wrong."
            )
        needed = self.needed
        row = _validate.shaped(losses, "losses", ndim=(1,))
        if row.shape != needed.shape:
            raise RiskcalError(
                f"losses: has shape {row.shape}; give ({needed.size},), one loss per threshold."
            )
        row = np.where(needed, row, self.delta)  # nothing is won or lost at delta
        _validate.finite(row, "losses")
        _validate.in_range(row, "losses", self.lower, self.upper)
        row = np.clip(row, self.lower, self.upper)
        self._capital = bet(
            self._capital,
            self._unit(row),
            self._unit(self.delta),
            seen=self.prompts_used,
            n_max=self.n_max,
            level=self.epsilon_spent,
            bets=self.bets,
            straddles=self.lower < 0.0 < self.upper,
        )
        self._loss_sum = self._loss_sum + np.where(needed, row, 0.0)
        self._rows = self._rows + needed
        told = f"{self._digest}{expected!r}".encode() + row.tobytes()
        self._digest = hashlib.blake2b(told, digest_size=16).hexdigest()
        self.prompts_used += 1
        return self

    @property
    def epsilon_spent(self) -> float:
        """The level of this attempt."""
        return spent_by_attempt(self.epsilon, self.attempt)

    @property
    def needed(self) -> NDArray[np.bool_]:
        """Which thresholds (k,) still have to be run: those whose own capital has not arrived."""
        return self._capital.best < -math.log(self.epsilon_spent)

    @property
    def threshold(self) -> float:
        """The lowest certified threshold; ``inf``, the full model, if none is."""
        certified = self.thresholds[self._certified]
        return float(certified.min()) if certified.size else math.inf

    @property
    def certified(self) -> bool:
        """Whether any threshold is certified; ``table`` says which."""
        return bool(self._certified.any())

    @property
    def done(self) -> bool:
        """Whether all thresholds are certified, or the target is, or no prompt is left."""
        reached = self.target is not None and self.threshold <= self.target
        return reached or bool(self._certified.all()) or self.prompts_used == self.n_max

    @property
    def prompts_saved(self) -> int:
        """How many of the ``n_max`` prompts have not been asked for."""
        return self.n_max - self.prompts_used

    @property
    def table(self) -> pd.DataFrame:
        """One row per threshold in tested order: ``n``, mean ``loss``, ``pvalue``, ``certified``.

        The mean is over the prompts on which the threshold was needed; where it stopped early it is a little too low.
        """
        columns = {
            "threshold": self.thresholds,
            "n": self._rows,
            "loss": np.divide(
                self._loss_sum,
                self._rows,
                out=np.full(self._rows.size, math.nan),
                where=self._rows > 0,
            ),
            "pvalue": np.exp(-self._capital.best),
            "certified": self._certified,
        }
        return pd.DataFrame(columns).sort_values("threshold", ascending=False, ignore_index=True)

    @property
    def message(self) -> str:
        """The outcome so far, in plain words."""
        used = f"{self.prompts_used} of {self.n_max} prompts"
        if self.certified:
            kind = "loss" if self.objective == "losses" else f"{self.objective} loss"
            return (
                f"Certified after {used}: with probability at least {at_least(self.epsilon_spent)} over their draw, "
                f"the expected {kind} at threshold {as_text(self.threshold)} is at most {as_text(self.delta)}."
            )
        if not self.done:
            return f"Nothing certified yet after {used}."
        return (
            f"Nothing was certified at delta {as_text(self.delta)} after {used}: run the full model. What may help: a longer "
            "list of fresh prompts, a larger delta or higher thresholds; testing these again is not covered by this epsilon."
        )

    def policy(self, **fields: Any) -> ExitPolicy:
        """The policy to deploy as things stand, with its certificate; the full model if nothing is certified.

        Parameters
        ----------
        **fields
            Further fields of `riskcal.ExitPolicy`: ``measure``, ``schedule``, ``min_layer``, as the candidates were run.

        Raises
        ------
        RiskcalError
            For fields that calibration finds or that mean nothing here (``threshold``, ``coordinates``), and before two prompts.
        """
        if self.prompts_used < 2:
            used = self.prompts_used
            raise RiskcalError(f"prompts: only {used} handed in; a certificate needs at least two.")
        table = self.table
        lowest = float(table.loc[table["certified"], "pvalue"].iloc[-1]) if self.certified else None
        certificate = Certificate(
            delta=self.delta,
            epsilon=self.epsilon,
            epsilon_spent=self.epsilon_spent,
            attempt=self.attempt,
            objective=self.objective,
            lower=self.lower,
            upper=self.upper,
            test=f"adaptive betting, {self.bets}, n_max {self.n_max}",
            procedure="fixed_sequence",
            starts=1,
            n=self.prompts_used,
            k=self.thresholds.size,
            pvalue=lowest,
            records_digest=self._digest,
            versions=policy.versions(),
        )
        fields = policy.calibrated_fields({"threshold": self.threshold}, fields)
        return ExitPolicy(**fields).certified(certificate)

    def to_json(self) -> str:
        """The whole state as JSON, from which `from_json` goes on exactly where this one stands."""
        parameters = Parameters(
            thresholds=self.thresholds.tolist(),
            delta=self.delta,
            epsilon=self.epsilon,
            bets=self.bets,
            target=self.target,
            lower=self.lower,
            upper=self.upper,
            objective=self.objective,
            attempt=self.attempt,
        )
        return State(
            kind="riskcal.AdaptiveCalibration",
            schema_version=1,
            parameters=parameters,
            prompts=self.prompts,
            used=self.prompts_used,
            accounts=self._capital.accounts.tolist(),
            spread=self._capital.spread.tolist(),
            total=self._capital.total.tolist(),
            best=self._capital.best.tolist(),
            loss_sum=self._loss_sum.tolist(),
            rows=self._rows.tolist(),
            digest=self._digest,
        ).model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Restore what `to_json` wrote.

        Raises
        ------
        RiskcalError
            For anything else: no JSON, unknown or missing fields, another schema version, or a state that cannot be.
        """
        state = State.read(text)
        parameters = state.parameters.model_dump()
        result = cls(state.prompts, parameters.pop("thresholds"), **parameters)  # type: ignore[arg-type]
        state.refuse_edited(result.prompts, result.thresholds.size)
        result.prompts_used = state.used
        result._loss_sum = np.array(state.loss_sum)
        result._rows = np.array(state.rows, dtype=np.int64)
        result._capital, result._digest = state.capital(), state.digest
        return result

    @property
    def _certified(self) -> NDArray[np.bool_]:
        """(k,), in the order of ``thresholds``."""
        descending = np.argsort(-self.thresholds)
        result = np.empty(self.thresholds.size, dtype=bool)
        result[descending] = np.logical_and.accumulate(~self.needed[descending])
        return result

    def _unit(self, value: Any) -> Any:
        return (value - self.lower) / (self.upper - self.lower)

    def plot(self, ax: Any = None) -> Any:
        """Mean loss of each threshold on the prompts that were asked about it; returns the matplotlib axes."""
        from riskcal import plots

        return plots.risk_curve(
            self.table[self.table["n"] > 0],
            delta=self.delta,
            threshold=self.threshold,
            of=f"at most {self.prompts_used} prompts",
            ax=ax,
        )

    def __repr__(self) -> str:
        head = f"AdaptiveCalibration: {self.objective}, delta {self.delta:g}, epsilon {self.epsilon:g}, {self.bets} bets"
        return f"{head}\n{self.message}\n\n{_showing.text(self.table, chosen=self._certified.sum() - 1)}"

    def _repr_html_(self) -> str:
        shown = _showing.html(self.table, chosen=self._certified.sum() - 1)
        return _showing.paragraph(self.message) + shown


def _identifiers(prompts: Any) -> list[int | str]:
    """Distinct ids as Python integers or strings, at least two."""
    listed = _validate.listed(prompts, "prompts", "a list of ids")
    ids = table_columns.identifiers(pd.Series(listed), "prompts")
    if len(ids) < 2:
        raise RiskcalError(f"prompts: {len(ids)} given; at least two are needed.")
    again = ids.duplicated().to_numpy()
    if again.any():
        row = int(again.argmax())
        raise RiskcalError(
            f"prompts: {ids.tolist()[row]!r} stands twice, again at index {row}; list each prompt once."
        )
    return list(ids.tolist())
