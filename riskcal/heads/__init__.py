"""Per-head thresholds: the documents' rule, and thresholds at which the agreement of a cascade of heads is certified.

A head is an exit with a threshold of its own. A token leaves at the first head whose confidence reaches its threshold, and
*agrees* if that head's token is the full model's. The pooled agreement of a head is the expected number of agreeing tokens
that leave there over the expected number of tokens that leave there: long prompts count for more.
"""

import hashlib
import html
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special

from riskcal import _simulation, _validate, fwer, pvalues, records
from riskcal._validate import Floats, RiskcalError
from riskcal.records import columns as table_columns

if TYPE_CHECKING:
    from riskcal.policy import ExitPolicy

#: Thresholds per head that a path may use: this many quantiles of the pilot's confidences.
_LEVELS = 50
#: The steps of a path: how many standard errors the pilot's projection leaves each head, from cautious to bold.
_MARGINS = np.arange(4.0, -2.25, -0.25)
#: In how many draws the sample that a message names certifies, and how many tokens it may have to be simulated.
_POWER, _TOKENS = 0.8, 100_000
#: Beyond any decoder, and within what the kernels count with.
_MOST_TOKENS, _MOST_LAYERS = 2**40, 2**20
#: A surplus of agreement below this is none.
_ROUNDING = 1e-9

Bools = NDArray[np.bool_]


