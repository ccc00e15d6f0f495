"""`riskcal demo`: what it prints and writes is the calibration of the shipped records, made by the library itself."""

import pytest
from typer.testing import CliRunner

import riskcal
from riskcal.cli.app import app


@pytest.mark.parametrize(("delta", "certified"), [(0.1, True), (0.0001, False)])
def test_the_demo_writes_the_policy_of_the_shipped_records_and_says_whether_any(
    tmp_path, delta, certified
):
    out = tmp_path / "new" / "folder"
    done = CliRunner().invoke(app, ["demo", "--out", str(out), "--delta", str(delta)])
    assert done.exit_code == (0 if certified else 1), done.output
    expected = riskcal.calibrate(riskcal.load_example("g2p"), delta=delta)
    assert expected.certified == certified
    found = riskcal.ExitPolicy.load(out / "policy.json")
    assert found == expected.policy()
    assert " ".join(expected.message.split()) in " ".join(done.output.split())
    assert (out / "risk-curve.png").read_bytes().startswith(b"\x89PNG")
    assert "Spelling to phonemes" in (out / "report.html").read_text(encoding="utf-8")
    assert sorted(file.name for file in out.iterdir()) == [
        "policy.json",
        "report.html",
        "risk-curve.png",
    ]
    rows = [line for line in done.output.splitlines() if "distance to full model" in line]
    assert len(rows) == 2  # at the delta asked for and at 0.05
    assert ("@ full" in rows[0]) != certified
