"""What exits cost: layers per token, decoder FLOPs, expected and worst work, batches, and measured times.

Counted from recorded exit layers (B, T): prompts by generated tokens, each 1..L, with 0 after the last token of a prompt.
The token that ends an output counts, the prompt does not. Layers and FLOPs are no time: `speed_table` holds them against a
clock.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from riskcal import _tables, _validate
from riskcal._validate import Floats, RiskcalError

if TYPE_CHECKING:
    from riskcal.pruning import Pruning

Integers = NDArray[np.int64]

#: What deciding on an exit costs: nothing to speak of, a linear classifier, or the language-model head.
PREDICTORS = ("none", "classifier", "head")
BATCH_MODES = ("diverge", "regroup", "deepest")


# ---- Layers


def layers_per_token(exit_layers: ArrayLike, *, average: str = "token") -> float:
    """Mean exit layer.

    Parameters
    ----------
    exit_layers : (B, T) int
        1..L, 0 after the last token of a prompt.
    average : {"token", "sequence"}
        ``"token"``: over all tokens, so that long outputs count for more. ``"sequence"``: over the prompts' own means.

    Returns
    -------
    float

    Raises
    ------
    RiskcalError
        For exit layers of another form, and a prompt without tokens.
    """
    exits = _exits(exit_layers)
    _validate.choice(average, "average", ("token", "sequence"))
    if average == "token":
        return float(exits.sum() / np.count_nonzero(exits))
    return float((exits.sum(1) / np.count_nonzero(exits, axis=1)).mean())


def exit_shares(exit_layers: ArrayLike, n_layers: int) -> Floats:
    """The exit distribution: which share of the tokens left at each layer.

    Parameters
    ----------
    exit_layers : (B, T) int
    n_layers : int
        L.

    Returns
    -------
    (L,)
        Shares of layers 1..L, one in total.
    """
    exits = _exits(exit_layers, n_layers)
    counts = np.bincount(exits[exits > 0], minlength=n_layers + 1)[1:]
    shares: Floats = counts / counts.sum()
    return shares


# ---- FLOPs


@dataclass(frozen=True)
class DecoderDimensions:
    """The sizes of an encoder-decoder model's decoder on which its FLOPs depend.

    Parameters
    ----------
    d_model, d_ff : int
        Width d of the states, and f of the feed-forward layers.
    vocabulary : int
        V, rows of the head.
    n_layers : int
        L.
    d_attention : int, optional
        Heads times width per head. Default: d, as in the formula's source; T5 v1.1 small has 384 with d = 512.
    d_encoder : int, optional
        Width of the encoder's states. Default: d.
    gated : bool
        Whether the feed-forward layers have three matrices (T5 v1.1) instead of two.
    """

    d_model: int
    d_ff: int
    vocabulary: int
    n_layers: int
    d_attention: int | None = None
    d_encoder: int | None = None
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("d_model", "d_ff", "vocabulary", "n_layers"):
            _validate.count(getattr(self, name), name, least=1)
        for name in ("d_attention", "d_encoder"):
            if getattr(self, name) is not None:
                _validate.count(getattr(self, name), name, least=1)

    @classmethod
    def from_config(cls, config: Any) -> "DecoderDimensions":
        """Of a model described as Hugging Face describes a T5.

        Parameters
        ----------
        config : object
            With ``d_model``, ``d_ff``, ``vocab_size``, ``num_heads``, ``d_kv`` and ``num_decoder_layers``, and optionally
            ``is_gated_act``: a ``T5Config``, or anything like it.

        Raises
        ------
        RiskcalError
            If one of these is missing.
        """
        names = ("d_model", "d_ff", "vocab_size", "num_decoder_layers", "num_heads", "d_kv")
        missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise RiskcalError(
                f"config: has no whole number {missing[0]}; give the configuration of a T5, or DecoderDimensions(...) itself."
            )
        return cls(
            d_model=config.d_model,
            d_ff=config.d_ff,
            vocabulary=config.vocab_size,
            n_layers=config.num_decoder_layers,
            d_attention=config.num_heads * config.d_kv,
            gated=bool(getattr(config, "is_gated_act", False)),
        )

    @property
    def attention(self) -> int:
        """Heads times width per head."""
        return self.d_model if self.d_attention is None else self.d_attention

    @property
    def cross_projection(self) -> int:
        """FLOPs per prompt token of a layer's first call: keys and values of the encoder's states."""
        return 4 * self.attention * (self.d_model if self.d_encoder is None else self.d_encoder)


@dataclass(frozen=True, eq=False)
class Flops:
    """Decoder FLOPs of generated prompts.

    Attributes
    ----------
    adaptive, full : (B,) int
        With the recorded exits, and of the full model on outputs of the same length.
    tokens : (B,) int
        Generated tokens.
    """

    adaptive: Integers
    full: Integers
    tokens: Integers

    @property
    def per_token(self) -> float:
        """FLOPs per generated token, over all tokens."""
        return int(self.adaptive.sum()) / int(self.tokens.sum())

    @property
    def full_per_token(self) -> float:
        """The full model's FLOPs per generated token."""
        return int(self.full.sum()) / int(self.tokens.sum())

    @property
    def ratio(self) -> float:
        """How many times the exits' FLOPs the full model needs: above 1, exits save."""
        return int(self.full.sum()) / int(self.adaptive.sum())


