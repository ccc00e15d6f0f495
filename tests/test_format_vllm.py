"""Outputs as vLLM's `RequestOutput` holds them: joined with the full model's, failures as such, costs from its metrics."""

import json
from pathlib import Path
from typing import Any

import pytest

from riskcal import RiskcalError, calibrate
from riskcal.records.formats import vllm


def output(text: str, index: int = 0, reason: str | None = "stop") -> dict[str, Any]:
    """`CompletionOutput` (003d3ee)."""
    return {
        "index": index,
        "text": text,
        "token_ids": list(range(len(text))),
        "cumulative_logprob": None,
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": None,
    }


def request(name: str, *outputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "request_id": name,
        "prompt": f"prompt of {name}",
        "prompt_token_ids": [1],
        "outputs": list(outputs),
        "finished": True,
        "metrics": None,
        "num_cached_tokens": 0,
    } | more


def write(path: Path, *requests: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in requests))
    return path


def different(a: str, b: str) -> float:
    return float(a != b)


def logs(folder: Path, n: int = 60) -> dict[str, Path]:
    return {
        name: write(
            folder / f"{name}.jsonl",
            *(
                request(f"r{i}", output("no" if name == "0.5" and i % 20 == 0 else "yes"))
                for i in range(n)
            ),
        )
        for name in ("full", "0.9", "0.5")
    }


def test_outputs_are_compared_with_the_full_models(tmp_path: Path) -> None:
    paths = logs(tmp_path)
    settings = {0.9: paths["0.9"], 0.5: paths["0.5"]}
    runs = vllm.read(settings, full=paths["full"], distance=different)
    assert runs.losses().mean(0).tolist() == [0.0, 0.05]
    assert runs.values["tokens"].max() == 3
    assert "seconds" not in runs.values
    assert calibrate(runs, delta=0.4).threshold == 0.5


@pytest.mark.parametrize(
    "metrics",
    [
        {"queue_time_ms": 900.0, "time_to_first_token_ms": 100.0, "generation_time_ms": 150.0},
        {"arrival_time": 3.0, "queued_ts": 5.0, "scheduled_ts": 6.0, "first_token_ts": 6.1,
         "last_token_ts": 6.25, "num_generation_tokens": 3},
    ],
    ids=["of the server", "of the engine"],
)  # fmt: skip
def test_seconds_are_those_after_the_queue(metrics: dict[str, float], tmp_path: Path) -> None:
    rows = [request(f"r{i}", output("yes"), metrics=metrics) for i in range(3)]
    path = write(tmp_path / "log.jsonl", *rows)
    runs = vllm.read({0.5: path}, full=path, distance=different)
    assert runs.values["seconds"].ravel() == pytest.approx([0.25] * 3)


def test_what_was_aborted_or_never_finished_failed(tmp_path: Path) -> None:
    full = write(tmp_path / "full.jsonl", *(request(f"r{i}", output("yes")) for i in range(4)))
    early = write(
        tmp_path / "early.jsonl",
        request("r0", output("yes")),
        request("r1", output("yes", reason="abort")),
        request("r2", output("yes", reason=None)),
        request("r3", output("yes"), finished=False),
    )
    runs = vllm.read({0.5: early}, full=full, distance=different)
    losses = dict(zip(runs.prompts, runs.losses()[:, 0], strict=True))
    assert losses == {"r0": 0, "r1": 1, "r2": 1, "r3": 1}


def test_samples_of_a_request_are_one_unit(tmp_path: Path) -> None:
    rows = [request(f"r{i}", output("yes"), output("no", 1)) for i in range(3)]
    path = write(tmp_path / "log.jsonl", *rows)
    runs = vllm.read({0.5: path}, full=path, distance=different)
    assert (len(runs.prompts), runs.n) == (6, 3)
    assert "r0#1" in runs.prompts