def self_supervised(confidence: ArrayLike, agrees: ArrayLike, agreement: float = 0.9) -> Floats:
    """The documents' rule: each head's lowest observed confidence from which on the observed agreement is high enough.

    Parameters
    ----------
    confidence : (N, K)
        Of each token at each head; NaN never exits, so such a token does not count for that head.
    agrees : (N, K)
        Whether that head's token is the full model's: booleans, or 0 and 1.
    agreement : float
        The share of the tokens at or above the threshold that must agree, in (0, 1].

    Returns
    -------
    (K,)
        With the confidences sorted ascending, the first one whose suffix has a mean of ``agrees`` of at least ``agreement``;
        ``inf`` where there is none. Equal confidences leave together, so only the first of them is tried. Non-decreasing in
        ``agreement``.

    Raises
    ------
    RiskcalError
        For arrays of different or wrong shape, infinite confidences, ``agrees`` other than 0 and 1, and ``agreement``
        outside (0, 1].

    Notes
    -----
    There is no finite-sample guarantee. The rule takes the best of many observed means on the very tokens it is judged by,
    so out of sample a head misses its target about as often as not, and one of four heads nearly always does. It also
    looks at all tokens, though the later heads of a cascade see only those that no earlier head took. Use `certified` where
    the agreement is a promise. Source: Valade, Accelerating Large Language Model Inference with Self-Supervised Early Exits
    (2024), section 3.
    """
    levels, right = _tokens(confidence, agrees)
    target = _validate.number(agreement, "agreement")
    if not 0.0 < target <= 1.0:
        raise RiskcalError(
            f"agreement: {target:g} is not in (0, 1]; give the share of exited tokens that must agree."
        )
    return np.array(
        [_lowest_feasible(levels[:, k], right[:, k], target) for k in range(levels.shape[1])]
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
        One row per step of the path that was tested, in order: ``threshold_<layer>`` and, observed on the calibration
        prompts, the share of tokens that exit (``exits``, ``exits_<layer>``) and the pooled agreement of those
        (``agreement``, ``agreement_<layer>``; NaN where none exits), then ``pvalue`` and ``certified``.
    pilot : tuple
        Ids of the prompts that chose the path and were not tested.
    n : int
        Calibration prompts, the pilot not counted.
    agreement, epsilon : float
    max_tokens : int
    layers_given : bool
        Whether the heads' layers were said; if not, the columns were taken for layers 1 to K.
    records_digest : str
        Of the arrays that were given, the tokens prompt by prompt.
    message : str
        The outcome in plain words, with what to do next if nothing was certified. The number of prompts that it names is
        simulated where the message is first read, which takes some seconds.
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
    layers_given: bool
    records_digest: str
    _told: Callable[[], str]

    @cached_property
    def message(self) -> str:
        """The outcome in plain words."""
        return self._told()

    def policy(self, **fields: Any) -> "ExitPolicy":
        """The policy to deploy: one threshold per head's layer, with its certificate (objective ``"agreement"``).

        Parameters
        ----------
        **fields
            Fields of `riskcal.ExitPolicy` that the arrays do not say (``measure``, ``n_layers``, ``max_new_tokens``).

        Raises
        ------
        RiskcalError
            For ``threshold``, ``thresholds`` and ``certificate``, which calibration finds; and, where the heads' layers were
            not given, for an ``n_layers`` that shows that the columns are not the first of them.

        Warns
        -----
        UserWarning
            If heads are used and nobody said after which layers they stand: neither ``layers=`` nor an ``n_layers`` of one
            more than there are heads.
            The certificate says so too (``layers_given``).
        """
        # Policies stand above heads in the order of modules; only here does the result of one become the other.
        from riskcal.policy import Certificate, ExitPolicy, ids_digest, versions

        for name in ("threshold", "thresholds", "certificate"):
            if name in fields:
                raise RiskcalError(
                    f"{name}: is what was calibrated; leave it out, or write an ExitPolicy of your own."
                )
        self._mind_the_layers(fields.get("n_layers"))
        by_layer = {
            int(layer): float(threshold)
            for layer, threshold in zip(self.layers, self.thresholds, strict=True)
        }
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
            test="betting",
            procedure="fixed_sequence",
            starts=1,
            n=self.n,
            k=len(self.table),
            pvalue=float(chosen.iloc[-1]) if len(chosen) else None,
            records_digest=self.records_digest,
            pilot_n=len(self.pilot),
            pilot_digest=ids_digest(self.pilot),
            max_tokens=self.max_tokens,
            layers_given=self.layers_given,
            versions=versions(),
        )
        return ExitPolicy(thresholds=by_layer, **fields).certified(certificate)

    def _mind_the_layers(self, n_layers: Any) -> None:
        heads = len(self.layers)
        if self.layers_given or n_layers == heads + 1 or not self.certified:
            return
        if n_layers is None:
            warnings.warn(
                f"layers: were not given, so the {heads} columns are taken for layers 1 to {heads}. If the heads stand after "
                "others, say which with layers= in certified.",
                stacklevel=3,
            )
        else:
            raise RiskcalError(
                f"n_layers: {heads} heads of a model with {n_layers} layers are not all but its last, and layers= was not given; "
                "say in certified after which layers they stand."
            )

    def __repr__(self) -> str:
        head = f"HeadCalibration: {len(self.layers)} heads, agreement {self.agreement:g}, epsilon {self.epsilon:g}"
        return f"{head}\n{self.message}\n\n{self._brief().to_string(index=False, float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.message)}</p>{self._brief().to_html(index=False, float_format='{:.4g}'.format)}"

    def _brief(self) -> pd.DataFrame:
        """The table without the heads that no step uses."""
        idle = [layer for layer in self.layers if np.isinf(self.table[f"threshold_{layer}"]).all()]
        return self.table.drop(
            columns=[f"{name}_{i}" for i in idle for name in ("threshold", "exits", "agreement")]
        )


class _Goal(NamedTuple):
    agreement: float
    level: float
    max_tokens: int


class _Records(NamedTuple):
    """Tokens of n prompts, the first ``n_pilot`` of which, in tested order, are the pilot."""

    confidence: NDArray[np.floating[Any]]  # (N, K)
    agrees: Bools  # (N, K)
    prompt: NDArray[np.intp]  # (N,), place of the token's prompt in tested order
    ids: NDArray[Any]  # (n,)
    n_pilot: int

    @property
    def n(self) -> int:
        """Calibration prompts."""
        return len(self.ids) - self.n_pilot


class _Pilot(NamedTuple):
    """The pilot's tokens, prompt by prompt, and the thresholds that a path may use."""

    grids: list[Floats]  # K of them, descending
    level: NDArray[
        np.uint8
    ]  # (K, N), the first threshold of the head's grid that the token reaches
    agrees: Bools  # (K, N)
    start: NDArray[np.intp]  # (n_pilot + 1,), bounds of each prompt's tokens
    spared: Floats  # (K,), layers that an exit saves, as if the full model came as far behind the last head as heads are apart