def token_flops(
    dimensions: DecoderDimensions,
    position: int,
    source_length: int,
    *,
    predictor: str = "head",
    head_sizes: ArrayLike | None = None,
    min_layer: int = 1,
) -> Integers:
    """FLOPs of one token, for each layer at which it may exit; the first calls of layers are left out.

    Parameters
    ----------
    dimensions : DecoderDimensions
    position : int
        t, from 1: the token attends to itself and to the t - 1 generated before it.
    source_length : int
        Tokens of the prompt.
    predictor, head_sizes, min_layer
        As in `decoder_flops`, ``head_sizes`` (L,).

    Returns
    -------
    (L,) int
        Entry q - 1 for an exit at layer q; 0 below ``min_layer``, where none exits.
    """
    layers = _validate.count(min_layer, "min_layer", least=1)
    exits = np.arange(1, dimensions.n_layers + 1)
    t = _validate.count(position, "position", least=1)
    x = _validate.count(source_length, "source_length", least=1)
    heads = _head_flops(exits[:, None], dimensions, predictor, head_sizes, layers)[:, 0]
    return np.where(exits < layers, 0, _layer_flops(exits, t, x, dimensions) + heads)


def decoder_flops(
    exit_layers: ArrayLike,
    dimensions: DecoderDimensions,
    source_lengths: ArrayLike,
    *,
    predictor: str = "head",
    head_sizes: ArrayLike | None = None,
    min_layer: int = 1,
) -> Flops:
    """FLOPs of the decoder under the recorded exits, and of the full model.

    Parameters
    ----------
    exit_layers : (B, T) int
    dimensions : DecoderDimensions
    source_lengths : int or (B,) int
        Tokens of each prompt, padding not counted.
    predictor : {"head", "classifier", "none"}
        What decides on an exit, from ``min_layer`` up to the exit. ``"head"``: the language-model head at each of these
        layers (softmax margin, largest probability, entropy), which the emitted token then has for free. ``"classifier"``:
        one linear unit, 2d a layer (t5x computes two logits for it, 4d), and one head for the token. ``"none"``: one head
        for the token only (full model, static exits, state similarity; an oracle costs nothing by convention).
    head_sizes : (L,) or (B, T, L) int, optional
        Rows of the head that are multiplied at each layer, with ``predictor="head"``: `head_sizes` makes them from a
        `riskcal.pruning.Pruning`. 0 where the head is not called. Default: V from ``min_layer`` on.
    min_layer : int
        No token exits before it.

    Returns
    -------
    Flops

    Raises
    ------
    RiskcalError
        For exit layers that are not whole numbers in 1..L followed by zeros, that lie below ``min_layer``, or at which no
        head is called; lengths that do not fit; unknown predictors; head sizes without a head.

    Notes
    -----
    With d = d_model, a = d_attention, f = d_ff, t the position and x the prompt's tokens, a layer costs
    ``12da + 4fd + 4ta + 4xa`` (gated: 6fd), a skipped one ``4da`` for its keys and values, and a layer's first call in a
    prompt ``4 x d_encoder a`` for those of the encoder's states; a layer that no token of the prompt reaches never pays
    that. With d = a this is Elbayad et al., Depth-Adaptive Transformer (2020), appendix B. A multiplication and an addition
    count as two; norms, biases, the softmax and embeddings are not counted, as there.
    """
    exits = _exits(exit_layers, dimensions.n_layers)
    least = _validate.count(min_layer, "min_layer", least=1)
    early = (exits > 0) & (exits < least)
    if early.any():
        raise RiskcalError(
            f"exit_layers: {exits[early][0]} at index {_validate.first(early)} is below min_layer {least}; give the "
            "min_layer of the run."
        )
    batch, length = exits.shape
    source = _source_lengths(source_lengths, batch)
    present = exits > 0
    positions = np.arange(1, length + 1)[None, :]
    layers = _layer_flops(exits, positions, source[:, None], dimensions)
    heads = _head_flops(exits, dimensions, predictor, head_sizes, least)
    opened = dimensions.cross_projection * source
    depth = dimensions.n_layers
    whole = _layer_flops(np.full_like(exits, depth), positions, source[:, None], dimensions)
    whole = whole + 2 * dimensions.vocabulary * dimensions.d_model
    return Flops(
        adaptive=np.where(present, layers + heads, 0).sum(1) + opened * exits.max(1),
        full=np.where(present, whole, 0).sum(1) + opened * depth,
        tokens=np.count_nonzero(present, axis=1).astype(np.int64),
    )