def test_requests_that_vllm_counted_are_joined_by_their_prompts(tmp_path: Path) -> None:
    full = write(tmp_path / "full.jsonl", *(request(f"r{i}", output("yes")) for i in range(3)))
    rows = [request(f"r{i}", output("yes")) | {"request_id": str(100 + i)} for i in range(3)]
    early = write(tmp_path / "early.jsonl", *rows)
    with pytest.raises(RiskcalError, match=r"no output for '100' \(3 such rows\).*key='prompt'"):
        vllm.read({0.5: early}, full=full, distance=different)
    assert vllm.read({0.5: early}, full=full, distance=different, key="prompt").n == 3


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"outputs": [output("a")]}, "row 0 has no request_id"),
        ({"request_id": "a"}, "row 0 has no outputs"),
        (request("a"), "row 0 has no outputs"),
        (request("a", {"index": 0}), "row 0 has no text in its output 0"),
        (request("a", output("a") | {"text": None}), "row 0 has no text in its output 0"),
        (request("a", output("a")), "'a' is the only prompt"),
    ],
)
def test_what_is_no_output_is_refused(row: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write(tmp_path / "log.jsonl", row)
    with pytest.raises(RiskcalError, match=named):
        vllm.read({0.5: path}, full=path, distance=different)


def numbered(path: Path, prompts: list[str], text: str = "a", **more: Any) -> Path:
    """Requests that vLLM counted."""
    rows = [request(str(i), output(text) | more, prompt=p) for i, p in enumerate(prompts)]
    return write(path, *rows)


def test_counted_ids_of_other_prompts_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    full = numbered(tmp_path / "full.jsonl", ["x", "y", "z"])
    early = numbered(tmp_path / "early.jsonl", ["y", "x", "z"])
    said = r"early.jsonl: row 0: request_id '0' asks 'y', and 'x' in .*full.jsonl: row 0 \(2 such"
    with pytest.raises(RiskcalError, match=said):
        vllm.read({0.5: early}, full=full, distance=different)
    assert vllm.read({0.5: early}, full=full, distance=different, key="prompt").n == 3


def test_prompts_that_were_sent_under_many_ids_are_told(tmp_path: Path) -> None:
    path = numbered(tmp_path / "log.jsonl", ["x", "y"] * 3)
    with pytest.warns(UserWarning, match="repeats an earlier prompt's text"):
        vllm.read({0.5: path}, full=path, distance=different)
    path = numbered(tmp_path / "other.jsonl", ["x", "y"])
    assert "text" not in vllm.read({0.5: path}, full=path, distance=different).labels


def test_tokens_are_left_out_where_a_line_has_none(tmp_path: Path) -> None:
    path = numbered(tmp_path / "log.jsonl", ["x", "y"], token_ids=None)
    assert "tokens" not in vllm.read({0.5: path}, full=path, distance=different).values


def test_a_request_without_outputs_failed_with_all_its_samples(tmp_path: Path) -> None:
    two = [output("yes"), output("yes", 1)]
    full = write(tmp_path / "full.jsonl", *(request(f"r{i}", *two) for i in range(3)))
    aborted = output("", reason="abort") | {"text": None}
    rows = [request("r0"), request("r1", *two), request("r2", two[0], aborted | {"index": 1})]
    early = write(tmp_path / "early.jsonl", *rows)
    runs = vllm.read({0.5: early}, full=full, distance=different)
    lost = dict(zip(runs.prompts, runs.values["dissimilarity"][:, 0], strict=True))
    assert lost == {"r0#0": 1, "r0#1": 1, "r1#0": 0, "r1#1": 0, "r2#0": 0, "r2#1": 1}


def test_a_prompt_that_a_setting_lacks_is_told_by_its_line_and_the_remedy_works(
    tmp_path: Path,
) -> None:
    paths = logs(tmp_path, 3)
    short = write(tmp_path / "0.5.jsonl", *(request(f"r{i}", output("yes")) for i in range(2)))
    settings = {0.9: paths["0.9"], 0.5: short}
    with pytest.raises(RiskcalError, match=r"row 2: 'r2' is not in .*0.5.jsonl .*\[\]\}"):
        vllm.read(settings, full=paths["full"], distance=different)
    with short.open("a") as file:
        file.write('{"request_id": "r2", "finished": false, "outputs": []}\n')
    runs = vllm.read(settings, full=paths["full"], distance=different)
    assert runs.values["failed"].sum() == 1


@pytest.mark.parametrize(
    ("distance", "named"),
    [
        (lambda a, b: float(a == b), r"gives 1 for .*full.jsonl: row 0, .*1 - similarity"),
        (lambda a, b: 1.5 * (a != b), r"gives 1.5 for .*0.5.jsonl: row 0, of 'no'"),
        (lambda a, b: None, r"gives None for .*full.jsonl: row 0"),
    ],
)
def test_what_is_no_distance_is_refused(distance: Any, named: str, tmp_path: Path) -> None:
    paths = logs(tmp_path, 3)
    with pytest.raises(RiskcalError, match=f"^distance: {named}"):
        vllm.read({0.5: paths["0.5"]}, full=paths["full"], distance=distance)


def test_settings_that_are_none_or_come_again_are_refused(tmp_path: Path) -> None:
    paths = logs(tmp_path, 3)
    for settings, named in [
        ({0.5: paths["0.5"], "0.50": paths["0.9"]}, "'0.50' is 0.5 again"),
        ({"low": paths["0.5"]}, "'low': threshold is 'low', which is none"),
    ]:
        with pytest.raises(RiskcalError, match=f"^settings: {named}"):
            vllm.read(settings, full=paths["full"], distance=different)


def test_a_clock_that_goes_back_is_told_by_its_line(tmp_path: Path) -> None:
    back = {"scheduled_ts": 5.0, "last_token_ts": 1.0}
    rows = [request(f"r{i}", output("a"), metrics=back) for i in range(2)]
    path = write(tmp_path / "log.jsonl", *rows)
    with pytest.raises(RiskcalError, match=r"row 0: by its metrics it took -4 seconds"):
        vllm.read({0.5: path}, full=path, distance=different)
