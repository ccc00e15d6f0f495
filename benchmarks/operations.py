"""The figures of docs/operations.md: delays of alarms by shadow rate, false alarms, drifts by name, and the incident drill.

``python benchmarks/operations.py`` simulates how long a monitor takes to notice at several shadow rates, counts false alarms at
the boundary and compares delays of real logs with simulated ones, does the same for drifts of features, and runs the drill of
`recipes.numbers.drill` on the shipped model. With ``--picture`` it draws the delays.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import command
import riskcal
from recipes.numbers import drill
from riskcal import RiskMonitor
from riskcal.serving import Drift, EventWatch, Shadow, alarm_delays

DELTA = 0.05
#: One false alarm in so many requests, on average.
REQUESTS = 500_000
RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
TIMES = (1.5, 2.0, 3.0, 5.0)


def coins(mean: float) -> np.ndarray:
    """Losses 0 and 1 of a mean, in thousandths."""
    return np.repeat([1.0, 0.0], [round(1000 * mean), 1000 - round(1000 * mean)])


def detection(draws: int) -> list[dict[str, float]]:
    """Requests to the alarm, by shadow rate and by how many times delta the mean loss is."""
    rows = []
    for rate in tqdm(RATES, desc="delays"):
        for times in TIMES:
            monitor = RiskMonitor(DELTA, average_run_length=REQUESTS * rate)
            monitor.update(np.random.default_rng(0).random(1000) < 0.5 * DELTA)
            found = alarm_delays(monitor, coins(times * DELTA), rate=rate, draws=draws)
            half, late = np.quantile(found, [0.5, 0.9])
            rows.append({"rate": rate, "times delta": times, "median": half, "90%": late})
    return rows


def false_alarms(streams: int, evaluations: int = 20_000) -> dict[str, float]:
    """At a mean of exactly delta, where every alarm is false."""
    rng = np.random.default_rng(1)
    raised = [
        RiskMonitor(DELTA, epsilon=0.05).update(rng.random(evaluations) < DELTA).alarm
        for _ in tqdm(range(streams), desc="false alarms")
    ]
    return {
        "streams": streams,
        "evaluations": evaluations,
        "share": float(np.mean(raised)),
        "allowed": 0.05,
    }


def of_logs(days: int, rate: float = 0.2) -> list[dict[str, float]]:
    """Mean requests to the alarm in logs of hashed shadows, beside the simulated one."""
    rng, shadow, rows = np.random.default_rng(2), Shadow(rate), []
    for mean in (0.1, 0.15, 0.3):
        found = []
        for day in tqdm(range(days), desc=f"logs, mean {mean}"):
            watch, request = EventWatch(RiskMonitor(DELTA, average_run_length=1000)), 0
            while not watch.monitor.alarm:
                request += 1
                if shadow.takes(f"{mean}/{day}/{request}"):
                    told = {
                        "gen_ai.response.id": f"{request}",
                        "riskcal.loss": float(rng.random() < mean),
                    }
                    watch.follow(
                        [json.dumps({"name": "riskcal.shadow.evaluated", "attributes": told})]
                    )
            found.append(request)
        fresh = RiskMonitor(DELTA, average_run_length=1000)
        foretold = alarm_delays(fresh, coins(mean), rate=rate, draws=4000, seed=3).mean()
        rows.append(
            {
                "mean loss": mean,
                "requests": float(np.mean(found)),
                "foretold": float(foretold),
                "ratio": float(np.mean(found) / foretold),
            }
        )
    return rows


def requests(
    rng: np.random.Generator,
    n: int,
    *,
    length: float = 40.0,
    sure: float = 0.9,
    strings: float = 0.1,
) -> dict[str, list[float]]:
    """Features of n requests."""
    return {
        "prompt length": rng.poisson(length, n).tolist(),
        "confidence": rng.beta(20 * sure, 20 * (1 - sure), n).tolist(),
        "share of string": (rng.binomial(30, strings, n) / 30).tolist(),
    }


def drifts(streams: int) -> dict[str, Any]:
    """False alarms after a reference of 1,000, and requests until a shift is told by its name after 1,000 without one."""
    false = []
    for seed in tqdm(range(streams), desc="drifts"):
        rng = np.random.default_rng(seed)
        false.append(bool(Drift(requests(rng, 1000)).update(requests(rng, 2000)).drifted))
    shifts = {
        "prompts a tenth longer": ({"length": 44.0}, "prompt length"),
        "prompts half as long again": ({"length": 60.0}, "prompt length"),
        "confidence .85 for .9": ({"sure": 0.85}, "confidence"),
        "twice as many tokens in strings": ({"strings": 0.2}, "share of string"),
    }
    rows = []
    for name, (changed, feature) in shifts.items():
        delays = []
        for seed in tqdm(range(40), desc=name, leave=False):
            rng = np.random.default_rng([1, seed])
            drift = Drift(requests(rng, 1000)).update(requests(rng, 1000))
            told = drift.update(requests(rng, 1000, **changed)).drifted
            delays += [next((one.at - 1000 for one in told if one.feature == feature), np.inf)]
        rows.append(
            {
                "shift": name,
                "median requests": float(np.median(delays)),
                "not within 1,000": int(np.isinf(delays).sum()),
            }
        )
    return {"streams": streams, "false": float(np.mean(false)), "allowed": 0.05, "shifts": rows}


def incident(days: int, folder: Path) -> dict[str, Any]:
    """The drill: what each calibration says, and days on which traffic shifts."""
    import torch

    from riskcal_adapters.torch import load_example

    torch.set_num_threads(1)
    decoder, rate, run_length, delta = load_example("numbers"), 0.3, 1000, 0.15
    runs = {
        digits: drill.recorded(
            decoder,
            drill.prompts(digits, 200, seed=1),
            [0.9, 0.75],
            folder / f"runs-{digits}",
        )
        for digits in (drill.NOTE, drill.DOCUMENT)
    }
    told: dict[str, Any] = {
        "rate": rate,
        "run length": run_length,
        "delta": delta,
        "calibrations": [],
    }
    for digits, one in runs.items():
        for objective, tolerated in (("textual", 0.05), ("risk_clipped", delta)):
            calibration = riskcal.calibrate(one, delta=tolerated, objective=objective)
            told["calibrations"].append(
                {
                    "digits": digits,
                    "objective": objective,
                    "delta": tolerated,
                    "certified": calibration.threshold if calibration.certified else None,
                    "means": dict(
                        zip(
                            map(str, one.thresholds.tolist()),
                            one.losses(objective).mean(0).round(4).tolist(),
                            strict=True,
                        )
                    ),
                }
            )
    policy = riskcal.calibrate(runs[drill.NOTE], delta=delta, objective="risk_clipped").policy()
    kept = {"delta": delta, "run_length": run_length}
    reference = drill.serve(
        decoder,
        policy,
        drill.prompts(drill.NOTE, 200, seed=2),
        [],
        folder / "reference",
        rate=0.0,
        **kept,
    )
    lost = runs[drill.DOCUMENT].losses("risk_clipped")[
        :, list(runs[drill.DOCUMENT].thresholds).index(policy.threshold)
    ]
    told["days"] = []
    for seed in range(days):
        notes, documents = (
            drill.prompts(drill.NOTE, 200, seed=3 + seed),
            drill.prompts(drill.DOCUMENT, 500, seed=3 + seed),
        )
        day = drill.serve(
            decoder,
            policy,
            notes,
            documents,
            folder / f"day-{seed}",
            rate=rate,
            reference=reference.log,
            salt=f"{seed}",
            **kept,
        )
        count = (day.pulled or len(day.done)) - day.shift
        before = drill.compared(decoder, day.done[: day.shift], notes).mean(1)
        after = drill.compared(decoder, day.done[day.shift :][:count], documents[:count]).mean(1)
        delays = drill.foretold(day, lost, rate)
        deep = (
            [bool((one.exit_layers == decoder.n_layers).all()) for one in day.done[day.pulled :]]
            if day.pulled
            else []
        )
        names = [
            event["attributes"]["gen_ai.response.id"]
            for event in drill.events(day.log)
            if event["name"] == "riskcal.request.served"
        ]
        told["days"].append(
            {
                "agreement before": before[0],
                "agreement after": after[0],
                "schema failures before": before[1],
                "schema failures after": after[1],
                "alarm after requests": None if day.alarm is None else day.alarm - day.shift + 1,
                "foretold 5%, 50%, 95%": np.quantile(delays, [0.05, 0.5, 0.95]).tolist(),
                "drifted": [
                    f"{one.feature} {one.way} at {one.at - day.shift}"
                    for one in day.watch.drift.drifted
                ],
                "asked after the pull": len(deep),
                "of them wholly deep": sum(deep),
                "requests": len(day.done),
                "served once in the log": len(set(names)) if len(set(names)) == len(names) else -1,
                "odd": dict(day.watch.counts),
            }
        )
    return told


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Delays over rates, a line for each drift."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for times in TIMES:
        own = [row for row in rows if row["times delta"] == times]
        line = axes.plot(
            [row["rate"] for row in own],
            [row["median"] for row in own],
            marker="o",
            label=f"{times:g} times delta",
        )
        axes.plot(
            [row["rate"] for row in own],
            [row["90%"] for row in own],
            ls=":",
            color=line[0].get_color(),
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="share of requests that are shadowed",
        ylabel="requests to the alarm",
    )
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="mean loss", frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--picture", type=Path, help="where the delays are drawn")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the simulated streams, to try it out"
    )
    parser.add_argument("--days", type=int, default=2, help="of the drill; 0 leaves it out")
    options = parser.parse_args()

    def some(count: int) -> int:
        return max(2, round(count * options.scale))

    told: dict[str, Any] = {"detection": detection(some(1000))}
    if options.picture:
        draw(told["detection"], options.picture)
    told["false alarms"] = false_alarms(some(2000))
    told["logs"] = of_logs(some(400))
    told["drifts"] = drifts(some(400))
    if options.days:
        with tempfile.TemporaryDirectory() as folder:
            told["drill"] = incident(options.days, Path(folder))
    print(json.dumps(told, indent=1))
    command.keep(told, options.json)


if __name__ == "__main__":
    main()
