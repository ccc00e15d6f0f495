"""The report in a real browser: nothing is requested, the slider moves all that it should, axe finds nothing; a million rows too.

``pip install '.[browser]'``, a Chromium (Debian: ``apt-get install chromium``; another one by the variable CHROMIUM), then
``python benchmarks/report_page.py``. Every check raises; what is printed is what was seen.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

import riskcal
from riskcal import report
from riskcal.cli.demo import write_report
from riskcal.serving import EventLog, EventWatch

VIEWS = [(390, "light"), (390, "dark"), (1366, "light"), (1366, "dark"), (1920, "light")]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def pages(folder: Path) -> dict[str, Path]:
    """One page of each kind."""
    runs, traces = riskcal.load_example("g2p"), riskcal.load_example("g2p-traces")
    found = {name: folder / f"{name}.html" for name in KINDS}
    calibration = riskcal.calibrate(runs, delta=0.1)
    write_report(found["demo"], calibration)
    report.write(found["no delta"], runs, objective="risk")
    report.write(found["nothing certified"], runs.take(np.arange(30)), delta=0.01)
    report.write(found["traces"], traces)
    report.write(found["policy"], calibration.policy())
    report.write(found["policy by hand"], riskcal.ExitPolicy(threshold=0.5))
    report.write(found["one of several deltas"], riskcal.calibrate(runs, delta=[0.05, 0.1])[1])
    report.write(
        found["several risks"], riskcal.calibrate(runs, delta={"textual": 0.1, "risk": 0.05})
    )
    cascade, grid = riskcal.load_example("cascade"), (0.9, 0.7, 0.5)
    pairs = riskcal.replay_traces(cascade, [[a, b] for a in grid for b in grid], exact=True)
    calibration = riskcal.calibrate(pairs, delta=0.1, cost="price")
    report.write(found["cascade"], calibration, traces=cascade)
    stress = riskcal.load_example("stress")
    heads = riskcal.heads.certified(
        stress.confidence[:, :-1], stress.agrees[:, :-1], prompts=stress.prompt, max_tokens=1
    )
    report.write(found["heads"], heads.policy())
    one = riskcal.calibrate(np.zeros((100, 1)), thresholds=[0.5], delta=0.1)
    report.write(found["one candidate"], one)
    log = EventLog(folder / "events.jsonl")
    for i in range(100):
        of = {"gen_ai.response.id": str(i), "riskcal.task": HOSTILE if i % 2 else "news"}
        log.write("riskcal.request.served", of | {"riskcal.exit.layers": {"1": 5, "8": 1}})
        log.write("riskcal.shadow.evaluated", of | {"riskcal.loss": 0.05})
    report.write(found["events"], EventWatch(riskcal.RiskMonitor(0.1)).read(log.path))
    texts = riskcal.load_example("g2p-generations")
    texts["text"] = HOSTILE
    texts["tokens"] = [[HOSTILE, *list(one)[1:]] for one in texts["tokens"]]
    report.write(found["hostile"], runs, delta=0.1, generations=texts, title=HOSTILE)
    return found


KINDS = (
    "demo",
    "no delta",
    "nothing certified",
    "one of several deltas",
    "several risks",
    "cascade",
    "one candidate",
    "traces",
    "policy",
    "policy by hand",
    "heads",
    "events",
    "hostile",
)


@contextmanager
def opened(browser: Browser, path: Path, width: int, scheme: Any, **more: Any) -> Iterator[Page]:
    """A page that must say nothing on the console, open no dialog, ask for nothing and be no wider than its window."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, **more
    )
    page, odd = context.new_page(), []
    page.on("console", lambda message: odd.append(message.text))
    page.on("pageerror", lambda error: odd.append(str(error)))
    page.on("dialog", lambda dialog: odd.append(dialog.message))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert not odd, odd
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()], asked
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
    context.close()


SEEN = """() => ({
  cells: [...document.querySelectorAll("[data-cell]")].map((one) => one.textContent),
  row: [...document.querySelector("#deltas tr.chosen").cells].map((one) => one.textContent),
  statement: document.getElementById("statement").textContent,
  marks: [...document.querySelectorAll("[data-at]")].map((one) => one.getAttribute("transform")),
  thresholds: [...document.querySelectorAll("[data-key]:not([hidden]) h4")].map((one) => one.firstChild.textContent),
})"""


def move(page: Page) -> int:
    """Walk the slider from end to end by keys; everything has to agree at each step. Gives the steps."""
    slider = page.get_by_role("slider", name="Tolerated loss, delta")
    slider.focus()
    slider.press("Home")
    steps, last = int(slider.get_attribute("max") or 0) + 1, None
    for step in range(steps):
        seen = page.evaluate(SEEN)
        assert seen["cells"] == seen["row"], seen
        assert slider.get_attribute("aria-valuetext") == f"delta {seen['row'][0]}"
        assert (
            f"delta {seen['row'][0]} " in seen["statement"]
            or f"most {seen['row'][0]} " in (seen["statement"])
        )
        if last is not None:
            assert seen["row"][0] != last["row"][0]
            assert seen["marks"] != last["marks"] or float(seen["row"][0]) > 0.2
            if seen["row"][1] != last["row"][1]:
                assert seen["thresholds"] != last["thresholds"]
        expected = "Threshold full" if seen["row"][1] == "full" else f"Threshold {seen['row'][1]}"
        assert set(seen["thresholds"]) == {expected}, (step, seen["thresholds"])
        last = seen
        slider.press("ArrowRight")
    return steps