class _Counts(NamedTuple):
    """Tokens of each calibration prompt that exit at each head, and how many of them do not agree: (n, K) each."""

    exits: NDArray[np.int64]
    errors: NDArray[np.int64]

    def losses(self, goal: _Goal) -> Floats:
        """Per prompt and head in [0, 1], with mean at most 1 - agreement exactly where the pooled agreement is reached."""
        return _loss(self.exits, self.errors, 1.0 - goal.agreement, goal.max_tokens)


def request_loss(
    exits: ArrayLike, errors: ArrayLike, *, agreement: float, max_tokens: int
) -> float | Floats:
    """The loss of a request that `certified` controls: feed it to `riskcal.RiskMonitor` with ``delta = 1 - agreement``.

    Parameters
    ----------
    exits : float or (n,)
        Tokens of each request that left at a head (or at one head, to watch that one), 0 to ``max_tokens``.
    errors : float or (n,)
        Those of them that are not the full model's token.
    agreement, max_tokens
        As certified: ``1 - certificate.delta`` and ``certificate.max_tokens``.

    Returns
    -------
    float or (n,)
        ``1 - agreement + (errors - (1 - agreement) exits) / max_tokens``, in [0, 1]. Its mean is at most ``1 - agreement``
        exactly where the pooled agreement, agreeing over exited tokens of all requests, is at least ``agreement``. A mean of
        each request's own share of errors would count a short request's tokens for more.

    Raises
    ------
    RiskcalError
        For counts that cannot be: negative, more errors than exits, more exits than ``max_tokens``.
    """
    tolerated, most_tokens = 1.0 - _agreement(agreement), _most(max_tokens)
    left = np.atleast_1d(_validate.array(exits, "exits", ndim=(0, 1)))
    wrong = np.atleast_1d(_validate.array(errors, "errors", ndim=(0, 1)))
    if left.shape != wrong.shape:
        raise RiskcalError(
            f"errors: {wrong.size} given for {left.size} exits; give one per request."
        )
    for name, values, most, why in (
        ("exits", left, float(most_tokens), f"0 to max_tokens ({most_tokens})"),
        ("errors", wrong, left, "0 to the request's exits"),
    ):
        bad = (values < 0) | (values > most) | (values % 1 != 0)
        if bad.any():
            raise RiskcalError(
                f"{name}: {values[bad][0]:g} at index {_validate.first(bad)}; give a whole number of tokens, {why}."
            )
    losses = _loss(left, wrong, tolerated, most_tokens)
    return float(losses[0]) if np.ndim(exits) == 0 else losses


def _loss(exits: NDArray[Any], errors: NDArray[Any], tolerated: float, max_tokens: int) -> Floats:
    losses: Floats = tolerated + (errors - tolerated * exits) / max_tokens
    return losses


