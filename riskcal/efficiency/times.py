"""Measured times: the clock against which layers and FLOPs are held."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records import columns as table_columns


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

    Examples
    --------
    >>> import pandas as pd
    >>> times = pd.DataFrame({
    ...     "round": np.repeat([0, 1, 2], 4),
    ...     "run": [0, 0, 1, 1] * 3,
    ...     "setting": ["full", "exits"] * 6,
    ...     "seconds": [0.9, 0.5] + [0.4, 0.2] * 5,  # the first round is dropped
    ... })
    >>> table = riskcal.efficiency.speed_table(times, baselines=["full"])
    >>> dict(zip(table["setting"], table["x full"].round(2)))
    {'full': 1.0, 'exits': 2.0}
    """
    table_columns.require(times, ["round", "run", "setting", "seconds"])
    seconds = _validate.array(times["seconds"].to_numpy(), "seconds", ndim=(1,))
    if (bad := seconds <= 0).any():
        raise RiskcalError(
            f"seconds: {seconds[bad][0]:g} at row {_validate.first(bad)}; a time is above 0."
        )
    settings = list(times["setting"].unique())
    for baseline in baselines:
        if baseline not in settings:
            raise RiskcalError(
                f"baselines: {baseline!r} was not measured; settings: {', '.join(map(str, settings))}."
            )
    rounds = np.sort(times["round"].unique())[_validate.count(warm_up, "warm_up", least=0) :]
    if not rounds.size:
        raise RiskcalError(f"warm_up: {warm_up} drops every round; measure more, or drop fewer.")
    kept = times[times["round"].isin(rounds)]
    counts = kept.pivot_table(
        index=["round", "run"], columns="setting", values="seconds", aggfunc="size"
    )
    if not (counts.reindex(columns=settings) == 1).to_numpy().all():
        raise RiskcalError(
            "times: measure every setting exactly once on each run of each round; ratios are paired."
        )
    columns = kept.groupby("setting")["seconds"]
    table = pd.DataFrame(
        {"p50": columns.quantile(0.5), "p95": columns.quantile(0.95), "mean": columns.mean()}
    )
    total = kept.pivot_table(index="round", columns="setting", values="seconds", aggfunc="sum")
    if "tokens" in kept.columns:
        tokens = kept.pivot_table(index="round", columns="setting", values="tokens", aggfunc="sum")
        table["tokens_per_second"] = (tokens / total).median()
    for baseline in baselines:
        ratios = total.rdiv(total[baseline], axis=0)
        table[f"x {baseline}"] = ratios.median()
        table[f"x {baseline} low"], table[f"x {baseline} high"] = ratios.min(), ratios.max()
    return table.reindex(settings).rename_axis("setting").reset_index()