def head_sizes(
    pruning: "Pruning", n_layers: int, vocabulary: int, *, start: int = 1, confidence: ArrayLike | None = None
) -> Integers:
    """Rows of a pruned head that are multiplied at each layer.

    Parameters
    ----------
    pruning : riskcal.pruning.Pruning
    n_layers, vocabulary : int
        L and V.
    start : int
        The first exit layer, at which the whole head is multiplied.
    confidence : (..., L), optional
        Confidence of each token at each layer, for the adaptive forms.

    Returns
    -------
    (L,) int, or (..., L) with ``confidence``
        0 below ``start``, V at it, the number of kept tokens after it.
    """
    start = _validate.count(start, "start", least=1)
    known = None if confidence is None else np.asarray(confidence, dtype=np.float64)
    if known is not None and known.shape[-1] != n_layers:
        raise RiskcalError(f"confidence: has shape {known.shape}; the last axis must be the {n_layers} layers.")
    sizes = np.zeros((n_layers,) if known is None else known.shape, dtype=np.int64)
    sizes[..., start - 1] = vocabulary
    for layer in range(start + 1, n_layers + 1):
        before = None if known is None else known[..., layer - 2]
        sizes[..., layer - 1] = pruning.kept(layer, n_layers, vocabulary, start=start, confidence=before)
    return sizes


def head_ratio(exit_layers: ArrayLike, sizes: ArrayLike, vocabulary: int) -> float:
    """How many times more a whole head would multiply than the pruned one does, the whole passes of both counted.

    Parameters
    ----------
    exit_layers : (B, T) int
    sizes : (L,) or (B, T, L) int
        From `head_sizes`.
    vocabulary : int
        V.

    Returns
    -------
    float
        At least 1. The head calls made times V, over the rows multiplied in them.
    """
    exits = _exits(exit_layers)
    rows = _sizes(sizes, exits, vocabulary)
    at_exit = np.maximum(exits - 1, 0)[..., None]
    called = np.take_along_axis(np.cumsum(rows > 0, axis=-1), at_exit, -1)[..., 0]
    multiplied = np.take_along_axis(np.cumsum(rows, axis=-1), at_exit, -1)[..., 0]
    present = exits > 0
    if not multiplied[present].sum():
        raise RiskcalError("sizes: the head is called at no layer that a token reaches; give the sizes of the run.")
    return int(called[present].sum()) * vocabulary / int(multiplied[present].sum())