def certified(
    confidence: ArrayLike,
    agrees: ArrayLike,
    *,
    prompts: ArrayLike,
    max_tokens: int,
    agreement: float = 0.9,
    epsilon: float = 0.05,
    pilot_fraction: float = 0.2,
    layers: Sequence[int] | None = None,
) -> HeadCalibration:
    """Thresholds at which every head's exited tokens agree often enough, with probability at least 1 - epsilon.

    Parameters
    ----------
    confidence : (N, K)
        Of each token at each head, shallowest head first; NaN never exits. Leave out the last layer: it is the full model.
    agrees : (N, K)
        Whether that head's token is the full model's: booleans, or 0 and 1.
    prompts : (N,)
        The prompt of each token, integers or strings, in any order. Prompts are the independent units; where they share a
        source, give the source instead.
    max_tokens : int
        The most tokens that a prompt can have (the decoder's length limit), fixed before the data were seen. The closer
        to the usual length, the fewer prompts are needed.
    agreement : float
        The pooled agreement to certify, in (0, 1).
    epsilon : float
        Probability, over the draw of the calibration prompts, that a false certificate is issued.
    pilot_fraction : float
        Share of the prompts that choose the path of thresholds and are not tested.
    layers : (K,) ints
        The layers after which the heads stand, ascending, from 1: ``layers=[2, 4, 6]`` for columns of heads after layers 2, 4
        and 6. Without it the columns are taken for layers 1 to K, which is right only if every layer from the first on has a
        head; the policy warns of it.

    Returns
    -------
    HeadCalibration
        Its thresholds are such that, in the cascade they form (a token leaves at the first head whose threshold it
        reaches), the pooled agreement is at least ``agreement`` at every head that is used, and therefore of all exited
        tokens together.

    Raises
    ------
    RiskcalError
        For arrays of different or wrong shape, infinite confidences, ``agrees`` other than 0 and 1, prompts without id, a
        prompt of more than ``max_tokens`` tokens, a pilot or a rest of fewer than two prompts, levels outside (0, 1), and
        layers that do not ascend.

    Notes
    -----
    Assumes i.i.d. prompts from the population that will be served, one look, and that the recorded tokens are those that
    will be decoded. Tokens recorded on the full model's own path are not quite that for a decoder with memory: after its
    first early exit its states differ. Certify such a policy by `riskcal.calibrate` on real generations.

    The pilot, the first prompts in `riskcal.records.tested_order` (of prompts that are only numbered, in an order drawn from
    the content of all tokens: see `riskcal.records.content_order`), fixes a path of threshold vectors, from cautious to
    bold. The others test it by a fixed sequence at level epsilon. At each step the hypothesis of a head is that its
    ``loss = 1 - agreement + (errors - (1 - agreement) exits) / max_tokens`` has an expectation above ``1 - agreement``,
    counting per prompt the tokens that exit there *in the cascade*; it lies in [0, 1], and both ends are possible. The
    p-value of a step is the largest of its heads' (`riskcal.pvalues.betting`), which needs no correction: the step is
    wrong only if one head's true hypothesis is rejected. The cascade needs no test, its loss being the sum of the heads'.
    Heads at ``inf`` cannot exit, and have nothing to show. Sources: Learn then Test (Angelopoulos et al. 2021) for the
    fixed sequence, Berger (1982) for the largest p-value.
    """
    goal = _Goal(_agreement(agreement), _validate.level(epsilon, "epsilon"), _most(max_tokens))
    recorded = _records(*_tokens(confidence, agrees), prompts, goal.max_tokens, pilot_fraction)
    numbers = _layers(layers, recorded.confidence.shape[1])
    steps: list[Floats] = []
    counts: list[_Counts] = []
    tested: list[float] = []
    for thresholds in _path(recorded, numbers, goal):
        steps.append(thresholds)
        counts.append(_count(recorded, thresholds))
        tested.append(_pvalue(counts[-1], thresholds, goal))
        if tested[-1] > goal.level:
            break
    rejected = fwer.fixed_sequence(tested, goal.level) if tested else np.zeros(0, dtype=bool)
    table = _table(
        steps,
        counts,
        tested,
        rejected,
        numbers,
        tokens=int(np.sum(recorded.prompt >= recorded.n_pilot)),
    )
    last = int(rejected.sum()) - 1
    if last >= 0:
        told = partial(_certified_message, recorded, table, numbers, goal, last)
    else:
        told = partial(
            _failure_message,
            recorded,
            numbers,
            goal,
            _validate.level(pilot_fraction, "pilot_fraction"),
        )
    return HeadCalibration(
        thresholds=steps[last] if last >= 0 else np.full(len(numbers), math.inf),
        layers=numbers,
        certified=last >= 0,
        table=table,
        pilot=tuple(recorded.ids[: recorded.n_pilot].tolist()),
        n=recorded.n,
        agreement=goal.agreement,
        epsilon=goal.level,
        max_tokens=goal.max_tokens,
        layers_given=layers is not None,
        records_digest=_digest(recorded, numbers),
        _told=told,
    )


def _lowest_feasible(confidence: NDArray[np.floating[Any]], agrees: Bools, target: float) -> float:
    known = ~np.isnan(confidence)
    if not known.any():
        return math.inf
    order = np.argsort(confidence[known], kind="stable")
    ascending = confidence[known][order].astype(np.float64)
    share = np.cumsum(agrees[known][order][::-1])[::-1] / np.arange(order.size, 0, -1)
    first_of_ties = np.r_[True, ascending[1:] != ascending[:-1]]
    feasible = np.flatnonzero(first_of_ties & (share >= target))
    return float(ascending[feasible[0]]) if feasible.size else math.inf


