"""`capacity`: what a service needs, put together from recorded exits: work, memory, throughput, waiting times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from riskcal import _showing, _validate
from riskcal._validate import RiskcalError
from riskcal.efficiency.engine import LEAST, engine_work
from riskcal.efficiency.flops import DecoderDimensions, decoder_flops
from riskcal.efficiency.layers import Integers, exit_array, exit_shares
from riskcal.efficiency.memory import head_parameters, memory
from riskcal.efficiency.work import BATCH_MODES, Work, batch_work, expected_work
from riskcal.records.columns import series

#: How requests are decoded together.
WAYS = ("engine", *BATCH_MODES)
_STRESS = "With one request of every rows in flight at full depth"


@dataclass(frozen=True, eq=False, repr=False)
class Capacity:
    """What to plan for.

    Attributes
    ----------
    layers : Work
        Layers per token: ``expected`` is the bill's, ``deepest`` the memory's.
    flops : Work or None
        Decoder FLOPs per token, where the model's dimensions were given: over all tokens; the quantile over requests' own
        means; and the most that one would have whose tokens ask at every layer and leave at none.
    head_parameters, head_bytes : int
        Of exit heads of their own.
    strata : DataFrame
        One row per stratum, and one for all: ``requests``, ``tokens``, ``layers`` (summed over tokens), ``depth`` (their mean),
        ``work`` (the stratum's share of all layers). Strata sum to all.
    table : DataFrame
        One row per way and number of requests in flight: ``way``, ``rows``, ``depth`` (layer calls per position that is
        decoded: of a batch that decodes in step its deepest row's exit, of an engine each row's own), ``independent`` (what
        the depth would be of rows drawn independently), ``rows_per_call`` and ``calls`` (per request). With costs of calls
        ``requests_per_second``, ``tokens_per_second``, and the median and quantile of seconds from when a request is read until
        it is answered; with dimensions ``bytes``.
    stress : DataFrame
        The same, were one request of every ``rows`` to need all layers for each of its tokens.

    Examples
    --------
    >>> capacity = riskcal.efficiency.capacity([[1, 1, 1], [1, 8, 0]], n_layers=8, rows=(1, 2), group=["easy", "hard"])
    >>> round(capacity.layers.expected, 2), capacity.layers.deepest
    (2.4, 8.0)
    >>> capacity.strata["work"].round(2).tolist()
    [0.25, 0.75, 1.0]
    """

    layers: Work
    flops: Work | None
    head_parameters: int
    head_bytes: int
    strata: pd.DataFrame
    table: pd.DataFrame
    stress: pd.DataFrame

    def __repr__(self) -> str:
        tables = (_showing.text(self.strata), _showing.text(self.table), _showing.text(self.stress))
        return f"Capacity: {self.message}\n\n{tables[0]}\n\n{tables[1]}\n\n{_STRESS}:\n{tables[2]}"

    def _repr_html_(self) -> str:
        parts = [
            _showing.paragraph(self.message),
            _showing.html(self.strata),
            _showing.html(self.table),
        ]
        return "".join([*parts, _showing.paragraph(f"{_STRESS}:"), _showing.html(self.stress)])

    @property
    def message(self) -> str:
        """In one line."""
        work = self.layers
        return f"{work.expected:.4g} layers per token, {work.quantile:.4g} at the quantile, {work.deepest:.4g} to be ready for."


def capacity(
    exit_layers: ArrayLike,
    n_layers: int,
    *,
    rows: Sequence[int] = (1, 8, 64),
    ways: Sequence[str] = ("engine", "regroup", "diverge"),
    group: ArrayLike | None = None,
    least: int = LEAST,
    call: tuple[float, float] | Mapping[str, tuple[float, float]] | None = None,
    request: float = 0.0,
    dimensions: DecoderDimensions | None = None,
    source_lengths: ArrayLike | None = None,
    predictor: str = "head",
    max_prompt: int | None = None,
    max_new_tokens: int | None = None,
    heads: Mapping[int, int] | None = None,
    number_bytes: int = 4,
    quantile: float = 0.99,
) -> Capacity:
    """Work, memory, throughput and waiting times of a policy, from the exits of requests that are like those to be served.

    Parameters
    ----------
    exit_layers : (B, T) int
        Of requests in the order in which they come, 1..L, 0 after each one's last token. Those of a random sample of the
        service, or of a replay; at mixed difficulty, the mixture.
    n_layers : int
        L.
    rows : sequence of int
        Requests in flight at a time: slots of an engine, rows of a batch.
    ways : sequence of {"engine", "diverge", "regroup", "deepest"}
        See `engine_work` and `batch_work`.
    group : (B,), optional
        Each request's stratum, a task or a difficulty.
    least : int
        As in `engine_work`.
    call : (float, float), or mapping of way to such, optional
        Seconds of calling a layer once, and for each row in it, its confidence included. Measured on the machine to be used;
        ways differ, as gathering rows costs.
    request : float
        Seconds of reading a request (its encoding).
    dimensions : DecoderDimensions, optional
    source_lengths : int or (B,) int, optional
        Prompt tokens; with ``dimensions``.
    predictor : {"head", "classifier", "none"}
        As in `decoder_flops`.
    max_prompt, max_new_tokens : int, optional
        As in `memory`; with ``dimensions``. Default: the longest here.
    heads : mapping of layer to int, optional
        Parameters of exit heads of their own.
    number_bytes : int
    quantile : float
        Of the work of tokens and requests and of waiting times.

    Returns
    -------
    Capacity

    Raises
    ------
    RiskcalError
        For exit layers of another form, strata that do not fit, unknown ways, costs that are negative, more rows than there
        are requests, and dimensions without lengths.

    Notes
    -----
    Requests wait at the door, as many as there are, so that throughput is the most that can be had; what a request waits
    before it is read comes on top of its seconds. The exits are taken as they are: batches of mode ``"deepest"`` emit other
    tokens, which have other exits. A cost of calls is a straight line in their rows, which it is not quite.

    Examples
    --------
    >>> table = riskcal.load_example("g2p-generations").query("threshold == 0.5")
    >>> length = max(map(len, table["exit_layers"]))
    >>> exits = [list(layers) + [0] * (length - len(layers)) for layers in table["exit_layers"]]
    >>> capacity = riskcal.efficiency.capacity(exits, n_layers=8, rows=(1, 4), ways=("engine", "diverge"))
    >>> capacity.table[["way", "rows", "depth"]].round(2).values.tolist()
    [['engine', 1, 1.39], ['diverge', 1, 1.39], ['engine', 4, 1.39], ['diverge', 4, 2.22]]
    """
    exits = exit_array(exit_layers, _validate.count(n_layers, "n_layers", least=1))
    level = _validate.level(quantile, "quantile")
    sizes = [_validate.count(size, "rows", least=1) for size in rows]
    if max(sizes, default=0) > len(exits) or not sizes:
        raise RiskcalError(
            f"rows: {max(sizes, default=0)} in flight of {len(exits)} requests; give at least one number of rows, and exits "
            "of at least as many requests."
        )
    for way in ways:
        _validate.choice(way, "ways", WAYS)
    costs = {way: _cost(call, way) for way in ways}
    reading = _validate.number(request, "request")
    if reading < 0 or (reading and call is None):
        raise RiskcalError(
            "request: seconds of reading are at least 0, and need call=, those of a layer."
        )
    shares = exit_shares(exits, n_layers)
    mean_depth = expected_work(shares).expected
    flops, taken = None, {}
    if dimensions is not None:
        if source_lengths is None:
            raise RiskcalError("source_lengths: dimensions need the tokens of the prompts too.")
        flops = _flops(exits, dimensions, source_lengths, predictor, level)
        longest = int(np.max(source_lengths)) if max_prompt is None else max_prompt
        length = exits.shape[1] if max_new_tokens is None else max_new_tokens
        for size in sizes:
            taken[size] = memory(
                dimensions,
                rows=size,
                max_prompt=longest,
                max_new_tokens=length,
                heads=heads,
                number_bytes=number_bytes,
            ).total
    parameters = head_parameters(heads, n_layers)
    tables = []
    for stressed in (False, True):
        told = []
        for size in sizes:
            some = _with_deep_rows(exits, size, n_layers) if stressed else exits
            independent = expected_work(shares, rows=size).expected
            for way in ways:
                row = _way(some, way, size, least, costs[way], reading, level)
                row["independent"] = mean_depth if way == "engine" else independent
                told.append(row | ({"bytes": taken[size]} if taken else {}))
        tables.append(pd.DataFrame(told))
    return Capacity(
        layers=expected_work(shares, quantile=level),
        flops=flops,
        head_parameters=parameters,
        head_bytes=parameters * _validate.count(number_bytes, "number_bytes", least=1),
        strata=_strata(exits, group),
        table=tables[0],
        stress=tables[1].drop(columns="independent"),
    )


def _cost(call: Any, way: str) -> tuple[float, float] | None:
    """Seconds of a call of a layer, and of each row in it."""
    if call is None:
        return None
    given = call.get(way) if isinstance(call, Mapping) else call
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise RiskcalError(
            f"call: {_validate.shown(given)} for {way!r}; give two numbers, the seconds of a call and of each of its rows."
        )
    fixed, per_row = (_validate.number(value, f"call: of {way}") for value in given)
    if fixed < 0 or per_row < 0 or fixed + per_row == 0:
        raise RiskcalError(f"call: ({fixed:g}, {per_row:g}) for {way!r}; a call takes time.")
    return fixed, per_row


def _flops(
    exits: Integers, dimensions: DecoderDimensions, source: Any, predictor: str, level: float
) -> Work:
    counted = decoder_flops(exits, dimensions, source, predictor=predictor)
    deep = np.where(exits > 0, dimensions.n_layers, 0)
    most = decoder_flops(deep, dimensions, source, predictor=predictor)
    return Work(
        expected=counted.per_token,
        quantile=float(np.quantile(counted.adaptive / counted.tokens, level)),
        deepest=float((most.adaptive / most.tokens).max()),
    )


def _with_deep_rows(exits: Integers, size: int, n_layers: int) -> Integers:
    """One request of every ``size`` needs all layers throughout."""
    deep = exits.copy()
    deep[::size] = np.where(exits[::size] > 0, n_layers, 0)
    return deep


def _way(
    exits: Integers,
    way: str,
    size: int,
    least: int,
    cost: tuple[float, float] | None,
    request: float,
    level: float,
) -> dict[str, Any]:
    """One row of the table."""
    count, tokens = len(exits), int(np.count_nonzero(exits))
    if way == "engine":
        engine = engine_work(exits, size, least=least)
        calls, computed = engine.calls, int(engine.rows.sum())
        depth = computed / tokens
        whole, each = (None, None) if cost is None else engine.seconds(cost, request)
    else:
        batches = [exits[start : start + size] for start in range(0, count, size)]
        works = [batch_work(_trimmed(batch), way) for batch in batches]
        calls, computed = sum(w.calls for w in works), sum(sum(w.rows) for w in works)
        depth = calls / sum(work.steps for work in works)
        whole, each = None, None
        if cost is not None:
            took = [cost[0] * work.calls + cost[1] * sum(work.rows) for work in works]
            spent = [s + request * len(batch) for s, batch in zip(took, batches, strict=True)]
            whole, each = sum(spent), np.repeat(spent, [len(batch) for batch in batches])
    told = {"way": way, "rows": size, "depth": depth, "independent": 0.0}
    told |= {"rows_per_call": computed / calls, "calls": calls / count}
    if whole is not None and each is not None:
        told |= {"requests_per_second": count / whole, "tokens_per_second": tokens / whole}
        told |= {
            "p50": float(np.median(each)),
            f"p{100 * level:g}": float(np.quantile(each, level)),
        }
    return told


def _trimmed(exits: Integers) -> Integers:
    """Without the positions that no row of a batch reaches."""
    return exits[:, : int(np.count_nonzero(exits, axis=1).max())]


def _strata(exits: Integers, group: ArrayLike | None) -> pd.DataFrame:
    """Requests, tokens and layers of each stratum, and of all."""
    named = ["all"] * len(exits)
    if group is not None:
        named = [str(name) for name in series(group, "group")]
        if len(named) != len(exits):
            raise RiskcalError(
                f"group: {len(named)} given for {len(exits)} requests; give one for each."
            )
        if "all" in named:
            raise RiskcalError(
                "group: 'all' is the row that they sum to; give the stratum another name."
            )
    rows = pd.DataFrame(
        {
            "group": named,
            "requests": 1,
            "tokens": np.count_nonzero(exits, axis=1),
            "layers": exits.sum(1),
        }
    )
    found = rows.groupby("group", sort=True).sum()
    if group is not None:
        found.loc["all"] = found.sum()
    found["depth"] = found["layers"] / found["tokens"]
    found["work"] = found["layers"] / exits.sum()
    return found.reset_index()