# ---- Expected work


@dataclass(frozen=True)
class Work:
    """What to expect, and what to plan for.

    Attributes
    ----------
    expected : float
        Mean cost of a token.
    quantile : float
        The least cost that covers the wanted share of tokens.
    deepest : float
        Cost at the deepest layer that has any share: memory must suffice for it, however rare.
    """

    expected: float
    quantile: float
    deepest: float


def expected_work(shares: ArrayLike, cost: ArrayLike | None = None, *, rows: int = 1, quantile: float = 0.99) -> Work:
    """Work under an exit distribution.

    Parameters
    ----------
    shares : (L,)
        Share of tokens that exit at each layer, one in total; `exit_shares` counts them.
    cost : (L,), optional
        Cost of a token that exits there, not falling with the layer: FLOPs (`token_flops`), seconds, bytes. Default: the
        layers, 1 to L.
    rows : int
        Rows that a step computes together and to its deepest one, drawn independently: the more, the deeper the step.
    quantile : float
        Share of steps that ``Work.quantile`` covers.

    Returns
    -------
    Work
        In units of ``cost``.

    Raises
    ------
    RiskcalError
        For shares that are negative or do not sum to one, and costs that fall or do not fit.

    Examples
    --------
    >>> shares = np.zeros(32)
    >>> shares[[15, 31]] = 0.5
    >>> riskcal.efficiency.expected_work(shares).expected
    24.0
    """
    share = _validate.array(shares, "shares", ndim=(1,))
    bad = share < 0
    if bad.any():
        raise RiskcalError(f"shares: {share[bad][0]:g} at index {_validate.first(bad)} is negative; a share is not.")
    if abs(share.sum() - 1.0) > _validate.TOLERANCE:
        raise RiskcalError(f"shares: sum to {share.sum():.12g}, not to 1; divide them by their sum.")
    price = np.arange(1.0, share.size + 1) if cost is None else _validate.array(cost, "cost", ndim=(1,))
    if price.size != share.size:
        raise RiskcalError(f"cost: {price.size} given for {share.size} layers; give one per layer.")
    if (falls := np.diff(price) < 0).any():
        raise RiskcalError(f"cost: falls after index {_validate.first(falls)}; a deeper exit cannot cost less.")
    wanted = _validate.level(quantile, "quantile")
    reached = np.minimum(np.cumsum(share), 1.0) ** _validate.count(rows, "rows", least=1)
    used = np.flatnonzero(share > 0)
    reached[used[-1] :] = 1.0
    return Work(
        expected=float(np.diff(reached, prepend=0.0) @ price),
        quantile=float(price[np.argmax(reached >= wanted - _validate.TOLERANCE)]),
        deepest=float(price[used[-1]]),
    )


# ---- Batches


@dataclass(frozen=True)
class BatchWork:
    """What a batch made the decoder do.

    Attributes
    ----------
    steps : int
        Positions generated, until the last row ended.
    rows : tuple of int
        Rows computed in each call of a layer, in the order of the calls: each step goes to its deepest row's exit.
    """

    steps: int
    rows: tuple[int, ...]

    @property
    def calls(self) -> int:
        """Layers called."""
        return len(self.rows)


@dataclass(frozen=True)
class BatchCosts:
    """Seconds that decoding a batch costs.

    Attributes
    ----------
    sizes : tuple of m int
        Numbers of rows, ascending.
    call : tuple of m float
        Seconds of calling a layer on so many rows, its confidence included. It is no straight line from one row on: one row
        is read against all weights, many are a product of matrices. It is a straight line from size to size, and beyond the
        last as between the last two; fewer rows than the first size cost as much as that, and with one size so do all.
    step : float
        Of a step: embedding, choosing tokens, bookkeeping.
    """

    sizes: tuple[int, ...]
    call: tuple[float, ...]
    step: float

    def seconds(self, work: BatchWork) -> float:
        """Predicted time of a batch, its encoding not included."""
        steps = np.diff(self.call, prepend=0.0)
        return float(_call_shares(work, self.sizes) @ steps) + self.step * work.steps