def _path(recorded: _Records, layers: NDArray[np.int64], goal: _Goal) -> Iterator[Floats]:
    """The threshold vectors that the pilot proposes, from cautious to bold; made as they are asked for.

    At each step every used head is projected to pass its test with the same margin, in standard errors of the projection,
    and among such thresholds those are taken that spare the pilot's tokens the most layers.
    """
    pilot = _pilot(recorded, layers)
    previous: Floats = np.full(len(layers), math.inf)
    used = np.zeros(len(layers), dtype=bool)
    for margin in _MARGINS.tolist():
        saving = partial(_saving, pilot, margin=margin, n=recorded.n, goal=goal)
        used = max(_climb(used, saving), _climb(np.ones_like(used), saving), key=saving)
        thresholds = _boldest(pilot, used, margin, recorded.n, goal)[1]
        if np.isfinite(thresholds).any() and not np.array_equal(thresholds, previous):
            yield thresholds
        previous = thresholds


def _pilot(recorded: _Records, layers: NDArray[np.int64]) -> _Pilot:
    rows = np.flatnonzero(recorded.prompt < recorded.n_pilot)
    rows = rows[np.argsort(recorded.prompt[rows], kind="stable")]
    grids: list[Floats] = []
    level = np.empty((len(layers), len(rows)), dtype=np.uint8)
    for k in range(len(layers)):
        column = recorded.confidence[rows, k].astype(np.float64)
        known = column[~np.isnan(column)]
        shares = np.arange(_LEVELS) / _LEVELS
        grids.append(
            np.unique(np.quantile(known, shares, method="lower"))[::-1]
            if known.size
            else np.empty(0)
        )
        level[k] = np.searchsorted(-grids[k], -column)  # NaN comes after all of them
    spacing = (layers[-1] - layers[0]) / (len(layers) - 1) if len(layers) > 1 else 1.0
    return _Pilot(
        grids=grids,
        level=level,
        agrees=np.ascontiguousarray(recorded.agrees[rows].T),
        start=np.searchsorted(recorded.prompt[rows], np.arange(recorded.n_pilot + 1)),
        spared=layers[-1] + spacing - layers,
    )


def _boldest(
    pilot: _Pilot, used: Bools, margin: float, n: int, goal: _Goal
) -> tuple[float, Floats]:
    """What the used heads save, each at the lowest threshold that is projected to pass on n prompts; and these thresholds."""
    from riskcal import _kernels

    chosen = np.full(used.size, -1)
    fixed = (
        goal.agreement,
        goal.max_tokens,
        n,
        -float(special.ndtri(goal.level)),
        -math.log(goal.level),
    )
    count = np.array([len(grid) for grid in pilot.grids])
    saving = _kernels.head_levels(
        pilot.level, count, pilot.agrees, pilot.start, used, pilot.spared, *fixed, margin, chosen
    )
    thresholds = [
        grid[i] if i >= 0 else math.inf for grid, i in zip(pilot.grids, chosen, strict=True)
    ]
    return float(saving), np.array(thresholds)


def _saving(pilot: _Pilot, used: Bools, *, margin: float, n: int, goal: _Goal) -> float:
    return _boldest(pilot, used, margin, n, goal)[0]


def _climb(used: Bools, saving: Callable[[Bools], float]) -> Bools:
    """Local search over which heads to use: switch one on or off, or move one to its neighbour, while the saving grows."""
    one = np.eye(used.size, dtype=bool)
    best = saving(used)
    while True:
        moves = [used ^ head for head in one]
        moves += [
            used ^ one[k] ^ one[k + 1] for k in range(used.size - 1) if used[k] != used[k + 1]
        ]
        values = [saving(move) for move in moves]
        if max(values) <= best:
            return used
        best, used = max(values), moves[int(np.argmax(values))]


