"""Samples of the lm-evaluation-harness: one folder per setting, ``samples_{task}_{date}.jsonl`` in each (``--log_samples``)."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from riskcal import _validate
from riskcal._validate import RiskcalError
from riskcal.records.formats import settings as settings_
from riskcal.records.runs import Runs

_NAME = re.compile(r"samples_(?P<task>.+?)(?:_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl(?:\.gz|\.zst)?")

#: What a sample holds beside its metrics; older versions have no list of these.
_OWN = set(
    "doc_id doc target arguments resps filtered_resps filter metrics doc_hash prompt_hash target_hash".split()
)


def read(
    settings: settings_.Settings,
    *,
    full: str | os.PathLike[str] | None = None,
    metric: str | Mapping[str, str] | None = None,
    filter: str | None = None,
    loss: str = "1 - x",
    coordinates: Sequence[str] = ("threshold",),
) -> Runs:
    """Runs of the harness's samples, joined by task and ``doc_hash``.

    Parameters
    ----------
    settings : mapping of threshold to folder
        What ``--output_path`` was with each threshold; with several ``coordinates`` a tuple of them instead of a threshold.
    full : path, optional
        The folder of the full model, which the objectives ``risk`` and ``risk_clipped`` need.
    metric : str or mapping of task to str, optional
        The metric that the loss is made of; may be left out where there is but one.
    filter : str, optional
        The filter whose answers count. A task with several, ``strict-match`` and ``flexible-extract``, has a row for each: one
        has to be chosen, and before the results are seen.
    loss : str
        What the metric becomes: ``"1 - x"``, or ``"x"`` of an error rate, ``"1 - x / 100"`` of a percentage.
    coordinates : sequence of str
        What tells settings apart, ``threshold`` among them.

    Returns
    -------
    Runs
        ``risk`` is the loss, ``group`` the task, and a prompt ``task/doc_hash``. Documents that stand several times in a task
        are told apart as ``task/doc_hash#1`` and so on, in the order of ``doc_id``, and share a cluster.

    Raises
    ------
    RiskcalError
        For several filters or metrics and none chosen, two files of one task in a folder, a document that was asked
        differently in two settings (``prompt_hash``), and what `Runs.from_frame` refuses.

    Examples
    --------
    >>> from pathlib import Path
    >>> import pandas as pd
    >>> from riskcal.records.formats import lm_eval
    >>> for name, scores in {"full": [1, 1], "0.9": [1, 1], "0.5": [1, 0]}.items():  # a folder each
    ...     Path(name).mkdir()
    ...     samples = {"doc_id": [0, 1], "doc_hash": ["d0", "d1"], "prompt_hash": ["p0", "p1"], "filter": "none",
    ...                "metrics": [["acc"], ["acc"]], "acc": scores}
    ...     pd.DataFrame(samples).to_json(f"{name}/samples_gsm8k_2026-11-29.jsonl", orient="records", lines=True)
    >>> runs = lm_eval.read({0.9: "0.9", 0.5: "0.5"}, full="full")
    >>> runs.losses("risk").mean(0).tolist()
    [0.0, 0.5]
    """
    formula = settings_.formula(loss)
    frame = pd.concat(
        [
            _samples(folder).assign(**setting, setting=number)
            for number, (setting, folder) in enumerate(
                settings_.candidates(settings, coordinates, full)
            )
        ],
        ignore_index=True,
    )
    # a task with one filter is read whichever is chosen for the others: left out, it could not be seen to fail
    alone = frame.groupby("group")["filter"].transform("nunique") == 1
    found = set(frame["filter"][~alone]) or set(frame["filter"])
    if filter is not None or not alone.all():
        kept = settings_.only(found, filter, "filter", "the log")
        frame = frame[alone | (frame["filter"] == kept)]
    _refuse_no_numbers(frame)
    chosen = {
        str(task): settings_.only(
            set().union(*rows["scores"]),
            metric.get(str(task)) if isinstance(metric, Mapping) else metric,
            "metric",
            f"task {task}",
        )
        for task, rows in frame.groupby("group", sort=False)
    }
    values = formula(_scores(frame, chosen))
    _refuse_out_of_range(frame, values, chosen)
    frame = _named(frame).assign(risk=values)
    settings_.refuse_gaps(frame, "write its sample there, with the worst score")
    clusters = ["cluster"] if "cluster" in frame else []
    return settings_.runs(frame, ["prompt", *clusters, "group", *coordinates, "risk"], coordinates)


def _samples(folder: Path) -> pd.DataFrame:
    """The samples of all tasks in one setting's folder, or in one file."""
    paths = [folder] if folder.is_file() else sorted(folder.rglob("samples_*.jsonl*"))
    tasks: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    for path in paths:
        if not (found := _NAME.fullmatch(path.name)):
            continue
        task = found["task"]
        if task in tasks:
            raise RiskcalError(
                f"{folder}: holds two files of task {task}, {tasks[task].relative_to(folder)} and {path.relative_to(folder)}; "
                "one setting ran once. Give each run a folder of its own, and name the one to count."
            )
        tasks[task] = path
        rows += [_sample(sample, task, path, row) for row, sample in settings_.objects(path)]
    if not rows:
        raise RiskcalError(
            f"{folder}: holds no samples_*.jsonl with rows; results_*.json has means, of which no certificate can be made. "
            "Run lm_eval with --log_samples and --output_path."
        )
    return pd.DataFrame(rows)