def _call_shares(work: BatchWork, sizes: Sequence[int]) -> NDArray[np.float64]:
    """(m,) of what a piecewise linear cost adds from one size to the next, how often this work pays it."""
    rows = np.asarray(work.rows, dtype=np.float64)
    shares = [float(rows.size)]
    for place, (low, high) in enumerate(itertools.pairwise(sizes)):
        last = place == len(sizes) - 2
        shares.append(float(np.clip((rows - low) / (high - low), 0.0, None if last else 1.0).sum()))
    return np.array(shares)


def batch_work(exit_layers: ArrayLike, mode: str) -> BatchWork:
    """The work of one batch, from its rows' exits.

    Parameters
    ----------
    exit_layers : (B, T) int
        Of the rows that were, or would be, decoded together.
    mode : {"diverge", "regroup", "deepest"}
        ``"diverge"``: a call computes all rows, those that exited ride along; those that ended do until half of the rows
        have, and the others go on alone. ``"regroup"``: a call computes the rows that have not exited. ``"deepest"``: the
        work of ``"diverge"``, but all rows emit at the deepest exit: the tokens differ, and with them later exits, so that
        from other modes' exits this is an estimate.

    Returns
    -------
    BatchWork
    """
    exits = _exits(exit_layers)
    _validate.choice(mode, "mode", BATCH_MODES)
    layers = np.arange(1, exits.max(initial=0) + 1)[:, None]
    waiting = np.array([(step >= layers).sum(1) for step in exits.T])  # (T, layers): rows that go so deep
    rows = waiting
    if mode != "regroup":
        size, sizes = len(exits), []
        for going in waiting[:, 0].tolist():
            size = going if 2 * going <= size else size
            sizes.append(size)
        rows = np.broadcast_to(np.array(sizes)[:, None], waiting.shape)
    return BatchWork(steps=exits.shape[1], rows=tuple(rows[waiting > 0].tolist()))


def fit_batch_costs(works: Sequence[BatchWork], seconds: ArrayLike) -> BatchCosts:
    """Costs that explain measured times best.

    Parameters
    ----------
    works : sequence of n BatchWork
        From `batch_work`, of batches of the sizes that will be served, several batches of each. Fit modes apart, as a
        regrouped call gathers its rows first, and without the full model, which never looks at a confidence.
    seconds : (n,)
        Measured times of these batches, encoding not included; medians over repetitions serve best.

    Returns
    -------
    BatchCosts
        For the sizes of the largest calls of these works. None negative, none falling with the size, of least squared
        relative error.

    Raises
    ------
    RiskcalError
        If times are not above 0, or the works do not tell the costs apart: batches of several depths do.
    """
    from scipy import optimize

    times = _validate.array(seconds, "seconds", ndim=(1,))
    if len(works) != times.size:
        raise RiskcalError(f"seconds: {times.size} given for {len(works)} batches; give one time per batch.")
    if (bad := times <= 0).any():
        raise RiskcalError(f"seconds: {times[bad][0]:g} at index {_validate.first(bad)}; a time is above 0.")
    sizes = sorted({max(work.rows) for work in works})
    counts = np.array([[*_call_shares(work, sizes), work.steps] for work in works], dtype=np.float64)
    relative = counts / times[:, None]
    if np.linalg.matrix_rank(relative / np.linalg.norm(relative, axis=0)) < counts.shape[1]:
        raise RiskcalError(
            f"works: {len(works)} batches do not tell the costs of steps and of calls of {len(sizes)} sizes apart; time more "
            "batches, at policies that exit at different depths."
        )
    (*increments, step), _ = optimize.nnls(relative, np.ones(times.size))
    return BatchCosts(tuple(sizes), tuple(np.cumsum(increments).tolist()), float(step))


# ---- Time