def _count(recorded: _Records, thresholds: Floats) -> _Counts:
    from riskcal import _kernels

    exits = np.zeros((len(recorded.ids), thresholds.size), dtype=np.int64)
    errors = np.zeros_like(exits)
    _kernels.head_exits(
        recorded.confidence, recorded.agrees, recorded.prompt, thresholds, exits, errors
    )
    return _Counts(exits[recorded.n_pilot :], errors[recorded.n_pilot :])


def _table(
    steps: list[Floats],
    counts: list[_Counts],
    tested: list[float],
    rejected: Bools,
    layers: NDArray[np.int64],
    *,
    tokens: int,
) -> pd.DataFrame:
    heads = [int(layer) for layer in layers]
    names = ["exits", "agreement"]
    names += [f"{name}_{layer}" for layer in heads for name in ("threshold", "exits", "agreement")]
    rows = []
    for thresholds, count in zip(steps, counts, strict=True):
        exits, errors = count.exits.sum(0), count.errors.sum(0)
        row = {
            "exits": exits.sum() / tokens,
            "agreement": _share(exits.sum() - errors.sum(), exits.sum()),
        }
        for k, layer in enumerate(heads):
            row[f"threshold_{layer}"] = thresholds[k]
            row[f"exits_{layer}"] = exits[k] / tokens
            row[f"agreement_{layer}"] = _share(exits[k] - errors[k], exits[k])
        rows.append(row)
    return pd.DataFrame(rows, columns=names, dtype=np.float64).assign(
        pvalue=np.array(tested, dtype=np.float64), certified=rejected
    )


def _share(part: np.int64, whole: np.int64) -> float:
    return float(part / whole) if whole else math.nan


def _certified_message(
    recorded: _Records, table: pd.DataFrame, layers: NDArray[np.int64], goal: _Goal, last: int
) -> str:
    row = table.iloc[last]
    used = [
        f"layer {layer} at {row[f'threshold_{layer}']:.6g}"
        for layer in layers
        if math.isfinite(row[f"threshold_{layer}"])
    ]
    return (
        f"Certified: with probability at least {1 - goal.level:.6g} over the draw of the {recorded.n} calibration prompts, at "
        f"least {goal.agreement:.6g} of the tokens that exit at a head agree with the full model, for every head that is used "
        f"({', '.join(used)}). Of the calibration tokens {row['exits']:.1%} exit, and {row['agreement']:.1%} of those agree."
    )