HELD = """() => {
  const one = document.activeElement, box = one.getBoundingClientRect();
  const all = [...document.querySelectorAll("a, summary, input, [tabindex='0']")].filter((other) => other.checkVisibility());
  return {at: all.indexOf(one), of: all.length, ring: getComputedStyle(one).outlineStyle, seen: box.width > 0 && box.height > 0};
}"""


def tabbed(page: Page) -> int:
    """Walk by Tab through all that takes keys: in the page's order, nothing left out, each seen and ringed. Gives the steps."""
    places: list[int] = []
    while True:
        page.keyboard.press("Tab")
        held = page.evaluate(HELD)
        if held["at"] < 0 or held["at"] in places:
            break
        assert held["seen"], held
        assert held["ring"] != "none", held
        places.append(held["at"])
    assert places == list(range(page.evaluate(HELD)["of"])), places
    return len(places)


def slid(page: Page) -> int:
    """Walk the slider from end to end by keys: what stands at each step is the table's row of it. Gives the steps."""
    slider = page.get_by_role("slider", name="Tolerated loss, delta")
    slider.focus()
    slider.press("Home")
    steps = int(slider.get_attribute("max") or 0) + 1
    for _ in range(steps):
        seen = page.evaluate(SEEN)
        assert seen["cells"] == seen["row"], seen
        slider.press("ArrowRight")
    return steps


def faults(page: Page) -> list[str]:
    """What axe finds, with all that is folded up open."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    found = Axe().run(page).response["violations"]
    return [f"{one['impact']}: {one['id']} ({len(one['nodes'])})" for one in found]


def million(folder: Path) -> dict[str, float]:
    """A report of a million rows, from a Parquet file to the page."""
    n, k = 50_000, 19
    rng = np.random.default_rng(0)
    losses = (rng.random((n, k)) < np.linspace(0, 0.3, k)) * rng.random((n, k))
    layers = np.broadcast_to(np.linspace(8, 2, k), (n, k))
    grid = np.r_[np.inf, np.linspace(0.95, 0.05, k)]
    runs = riskcal.Runs.from_arrays(
        thresholds=grid,
        prompts=[f"p{i}" for i in range(n)],
        dissimilarity=np.c_[np.zeros(n), losses],
        layers=np.c_[np.full(n, 8.0), layers],
    )
    runs.write(folder / "runs.parquet")
    started, path = time.perf_counter(), folder / "million.html"
    report.write(path, riskcal.Runs.read(folder / "runs.parquet"), delta=0.1)
    seconds = time.perf_counter() - started
    assert seconds < 20, seconds
    return {"rows": n * len(grid), "seconds": round(seconds, 1), "bytes": path.stat().st_size}


def chromium() -> str:
    """Where it stands."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        raise SystemExit("no chromium: apt-get install chromium, or name one by CHROMIUM")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--shots", type=Path, help="leave a picture of each view in this folder")
    options = parser.parse_args()
    browser_path = chromium()
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        made = pages(Path(name))
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for kind, path in made.items():
            found: list[str] = []
            for width, scheme in VIEWS:
                with opened(browser, path, width, scheme) as page:
                    if options.shots is not None:
                        shot = options.shots / f"{kind.replace(' ', '-')}-{width}-{scheme}.png"
                        page.screenshot(path=shot, full_page=True)
                    found += faults(page)
            assert not [one for one in found if one.startswith(("serious", "critical"))], found
            seen[kind] = {"bytes": path.stat().st_size, "axe": sorted(set(found))}
            with opened(browser, path, 1366, "light") as page:
                seen[kind]["steps by Tab"] = tabbed(page)
                if page.locator("#delta-slider").count():
                    seen[kind]["steps of the slider"] = slid(page)
        with opened(browser, made["policy"], 1366, "light") as page:
            page.evaluate("document.body.append(document.createElement('img'))")
            assert "critical: image-alt (1)" in faults(page), "axe sees nothing"
        with opened(browser, made["demo"], 1366, "light") as page:
            seen["steps of the slider"] = move(page)
        with opened(browser, made["demo"], 390, "light", java_script_enabled=False) as page:
            assert not page.locator("#delta-slider").is_visible()
            assert page.locator("svg.chart").first.is_visible()
        with opened(browser, made["demo"], 800, "dark") as page:
            page.emulate_media(media="print")
            assert not page.locator("nav").is_visible()
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(255, 255, 255)"
            )
        browser.close()
        seen["a million rows"] = million(Path(name))
    print(pd.json_normalize(seen).T.to_string(header=False))
    if options.json is not None:
        options.json.write_text(json.dumps(seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
