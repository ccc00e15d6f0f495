"""Pages say what holds of low thresholds that are strict, of rows of unequal length, and of what was tested beside a loss."""

import html
import math
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from riskcal import ExitPolicy, RiskcalError, Runs, Traces, calibrate, report
from riskcal.report.curves import _axis
from riskcal.report.exits import layers_of, reliability
from riskcal.report.guarantee import assumptions
from riskcal.report.write import _shown

N = 120


def runs(grid: tuple[float, ...], **options: Any) -> Runs:
    loss = np.random.default_rng(0).random(N)
    parts = [
        {"threshold": t, "dissimilarity": (loss < q).astype(float), "layers": 6.0 - j}
        for j, (t, q) in enumerate(zip(grid, (0.0, 0.0, 0.4), strict=True))
    ]
    parts.append({"threshold": math.inf, "dissimilarity": 0.0, "layers": 8.0})
    frames = [
        pd.DataFrame(part | {"prompt": [f"q{i}" for i in range(N)], "price": 0.25})
        for part in parts
    ]
    return Runs.from_frame(pd.concat(frames), costs=["price"], **options)


def ragged() -> Traces:
    """Entropies, which stop where they are low: the first row at its second of two exits, the others at their second of three."""
    confidence = [[0.9, 0.1], *[[0.9, 0.2, 0.5]] * (N - 1)]
    return Traces.from_arrays(
        prompt=[f"q{i}" for i in range(N)],
        position=[0] * N,
        confidence=confidence,
        agrees=[[False, True], *[[False, i % 2 == 0, True] for i in range(1, N)]],
    )


def plain(text: Any) -> str:
    return html.unescape(re.sub(r"<[^>]+>", " ", str(text)))


@pytest.mark.parametrize("delta", [0.001, 0.2], ids=["nothing certified", "certified"])
def test_exits_are_counted_in_the_direction_of_the_calibration(delta: float) -> None:
    low = runs((0.05, 0.3, 0.95), lower_is_stricter=True)
    calibration = calibrate(low, delta=delta)
    strictest = 0.3 if calibration.certified else 0.05
    (exits, _) = _shown(None, calibration, ragged(), None)
    assert f"leave at each exit at threshold {strictest}" in plain(exits.body)
    at = ExitPolicy(threshold=strictest, lower_is_stricter=True)
    expected = [2] * N if calibration.certified else [2, *[3] * (N - 1)]
    assert sorted(layers_of(ragged(), at).tolist()) == expected
    assert _axis(calibration._problem)[1] == "exit threshold (lower: more cautious)"


def test_rows_of_unequal_length_leave_at_their_own_last_exit_and_high_values_stop() -> None:
    assert sorted(layers_of(ragged(), ExitPolicy(threshold=0.95)).tolist()) == [2, *[3] * (N - 1)]
    assert set(layers_of(ragged(), ExitPolicy(threshold=0.8)).tolist()) == {1}


def test_a_head_is_judged_by_the_rows_that_have_it_as_an_exit() -> None:
    text = plain(reliability(ragged()).body)
    rows = re.findall(r"\b([12])\s+(119|120)\s+([\d.]+)", text)
    share = np.mean([i % 2 == 0 for i in range(1, N)])
    assert [(layer, n) for layer, n, _ in rows] == [("1", "120"), ("2", "119")]
    assert [float(mean) for *_, mean in rows] == pytest.approx([0.0, share], abs=1e-3)


def test_assumptions_name_what_else_was_tested() -> None:
    of = runs((0.95, 0.3, 0.05))
    whole = " ".join(
        assumptions(calibrate(of, delta=0.2, budget={"price": (0.5, 1.0)}).certificate)
    )
    assert "No request costs more price than the largest" in whole
    assert "mean over what is served" in whole
    selective = " ".join(assumptions(calibrate(of, delta=0.2, objective="selective").certificate))
    assert "mean over the requests that stopped early" in selective
    assert "No request costs more" not in selective


def test_a_page_has_a_path() -> None:
    with pytest.raises(RiskcalError, match="path: 3"):
        report.write(3, ExitPolicy.full_model())  # type: ignore[arg-type]
