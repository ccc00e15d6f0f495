"""`HeadCalibration`: what was tested, what was certified, and the policy to deploy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from riskcal import _showing, _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.policy import (
    Certificate,
    Constant,
    ExitPolicy,
    calibrated_fields,
    ids_digest,
    versions,
)


@dataclass(frozen=True, eq=False, repr=False)
class HeadCalibration:
    """What `certified` tested, and the thresholds to deploy.

    Attributes
    ----------
    thresholds : (K,)
        One per head; ``inf`` where a head is not used. All are ``inf`` if nothing was certified.
    layers : (K,) int
        The heads' layers, from 1.
    certified : bool
        Whether any step of the path was.
    table : DataFrame
        One row per step of the path that was tested, in order; of one-token prompts, one per head that was, with its last
        threshold that passed, or its first if none did. Columns: ``threshold_<layer>`` and, observed on the calibration
        prompts, the share of tokens that exit (``exits``, ``exits_<layer>``) and the pooled agreement of those
        (``agreement``, ``agreement_<layer>``; NaN where none exits), then ``pvalue`` (of one-token prompts over the head's
        share of epsilon, so that it passed where this is at most epsilon) and ``certified``.
    pilot : tuple
        Ids of the prompts that chose the path and were not tested.
    n : int
        Calibration prompts, the pilot not counted.
    agreement, epsilon : float
    max_tokens : int
    test : {"betting", "binomial"}
        Of the p-values: exact where prompts have one token.
    layers_given : bool
        Whether the heads' layers were said; if not, the columns were taken for layers 1 to K.
    records_digest : str
        Of the arrays that were given, the tokens prompt by prompt.
    message : str
        The outcome in plain words, with what to do next if nothing was certified. The number of prompts that it names is
        simulated where the message is first read, which takes some seconds.

    Examples
    --------
    >>> traces = riskcal.load_example("g2p-traces")
    >>> confidence, agrees = traces.confidence[:, [1, 3]], traces.agrees[:, [1, 3]]  # heads after layers 2 and 4
    >>> calibration = riskcal.heads.certified(
    ...     confidence, agrees, prompts=traces.prompt, max_tokens=24, layers=[2, 4], agreement=0.95
    ... )
    >>> calibration.certified, list(calibration.policy(n_layers=8).thresholds)
    (True, [2, 4])
    >>> axes = calibration.plot()
    """

    thresholds: Floats
    layers: NDArray[np.int64]
    certified: bool
    table: pd.DataFrame
    pilot: tuple[Any, ...]
    n: int
    agreement: float
    epsilon: float
    max_tokens: int
    test: str
    layers_given: bool
    records_digest: str
    _told: Callable[[], str]

    @cached_property
    def message(self) -> str:
        """The outcome in plain words."""
        return self._told()

    def policy(self, **fields: Any) -> ExitPolicy:
        """The policy to deploy: one threshold per head's layer, with its certificate (objective ``"agreement"``).

        Parameters
        ----------
        **fields
            Fields of `riskcal.ExitPolicy` that the arrays do not say (``measure``, ``n_layers``, ``max_new_tokens``).

        Raises
        ------
        RiskcalError
            For ``threshold``, ``thresholds``, ``learned``, ``coordinates`` and ``certificate``, which calibration finds or
            which mean nothing here; for a ``schedule``, a ``min_layer`` behind the first head that is used or a
            ``lower_is_stricter``, by which other exits are made than were tested; and, where the heads' layers were not given,
            for an ``n_layers`` that shows that the columns are not the first of them.

        Warns
        -----
        UserWarning
            If heads are used and nobody said after which layers they stand: neither ``layers=`` nor an ``n_layers`` of one
            more than there are heads.
            The certificate says so too (``layers_given``).
        """
        by_layer = {
            int(layer): float(threshold)
            for layer, threshold in zip(self.layers, self.thresholds, strict=True)
        }
        fields = calibrated_fields({"thresholds": by_layer}, fields)
        policy = ExitPolicy(**fields)
        self._refuse_other_exits(policy)
        self._mind_the_layers(fields.get("n_layers"))
        chosen = self.table["pvalue"][self.table["certified"]]
        certificate = Certificate(
            delta=float(
                1 - Decimal(repr(self.agreement))
            ),  # .1 for .9, which binary fractions do not give
            epsilon=self.epsilon,
            epsilon_spent=self.epsilon,
            attempt=None,
            objective="agreement",
            lower=0.0,
            upper=1.0,
            test=self.test,
            procedure="fixed_sequence",
            starts=max(len(self.table), 1) if self.test == "binomial" else 1,
            n=self.n,
            k=len(self.table),
            # of steps of a path the last says it for all heads; of heads in turn each has its own
            pvalue=float(chosen.max() if self.test == "binomial" else chosen.iloc[-1])
            if len(chosen)
            else None,
            records_digest=self.records_digest,
            pilot_n=len(self.pilot),
            pilot_digest=ids_digest(self.pilot),
            max_tokens=self.max_tokens,
            layers_given=self.layers_given,
            versions=versions(),
        )
        return policy.certified(certificate)

    def _refuse_other_exits(self, policy: ExitPolicy) -> None:
        """Refuse fields by which a token leaves elsewhere than where it was tested to."""
        for name, tested in (("schedule", Constant()), ("lower_is_stricter", False)):
            if getattr(policy, name) != tested:
                raise RiskcalError(
                    f"{name}: {getattr(policy, name)!r} makes other exits than were tested, which are those by {tested!r}; "
                    "leave it out."
                )
        used = self.layers[self.thresholds < math.inf]
        if len(used) and policy.min_layer > used.min():
            raise RiskcalError(
                f"min_layer: {policy.min_layer} leaves out the head after layer {used.min()}, which was tested with the others; "
                "leave it out."
            )

    def _mind_the_layers(self, n_layers: Any) -> None:
        heads = len(self.layers)
        if self.layers_given or n_layers == heads + 1 or not self.certified:
            return
        if n_layers is None:
            _validate.warn(
                f"layers: were not given, so the {heads} columns are taken for layers 1 to {heads}. If the heads stand after "
                "others, say which with layers= in certified.",
            )
        else:
            raise RiskcalError(
                f"n_layers: {heads} heads of a model with {n_layers} layers are not all but its last, and layers= was not given; "
                "say in certified after which layers they stand."
            )

    def plot(self, ax: Any = None) -> Any:
        """Agreement at each head against the share that leaves early, along the path; returns the matplotlib axes."""
        from riskcal import plots

        used = [int(layer) for layer in self.layers]
        return plots.heads_curve(
            self.table, layers=used, agreement=self.agreement, chosen=self._last, ax=ax
        )

    @property
    def _last(self) -> int | None:
        """The step that was chosen: the last certified one; of one-token prompts, heads that failed may stand before it."""
        return int(np.flatnonzero(self.table["certified"])[-1]) if self.certified else None

    def __repr__(self) -> str:
        head = f"HeadCalibration: {len(self.layers)} heads, agreement {self.agreement:g}, epsilon {self.epsilon:g}"
        return f"{head}\n{self.message}\n\n{_showing.text(self._brief(), chosen=self._last)}"

    def _repr_html_(self) -> str:
        return _showing.paragraph(self.message) + _showing.html(self._brief(), chosen=self._last)

    def _brief(self) -> pd.DataFrame:
        """The table without the heads that no step uses."""
        idle = [layer for layer in self.layers if np.isinf(self.table[f"threshold_{layer}"]).all()]
        return self.table.drop(
            columns=[f"{name}_{i}" for i in idle for name in ("threshold", "exits", "agreement")]
        )