def speed_table(times: pd.DataFrame, baselines: Sequence[str], *, warm_up: int = 1) -> pd.DataFrame:
    """Measured times of several settings on the same runs, and their speed-ups over each baseline.

    Take turns: in every round decode each run (a prompt, or a few) with all settings before the next run, in rotating
    order, so that a machine's drift meets all settings alike. Time the encoder along with the decoder. Two baselines tell
    what is gained from what was lost: a decoder without exit conditions and with a cache of keys and values, and the own
    decoder with its exits disabled.

    Parameters
    ----------
    times : DataFrame
        One row per measurement: ``round``, ``run``, ``setting``, ``seconds``, and optionally the ``tokens`` generated.
    baselines : sequence of str
        Settings that the others are compared with.
    warm_up : int
        First rounds that are dropped; first calls are slow.

    Returns
    -------
    DataFrame
        One row per setting, in the order of their first appearance: ``p50``, ``p95`` and ``mean`` of the seconds per run;
        with tokens, ``tokens_per_second`` (the median round's); and for each baseline the speed-up ``x <baseline>``, the
        median over rounds of the baseline's seconds over the setting's, with its smallest and largest round (``... low``,
        ``... high``). Ratios are of time for the same prompts: of time per token they would flatter a setting that rambles.

    Raises
    ------
    RiskcalError
        If columns are missing, seconds are not above 0, a baseline was not measured, no round is left, or a setting was
        measured not exactly once on each run of each round.
    """
    _tables.require(times, ["round", "run", "setting", "seconds"])
    seconds = _validate.array(times["seconds"].to_numpy(), "seconds", ndim=(1,))
    if (bad := seconds <= 0).any():
        raise RiskcalError(f"seconds: {seconds[bad][0]:g} at row {_validate.first(bad)}; a time is above 0.")
    settings = list(times["setting"].unique())
    for baseline in baselines:
        if baseline not in settings:
            raise RiskcalError(f"baselines: {baseline!r} was not measured; settings: {', '.join(map(str, settings))}.")
    rounds = np.sort(times["round"].unique())[_validate.count(warm_up, "warm_up", least=0) :]
    if not rounds.size:
        raise RiskcalError(f"warm_up: {warm_up} drops every round; measure more, or drop fewer.")
    kept = times[times["round"].isin(rounds)]
    counts = kept.pivot_table(index=["round", "run"], columns="setting", values="seconds", aggfunc="size")
    if not (counts.reindex(columns=settings) == 1).to_numpy().all():
        raise RiskcalError("times: measure every setting exactly once on each run of each round; ratios are paired.")
    columns = kept.groupby("setting")["seconds"]
    table = pd.DataFrame({"p50": columns.quantile(0.5), "p95": columns.quantile(0.95), "mean": columns.mean()})
    total = kept.pivot_table(index="round", columns="setting", values="seconds", aggfunc="sum")
    if "tokens" in kept.columns:
        tokens = kept.pivot_table(index="round", columns="setting", values="tokens", aggfunc="sum")
        table["tokens_per_second"] = (tokens / total).median()
    for baseline in baselines:
        ratios = total.rdiv(total[baseline], axis=0)
        table[f"x {baseline}"] = ratios.median()
        table[f"x {baseline} low"], table[f"x {baseline} high"] = ratios.min(), ratios.max()
    return table.reindex(settings).rename_axis("setting").reset_index()


# ---- Checks and sums


def _exits(exit_layers: ArrayLike, n_layers: int | None = None) -> Integers:
    """Exit layers (B, T) as integers: 1..L, then zeros."""
    values = _validate.array(exit_layers, "exit_layers", ndim=(2,))
    exits = values.astype(np.int64)
    top = np.inf if n_layers is None else n_layers
    bad = (exits != values) | (exits < 0) | (exits > top)
    if bad.any():
        remedy = (
            "give whole numbers from 1" + ("" if n_layers is None else f" to {n_layers}") + ", 0 after the last token"
        )
        raise RiskcalError(f"exit_layers: {values[bad][0]:g} at index {_validate.first(bad)}; {remedy}.")
    if (empty := exits[:, 0] == 0).any():
        raise RiskcalError(f"exit_layers: row {_validate.first(empty)} has no token; drop the row.")
    if (holes := (exits[:, 1:] > 0) & (exits[:, :-1] == 0)).any():
        row, before = np.argwhere(holes)[0]
        raise RiskcalError(
            f"exit_layers: a token follows a 0 at index [{row}, {before}]; 0 is for what follows the last."
        )
    return exits