def _failure_message(
    recorded: _Records, layers: NDArray[np.int64], goal: _Goal, pilot_fraction: float
) -> str:
    opening = f"Nothing was certified at agreement {goal.agreement:g}: run the full model. "
    everyone = _pilot(
        recorded._replace(n_pilot=len(recorded.ids)), layers
    )  # planning may look at all of them
    size = min(_prompts_needed(_losses_alone(everyone, k, goal), goal) for k in range(len(layers)))
    if math.isinf(size):
        return opening + (
            "At no head do the exits clearly agree often enough, whatever the threshold, so more prompts alone may not help: "
            "lower the agreement, or train the heads."
        )
    largest = max(2 * len(recorded.ids), _TOKENS * len(recorded.ids) // len(recorded.prompt))
    share = partial(_share_certified, recorded, layers, goal, pilot_fraction)
    total = _simulation.smallest_fitted(share, _POWER, size / (1.0 - pilot_fraction), largest)
    condition = "if confidences and agreement are distributed as those observed"
    if total is None:
        return opening + (
            f"More than {largest} fresh prompts would be needed, {condition}: lower the agreement, or train the heads."
        )
    return opening + (
        f"A fresh sample of about {total} prompts, pilot included, certifies some exits in four draws of five, {condition}. "
        "Testing these data again, or more of the same pool, is a new attempt that this epsilon does not cover. A max_tokens "
        "nearer to the usual length also helps, if it is fixed beforehand."
    )


def _share_certified(
    recorded: _Records,
    layers: NDArray[np.int64],
    goal: _Goal,
    pilot_fraction: float,
    n: int,
    draws: int,
    seed: int,
) -> float:
    """Of samples of n prompts, drawn whole from those recorded, the share in which the first step of the path is certified."""
    n_pilot = math.ceil(pilot_fraction * n)
    if n_pilot < 2 or n - n_pilot < 2:
        return 0.0
    by_prompt, tokens = np.argsort(recorded.prompt, kind="stable"), np.bincount(recorded.prompt)
    start, certified = np.cumsum(tokens) - tokens, 0
    for of in np.random.default_rng(seed).integers(0, len(tokens), (draws, n)):
        length = tokens[of]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        rows = by_prompt[np.repeat(start[of], length) + within]
        drawn = _Records(
            recorded.confidence[rows],
            recorded.agrees[rows],
            np.repeat(np.arange(n), length),
            np.arange(n),
            n_pilot,
        )
        first = next(_path(drawn, layers, goal), None)
        certified += first is not None and _pvalue(_count(drawn, first), first, goal) <= goal.level
    return certified / draws


def _pvalue(count: _Counts, thresholds: Floats, goal: _Goal) -> float:
    """Of a step of the path: the largest of the used heads'."""
    losses = count.losses(goal)[:, np.isfinite(thresholds)]
    return float(np.max(pvalues.betting(losses, 1.0 - goal.agreement, level=goal.level)))


def _prompts_needed(losses: Floats, goal: _Goal) -> float:
    """Roughly how many calibration prompts let one column of losses (n, k) pass, the easiest; ``inf`` if none can.

    The simulation begins there. Enough for the noise in four draws of five, and for the largest bet, which it takes the
    bettor a fifth of the way to dare, to reach the level. As the column is the best of many, its surplus is taken for a
    standard error less than observed.
    """
    deviation = losses.std(0)
    surplus = 1.0 - goal.agreement - losses.mean(0) - deviation / math.sqrt(len(losses))
    positive = np.maximum(surplus, _ROUNDING)
    noise = (special.ndtri(1.0 - goal.level) + special.ndtri(0.8)) * deviation / positive
    growth = -1.25 * math.log(goal.level) / np.log1p(0.99 / goal.agreement * positive)
    return float(
        np.where(surplus > _ROUNDING, np.maximum(noise**2, growth), math.inf).min(initial=math.inf)
    )


def _losses_alone(pilot: _Pilot, head: int, goal: _Goal) -> Floats:
    """Losses (n_pilot, levels) of one head used alone, at each threshold of its grid."""
    levels, n_pilot = len(pilot.grids[head]), len(pilot.start) - 1
    prompt = np.repeat(np.arange(n_pilot), np.diff(pilot.start))
    cell = prompt * (levels + 1) + pilot.level[head]
    exits, errors = (
        np.bincount(cell, weights, minlength=n_pilot * (levels + 1))
        .reshape(n_pilot, -1)[:, :levels]
        .cumsum(1)
        for weights in (None, ~pilot.agrees[head])
    )
    return _Counts(exits, errors).losses(goal)


def _tokens(confidence: ArrayLike, agrees: ArrayLike) -> tuple[NDArray[np.floating[Any]], Bools]:
    levels, right = (
        _validate.float_matrix(confidence, "confidence"),
        _validate.as_given(agrees, "agrees"),
    )
    if right.dtype != bool or right.ndim != 2:
        right = _validate.float_matrix(agrees, "agrees")
    if right.shape != levels.shape:
        raise RiskcalError(
            f"agrees: has shape {right.shape}, but confidence has {levels.shape}; give one per confidence."
        )
    infinite = np.isinf(levels)
    if infinite.any():
        raise RiskcalError(
            f"confidence: {levels[infinite][0]} at index {_validate.first(infinite)}; give finite confidences, or NaN for a "
            "token that must not exit there."
        )
    other = ~((right == 0.0) | (right == 1.0))
    if other.any():
        raise RiskcalError(
            f"agrees: {right[other][0]:g} at index {_validate.first(other)}; give 1 where the head's token is the full "
            "model's and 0 where it is not. Where that is unknown, give 0."
        )
    return levels, right.astype(bool, copy=False)


def _records(
    confidence: NDArray[np.floating[Any]],
    agrees: Bools,
    prompts: ArrayLike,
    max_tokens: int,
    pilot_fraction: float,
) -> _Records:
    column = table_columns.series(prompts, "prompts")
    if len(column) != len(confidence):
        raise RiskcalError(
            f"prompts: has shape ({len(column)},); give one id for each of the {len(confidence)} tokens."
        )
    code, distinct = pd.factorize(table_columns.identifiers(column, "prompts"))
    ids = np.asarray(distinct)
    tokens = np.bincount(code)
    long = tokens > max_tokens
    if long.any():
        which = int(long.argmax())
        raise RiskcalError(
            f"max_tokens: prompt {ids.tolist()[which]!r} (row {int((code == which).argmax())}) has {tokens[which]} tokens, more "
            f"than {max_tokens}. Give the decoder's length limit, fixed before the data were seen."
        )
    order = _order(ids, code, confidence, agrees)
    rank = np.empty(len(ids), dtype=np.intp)
    rank[order] = np.arange(len(ids))
    share = _validate.level(pilot_fraction, "pilot_fraction")
    n_pilot = math.ceil(share * len(ids))
    if n_pilot < 2 or len(ids) - n_pilot < 2:
        raise RiskcalError(
            f"pilot_fraction: {share:g} of {len(ids)} prompts leaves {n_pilot} for the pilot and {len(ids) - n_pilot} for the "
            "test; each needs at least two."
        )
    return _Records(confidence, agrees, rank[code], ids[order], n_pilot)


def _order(
    ids: NDArray[Any], code: NDArray[np.intp], confidence: NDArray[np.floating[Any]], agrees: Bools
) -> NDArray[np.intp]:
    """The order of prompts: that of their ids, or of the content of all their tokens where ids only number them."""
    if not records.numbered(ids):
        return records.tested_order(ids)
    levels = (
        (column.astype(np.float64) + 0.0).view(np.int64) for column in confidence.T
    )  # one zero
    outcomes = (column.astype(np.int64) for column in agrees.T)
    prints = np.zeros(len(ids), dtype=np.uint64)
    np.add.at(
        prints, code, records.row_prints(itertools.chain(levels, outcomes))
    )  # whatever the order of tokens
    ascending = np.argsort(ids.astype(np.int64))
    return ascending[records.order_by_prints(prints[ascending])]


def _digest(recorded: _Records, layers: NDArray[np.int64]) -> str:
    """A hash of the ids and of their tokens, the same however prompts are interleaved."""
    hasher = hashlib.blake2b("\x1f".join(map(str, recorded.ids.tolist())).encode(), digest_size=16)
    hasher.update(layers.data)
    order = np.argsort(recorded.prompt, kind="stable")
    for first in range(
        0, len(order), 65536
    ):  # in parts: a copy of the whole is as large as the arrays
        rows = order[first : first + 65536]
        hasher.update(recorded.prompt[rows].astype(np.int64).data)
        hasher.update(recorded.confidence[rows].astype(np.float64).data)
        hasher.update(recorded.agrees[rows].data)
    return hasher.hexdigest()


def _agreement(value: Any) -> float:
    result = _validate.number(value, "agreement")
    if not 0.0 < result < 1.0:
        raise RiskcalError(
            f"agreement: {result:g} is not strictly between 0 and 1; 0.9 asks that nine of ten exited tokens agree."
        )
    return result


def _most(value: Any) -> int:
    return _validate.count(value, "max_tokens", least=1, most=_MOST_TOKENS)


def _layers(layers: Sequence[int] | None, heads: int) -> NDArray[np.int64]:
    if layers is None:
        return np.arange(1, heads + 1)
    with _validate.reading("layers", "a list of whole numbers"):
        given = list(_validate.on_the_host(layers))
    numbers = np.array(
        [_validate.count(layer, "layers", least=1, most=_MOST_LAYERS) for layer in given],
        dtype=np.int64,
    )
    if numbers.size != heads:
        raise RiskcalError(
            f"layers: {numbers.size} given for {heads} heads; give one per column of confidence."
        )
    falling = np.diff(numbers) <= 0
    if falling.any():
        raise RiskcalError(
            f"layers: {numbers[1:][falling][0]} at index {int(falling.argmax()) + 1} does not ascend; order heads by depth."
        )
    return numbers
