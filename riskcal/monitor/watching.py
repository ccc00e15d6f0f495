"""`RiskMonitor`: watches the losses of a deployed policy, and raises the alarm when their mean exceeds delta."""

import math
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from riskcal import _validate
from riskcal._validate import Floats, RiskcalError
from riskcal.monitor import telling
from riskcal.monitor.inputs import clipping, rate, refuse_left_out, run_length, series, stream
from riskcal.monitor.merging import MERGERS
from riskcal.monitor.state import BETS, SUMS, Parameters, State

_LARGEST = 709.0  # exp of this is just below the largest float


class RiskMonitor:
    """Sound an alarm when the expected loss of requests, given all that came before, exceeds delta.

    Feed it the loss of every request, or of a random sample of them (shadow evaluation: a sampled request is also run on
    the full model). It may be looked at after every loss. Its memory is constant.

    Parameters
    ----------
    delta : float
        Tolerated expected loss, in the loss's own units.
    epsilon : float
        Without ``average_run_length``: the probability that a false alarm is *ever* raised.
    average_run_length : float, optional
        If given, the mean number of losses until a false alarm is at least this, and that of requests at least this over
        ``sampling_rate``; epsilon is not used. The monitor then stays as quick after a long good time as it was at the
        start, at the price that a false alarm comes some day: right for a deployment that runs for months.
    lower, upper : float
        Known bounds of the losses.
    sampling_rate : float
        The rate of shadow sampling, an independent coin for each request; where the rate varies (``rates`` of `update`),
        its smallest value. A constant rate changes no decision, since it is the sampled losses that are counted, unless
        there is a proxy.
    proxy : (float, float), optional
        The range to clip proxies to, where `update` is given them: numbers known of *every* request that may foretell its
        loss. True alarms then come with fewer losses, false ones as seldom as ever, however bad the proxy, if ``sampling_rate``
        is the coin's own.

    Attributes
    ----------
    n : int
        Losses seen.
    alarm_at : int or None
        Number of losses after which the alarm was first raised (for a merged monitor: seen when it was merged).

    Raises
    ------
    RiskcalError
        For invalid arguments, naming them.

    Notes
    -----
    H: ``E[x_t | x_1 ... x_{t-1}] <= delta`` for every t; requests need be neither independent nor alike. Six bettors each
    stake a constant bet b on losses above delta: b is a share of ``1 / (delta - lower)``, beyond which a loss of ``lower``
    would leave a debt, and the shares are spaced geometrically from ``0.2 d`` to 0.5, d being delta on the unit interval. (In
    the e-detector from at least ``2 / average_run_length``: smaller bets would let it drift to an alarm on losses of
    ``lower`` alone.) A loss that was sampled at a rate p counts with the weight ``w = sampling_rate / p``, 1 at a constant rate.

    *Ville's alarm.* ``W_t = mean over b of prod_{i <= t} (1 + b w_i (x_i - delta))`` starts at 1, is never negative, and its
    conditional mean does not grow under H. So ``P(W_t >= 1 / epsilon for some t) <= epsilon`` (Ville 1939). With rates, H is
    about all requests and time goes from request to request: one that is not sampled (probability ``1 - p``) leaves W as it
    is, one that is sampled adds ``b w (x - delta)`` times W, in the mean ``p b (sampling_rate / p) (E x - delta) <= 0``.

    *E-detector of the Shiryaev-Roberts type* (Shin, Ramdas and Rinaldo 2023). ``M_t = mean over b of N_{t,b} - 1`` with
    ``N_{t,b} = N_{t-1,b} (1 + b w_t (x_t - delta)) + w_t`` from 1, and the alarm at ``average_run_length`` = A. What a loss
    adds bets from the next one on: at its own it would depend on what was sampled. Let R count the requests. A request adds
    ``p w = sampling_rate`` in the mean, whatever its rate, so under H ``M - sampling_rate R`` is a supermartingale from 0, and
    with R of the alarm ``A <= E[M] <= sampling_rate E[R]`` (stop at ``min(R, r)``, let r to infinity, Fatou; where there may
    be no alarm the mean is infinite): ``A / sampling_rate`` requests or more on average. Of these ``E[sum of p] >=
    sampling_rate E[R] >= A`` are seen. The weight is what must be added: a whole unit per loss, beside bets that w has made
    small, would let M drift to the alarm on losses of ``lower`` alone. As it is, these leave ``N <= 1 / share <= A / 2`` where
    it stood so before (``N (1 - share w) + w <= 1 / share``), for any rates.

    *With a proxy* f, mapped to [0, 1], each request bets on ``w (x - delta) + c (sampling_rate - w) (f - a)``, w being 0 where
    it was not sampled; c and a (the mean f) are taken from earlier requests. Whatever f is, the second term has mean 0 by the
    coin alone, as ``p w = sampling_rate``, so both proofs hold as they stand, for traffic that drifts too. It takes the part of
    x that f foretells from the requests that were sampled and gives its mean over all. c is the regression's coefficient,
    shrunk as in `riskcal.pvalues.betting_with_proxy` (0 for an idle proxy), and for each bettor at most what its stake leaves
    room for: ``b (delta - lower + |c|) <= 0.75``.

    Examples
    --------
    >>> monitor = riskcal.RiskMonitor(0.1, average_run_length=5000)
    >>> monitor.update([0.0, 0.2, 0.05] * 300).alarm
    False
    >>> monitor.update([0.0, 0.6, 0.4] * 100).alarm_at
    917
    """

    def __init__(
        self,
        delta: float,
        *,
        epsilon: float = 0.05,
        average_run_length: float | None = None,
        lower: float = 0.0,
        upper: float = 1.0,
        sampling_rate: float = 1.0,
        proxy: tuple[float, float] | None = None,
    ) -> None:
        self.lower, self.upper = _validate.bounds(lower, upper)
        self.delta = _validate.tolerance(delta, self.lower, self.upper)
        self.epsilon = _validate.level(epsilon, "epsilon")
        self.average_run_length = run_length(average_run_length)
        self.sampling_rate = rate(sampling_rate)
        self.proxy = clipping(proxy)
        self.n = 0
        self.alarm_at: int | None = None
        self._growth = np.zeros(BETS)  # log of each bettor's capital; of M + 1 in the e-detector
        self._bets = self._shares() / self._unit(self.delta)
        self._totals = np.zeros(2)  # sums of weight times loss (on the unit interval), of weights
        self._sums = np.zeros(SUMS)  # what is known of the proxy

    def update(
        self,
        losses: ArrayLike,
        *,
        rates: ArrayLike | None = None,
        proxies: ArrayLike | None = None,
    ) -> Self:
        """Take one loss, or several in the order in which their requests came.

        Parameters
        ----------
        losses : float or (n,)
            Within [lower, upper]. An empty array is allowed. With ``proxies`` one for every request, NaN where it was not
            sampled.
        rates : float or (n,), optional
            Where requests are sampled at rates that vary, perhaps with what they contain: the probability with which each
            of these was sampled, at least ``sampling_rate`` and known before its loss was. Bets are then scaled by
            ``sampling_rate / rate``, so that the claim is about all requests, not about those that are sampled more often,
            and an average run length counts requests times ``sampling_rate``.
        proxies : float or (n,), optional
            Where the monitor has a ``proxy``: that of each of these requests, sampled or not.

        Returns
        -------
        RiskMonitor
            Itself.

        Raises
        ------
        RiskcalError
            For NaN, or values out of bounds; then nothing is changed.
        """
        if self.proxy is None and proxies is not None:
            raise RiskcalError(
                "proxies: construct the monitor with proxy=(low, high), the range that they are clipped to."
            )
        values, known = (
            (series(losses, "losses"), None) if self.proxy is None else stream(losses, proxies)
        )
        seen = ~np.isnan(values)
        _validate.in_range(values[seen], "losses", self.lower, self.upper)
        weights = np.ones(values.size) if rates is None else self._weights(rates, values.size)
        refuse_left_out(~seen & (weights <= self.sampling_rate))
        unit = self._unit(np.clip(values, self.lower, self.upper))
        from riskcal.monitor import kernels

        state = (self._unit(self.delta), self._bets, self._growth, self._totals)
        ends = (self.average_run_length is not None, self._log_limit)
        if known is None or self.proxy is None:
            first = kernels.watch(unit, weights, *state, *ends)
        else:
            low, high = self.proxy
            known = (np.clip(known, low, high) - low) / (high - low)
            told = (np.where(seen, unit, 0.0), np.where(seen, weights, 0.0), known)
            first = kernels.watch_helped(*told, self.sampling_rate, self._sums, *state, *ends)
        if first >= 0 and self.alarm_at is None:
            self.alarm_at = self.n + int(seen[: first + 1].sum())
        self.n += int(seen.sum())
        return self

    @property
    def alarm(self) -> bool:
        """Whether the alarm has been raised; it stays so. False means nothing before the first loss (``n`` is 0)."""
        return self.alarm_at is not None

    @property
    def limit(self) -> float:
        """What `evalue` has to reach for an alarm: ``1 / epsilon``, or the average run length."""
        return 1.0 / self.epsilon if self.average_run_length is None else self.average_run_length

    @property
    def evalue(self) -> float:
        """The capital W as it stands (an e-value at any stopping time), or the e-detector's M.

        Under H the mean of M is at most the number of requests times ``sampling_rate``. Inside it is a logarithm; as a float it
        ends at the largest there is.
        """
        mean = float(special.logsumexp(self._growth)) - math.log(BETS)
        capital = math.exp if self.average_run_length is None else math.expm1
        return capital(min(mean, _LARGEST))

    @property
    def mean_loss(self) -> float:
        """Mean loss of all requests since the start, as estimated from those seen; NaN before the first."""
        unit, weight = self._totals
        return (
            float(self.lower + (self.upper - self.lower) * unit / weight)
            if weight > 0
            else math.nan
        )

    @property
    def requests(self) -> float:
        """About how many requests there have been, judging by the sampling rate."""
        return float(self._totals[1]) / self.sampling_rate

    @property
    def parameters(self) -> dict[str, Any]:
        """The constructor's arguments."""
        names = (
            "delta",
            "epsilon",
            "average_run_length",
            "lower",
            "upper",
            "sampling_rate",
            "proxy",
        )
        return {name: getattr(self, name) for name in names}

    @classmethod
    def merge(cls, monitors: Iterable[Self], *, how: str | None = None) -> Self:
        """One monitor of the requests of several shards, each of which has its own.

        Parameters
        ----------
        monitors : iterable of RiskMonitor
            With the same parameters, and with no loss in common: a loss that two of them saw counts twice, which makes the
            result wrong (monitors restored from one state share its past; so do a merged monitor and its parts).
        how : {"product", "mean", "sum"}, optional
            ``"product"`` (default without ``average_run_length``): the monitor that would have seen all losses, in whatever
            order. Needs H across shards: each loss's expectation is at most delta given all earlier ones of *all* shards.
            ``"mean"``: the mean of the capitals, much less powerful. It suffices that each loss's expectation is at most
            delta given all that came strictly before, so losses of one moment may depend on each other.
            ``"sum"`` (the only one with ``average_run_length``): the sum of the detectors. Needs what ``"mean"`` needs; the
            average run length is counted in losses (or requests) of all shards together.

        Returns
        -------
        RiskMonitor
            A new one; it can be updated in turn, and merged again as the shards go on.

        Raises
        ------
        RiskcalError
            For no monitors, one given twice, parameters that differ, or a combination that proves nothing.

        Notes
        -----
        The product and the mean of the shards' capitals are nonnegative supermartingales of the joint past, the sum of the
        e-detectors is one after subtraction of ``sampling_rate`` times the joint number of requests, and a mixture over bets
        remains one; the class's proofs apply.
        The merged Ville alarm is judged by the merged capital alone: alarms that the shards raised themselves are further
        tests, each at its own epsilon, and are not taken over. In the e-detector they are, since whenever a part has reached
        the limit, so has the sum.

        Where H holds for each shard given *its own* past only, the mean is an e-value at a time fixed beforehand, but not
        at a time that depends on several shards. Then do not merge, and give each of s shards ``epsilon / s``.
        """
        monitors = _validate.listed(monitors, "monitors", "a list of RiskMonitor")
        if not monitors:
            raise RiskcalError("monitors: none given; give at least one.")
        for index, monitor in enumerate(monitors):
            if not isinstance(monitor, RiskMonitor):
                raise RiskcalError(
                    f"monitors: a {type(monitor).__name__} at index {index} is not a RiskMonitor."
                )
            if any(monitor is other for other in monitors[:index]):
                raise RiskcalError(
                    f"monitors: the same one stands twice, again at index {index}; its losses would count twice."
                )
            for name, value in monitor.parameters.items():
                if value != monitors[0].parameters[name]:
                    raise RiskcalError(
                        f"{name}: {value} at index {index} differs from {monitors[0].parameters[name]} at index 0; "
                        "monitors of different tests cannot be merged."
                    )
        result = cls(**monitors[0].parameters)
        ville = result.average_run_length is None
        how = _validate.choice(
            ("product" if ville else "sum") if how is None else how,
            "how",
            ("product", "mean", "sum"),
        )
        if (how == "sum") == ville:
            raise RiskcalError(
                "how: a sum of capitals exceeds 1 / epsilon too often; use 'product' or 'mean'."
                if ville
                else f"how: {how!r} is not for e-detectors; use 'sum' (a product proves nothing, a mean alarms later)."
            )
        growth = np.array([monitor._growth for monitor in monitors])
        result._growth = MERGERS[how](growth)
        result._totals = np.sum([monitor._totals for monitor in monitors], axis=0)
        result._sums = np.sum([monitor._sums for monitor in monitors], axis=0)
        result.n = sum(monitor.n for monitor in monitors)
        reached = special.logsumexp(result._growth) - math.log(BETS) >= result._log_limit
        if reached or (not ville and any(monitor.alarm for monitor in monitors)):
            result.alarm_at = result.n
        return result

    def to_json(self) -> str:
        """The whole state as JSON, from which `from_json` goes on bit for bit where this monitor stands."""
        return State(
            kind="riskcal.RiskMonitor",
            schema_version=1,
            parameters=Parameters(**self.parameters),
            n=self.n,
            alarm_at=self.alarm_at,
            growth=self._growth.tolist(),
            totals=self._totals.tolist(),
            sums=None if self.proxy is None else self._sums.tolist(),
        ).written()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Restore what `to_json` wrote.

        Raises
        ------
        RiskcalError
            For anything else: no JSON, unknown or missing fields, another schema version, or a state that cannot be.
        """
        state = State.read(text)
        result = cls(**state.parameters.model_dump())
        result.n, result.alarm_at = state.n, state.alarm_at
        result._growth, result._totals = np.array(state.growth), np.array(state.totals)
        if state.sums is not None:
            result._sums = np.array(state.sums)
        return result

    @property
    def _log_limit(self) -> float:
        """Logarithm of what the mean of ``exp(growth)`` has to reach."""
        return (
            -math.log(self.epsilon)
            if self.average_run_length is None
            else math.log1p(self.average_run_length)
        )

    def _shares(self) -> Floats:
        """Bets as shares of the largest."""
        least = 0.2 * self._unit(self.delta)
        if self.average_run_length is not None:
            least = min(max(least, 2.0 / self.average_run_length), 0.75)
        return np.geomspace(least, max(least, 0.5), BETS)

    def _unit(self, value: Any) -> Any:
        return (value - self.lower) / (self.upper - self.lower)

    def _weights(self, rates: ArrayLike, n: int) -> Floats:
        values = series(rates, "rates")
        if values.size not in (1, n):
            raise RiskcalError(
                f"rates: {values.size} given for {n} losses; give one per loss, or one for all."
            )
        bad = (values < self.sampling_rate * (1.0 - _validate.TOLERANCE)) | (values > 1.0)
        if bad.any():
            raise RiskcalError(
                f"rates: {values[bad][0]:g} at index {_validate.first(bad)} is outside [{self.sampling_rate:g}, 1]; "
                "construct the monitor with the smallest rate as sampling_rate."
            )
        return np.broadcast_to(np.minimum(self.sampling_rate / values, 1.0), (n,))

    def plot(self, ax: Any = None) -> Any:
        """The capital of each bet that the risk is above delta, and where the alarm is raised; returns the axes."""
        return telling.picture(self, self._shares(), self._growth, ax)

    def __repr__(self) -> str:
        return f"RiskMonitor: {telling.sentence(self)}"

    def _repr_html_(self) -> str:
        return telling.html(self)