def _source_lengths(given: ArrayLike, batch: int) -> Integers:
    values = _validate.array(given, "source_lengths", ndim=(0, 1))
    lengths = values.astype(np.int64)
    bad = np.atleast_1d((lengths != values) | (lengths < 1))
    if bad.any():
        value = np.atleast_1d(values)[bad][0]
        raise RiskcalError(
            f"source_lengths: {value:g} at index {_validate.first(bad)}; give whole numbers of prompt tokens."
        )
    if lengths.ndim and lengths.size != batch:
        raise RiskcalError(f"source_lengths: {lengths.size} given for {batch} prompts; give one, or one per prompt.")
    return np.broadcast_to(lengths, (batch,))


def _layer_flops(exits: Integers, position: Any, source: Any, dimensions: DecoderDimensions) -> Integers:
    """Of the layers up to the exit, and of the keys and values of those above."""
    d, a = dimensions.d_model, dimensions.attention
    feed_forward = (6 if dimensions.gated else 4) * dimensions.d_ff * d
    layer = 12 * d * a + feed_forward + 4 * position * a + 4 * source * a
    total: Integers = exits * layer + (dimensions.n_layers - exits) * 4 * d * a
    return total


def _head_flops(
    exits: Integers, dimensions: DecoderDimensions, predictor: str, sizes: ArrayLike | None, min_layer: int
) -> Integers:
    """Of deciding at each layer up to the exit, and of the emitted token's head."""
    d, V = dimensions.d_model, dimensions.vocabulary
    _validate.choice(predictor, "predictor", PREDICTORS)
    if min_layer > dimensions.n_layers:
        raise RiskcalError(f"min_layer: {min_layer} is not one of the {dimensions.n_layers} layers.")
    tested = exits - min_layer + 1
    if predictor != "head":
        if sizes is not None:
            raise RiskcalError(f"head_sizes: means nothing to predictor {predictor!r}; leave it out.")
        return 2 * V * d + (2 * d * tested if predictor == "classifier" else np.zeros_like(exits))
    if sizes is None:
        return 2 * V * d * tested
    rows = _sizes(sizes, exits, V)
    at_exit = np.maximum(exits - 1, 0)[..., None]
    unseen = (exits > 0) & (exits >= min_layer) & (np.take_along_axis(rows, at_exit, -1)[..., 0] == 0)
    if unseen.any():
        where = _validate.first(unseen)
        raise RiskcalError(
            f"head_sizes: 0 at the exit of the token at {where}; its head must have looked at some rows."
        )
    multiplied: Integers = np.take_along_axis(np.cumsum(rows, axis=-1), at_exit, -1)[..., 0]
    return 2 * d * multiplied


def _sizes(sizes: ArrayLike, exits: Integers, vocabulary: int) -> Integers:
    """Head sizes for every token, (B, T, L)."""
    values = _validate.array(sizes, "head_sizes", ndim=(1, 3))
    rows = values.astype(np.int64)
    bad = (rows != values) | (rows < 0) | (rows > vocabulary)
    if bad.any():
        raise RiskcalError(
            f"head_sizes: {values[bad][0]:g} at index {_validate.first(bad)}; give whole numbers from 0 to {vocabulary}."
        )
    if rows.shape[-1] < exits.max() or (rows.ndim == 3 and rows.shape[:2] != exits.shape):
        raise RiskcalError(f"head_sizes: has shape {rows.shape}; give (L,) or (B, T, L) with B, T = {exits.shape}.")
    return np.broadcast_to(rows, (*exits.shape, rows.shape[-1]))