def _sample(sample: dict[str, Any], task: str, path: Path, row: int) -> dict[str, Any]:
    if not isinstance(sample.get("doc_hash"), str):
        raise RiskcalError(
            f"{path}: row {row} has no doc_hash, by which settings are joined; log the samples with a version of lm_eval that "
            "writes it."
        )
    own = {name: sample.get(name) for name in ("doc_hash", "prompt_hash")}
    own["filter"] = sample.get("filter", "none")
    for name, value in own.items():
        if not isinstance(value, str) and (name != "prompt_hash" or value is not None):
            raise RiskcalError(
                f"{path}: row {row}: {name} is {_validate.shown(value)}, not a text."
            )
    names = sample.get("metrics", [name for name in sample if name not in _OWN])
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
        raise RiskcalError(
            f"{path}: row {row}: metrics is {_validate.shown(names)}, not a list of their names."
        )
    # some metrics have pairs, of which only all samples together make a number
    scores = {name: settings_.finite(sample.get(name)) for name in names}
    return own | {
        "group": task,
        "doc_id": settings_.finite(sample.get("doc_id")),
        "scores": {name: value for name, value in scores.items() if value is not None},
        "others": {name: sample.get(name) for name in names},
        "place": f"{path}: row {row}",
    }


def _refuse_no_numbers(frame: pd.DataFrame) -> None:
    """Refuse a task of which no metric is a number, with what stands there."""
    for task, rows in frame.groupby("group", sort=False):
        first = rows.iloc[0]
        if rows["scores"].map(bool).any() or not first["others"]:
            continue
        name, value = next(iter(first["others"].items()))
        raise RiskcalError(
            f"metric: task {task} has none of plain numbers; {name} is {_validate.shown(value)} in {first['place']}. Write a "
            "number for each sample, 0 or 1 where it is right or wrong; what only all samples together make a number of, as "
            "pairs do, has no loss of a sample: run the task with a metric that has."
        )


def _scores(frame: pd.DataFrame, chosen: Mapping[str, str]) -> pd.Series:
    """The chosen metric of each sample; a sample without one is refused, since to leave it out would select on the outcome."""
    scores = [
        each.get(chosen[task]) for each, task in zip(frame["scores"], frame["group"], strict=True)
    ]
    missing = [score is None for score in scores]
    if any(missing):
        first = frame[missing].iloc[0]
        raise RiskcalError(
            f"{first['place']} has no finite number for {chosen[first['group']]} ({sum(missing)} such samples). An answer that "
            "failed scores the worst: write it there, or choose another metric."
        )
    return pd.Series(scores, index=frame.index, dtype="float64")


def _refuse_out_of_range(frame: pd.DataFrame, values: pd.Series, chosen: Mapping[str, str]) -> None:
    for place, task, value in zip(frame["place"], frame["group"], values, strict=True):
        if not -_validate.TOLERANCE <= value <= 1 + _validate.TOLERANCE:
            raise RiskcalError(
                f"{place}: {chosen[task]} makes a loss of {value:g}, outside [0, 1]; give loss= as what the metric is: '1 - x', "
                "'x', '1 - x / 100'."
            )


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """Prompts by task and document; a document that stands several times is several prompts of one cluster."""
    document = frame["group"] + "/" + frame["doc_hash"]
    setting = frame["setting"]
    again = frame.sort_values("doc_id", kind="stable").groupby([setting, document]).cumcount()
    prompt = document.where(again.reindex(frame.index) == 0, document + "#" + again.astype(str))
    asked = frame.groupby(prompt)["prompt_hash"].transform("nunique", dropna=False) > 1
    if asked.any():
        raise RiskcalError(
            f"{frame['place'][asked].iloc[0]}: document {prompt[asked].iloc[0]} was asked in two ways (prompt_hash; "
            f"{prompt[asked].nunique()} such documents), so that settings cannot be compared on it. Run all of them with "
            "the same num_fewshot, seeds and chat template."
        )
    frame = frame.assign(prompt=prompt)
    return frame.assign(cluster=document) if again.any() else frame
