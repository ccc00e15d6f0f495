"""What a service's own machinery costs: the engine with and without it, in turns, on the same prompts.

``python benchmarks/serving_cost.py`` serves held-out words by the certified policy of the shipped spelling model through engines
that differ in what stands around them: a router, a log of events, a kill switch that looks for a file, forbidden classes of
tokens, shadows of 2% of the requests, all of these. The engines take turns in many short rounds, in an order drawn for each, and
each is compared with the plain one of the same round. Told are medians over rounds of this ratio, with their 95% intervals (by
order statistics, whatever the distribution), and the quickest round against the quickest, which other work on the machine
disturbs least; the same engine twice says how far noise alone goes.

"x plain" is the price while the engine is busy: the process's CPU seconds from when twice its slots were taken until the last
request was, divided by the plain one's. Shadows run in slots that no request wants, so after that, and a service that is busy
throughout drops them, counted. "to the end" counts all until the last of them ended, and the last line says what they must cost:
a full decode each. Forbidden classes that no output is in cost what looking costs: what they save from leaving early is the
policy's business. What is done once a request weighs most where outputs are short: a spelling has 7 tokens, a number in words
(``--model numbers``, at threshold .85) 46.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom
from tqdm.auto import tqdm

import riskcal
from engine import prompts
from riskcal import ExitPolicy
from riskcal.serving import EventLog, Inside, KillSwitch, Pattern, PolicyBook, Shadow
from riskcal_adapters.torch import Engine, Request, load_example
from riskcal_adapters.torch.decoder import Decoder

PLAIN, FULL = "plain", "full model"
#: Of requests that shadows take.
RATE = 0.02
#: Of spellings' phonemes none is in any.
FORBIDDEN = [Inside("json_string"), Inside("code_block"), Pattern(r"\d")]


def engines(
    decoder: Decoder, policy: ExitPolicy, folder: Path, shadow: Shadow, **sizes: int
) -> dict[str, Engine]:
    """By what stands around them."""
    guarded = policy.model_copy(update={"forbidden": tuple(FORBIDDEN)})
    shadows = {"shadow": shadow}
    switch = {"kill_switch": KillSwitch(folder / "off")}

    def made(name: str, one: ExitPolicy | PolicyBook, **options: object) -> Engine:
        if "events" in options:
            options["events"] = EventLog(folder / f"{name}.jsonl")
        return Engine(decoder, one, **sizes, **options)

    book = PolicyBook({"news": policy, "chat": policy})
    rest = {"events": True, **switch}
    return {
        PLAIN: made(PLAIN, policy),
        "plain again": made("again", policy),
        FULL: made("full", ExitPolicy(max_new_tokens=policy.max_new_tokens)),
        "router": made("router", book),
        "events": made("events", policy, events=True),
        "kill switch": made("switch", policy, **switch),
        "forbidden classes": made("forbidden", guarded),
        "shadow 2%": made("shadow", policy, **shadows),
        "everything but shadows": made(
            "rest", PolicyBook({"news": guarded, "chat": guarded}), **rest
        ),
        "everything": made(
            "all", PolicyBook({"news": guarded, "chat": guarded}), **rest, **shadows
        ),
    }


def two_percent(requests: list[Request]) -> Shadow:
    """A salt by which just so many of them are taken."""
    for salt in range(1000):
        shadow = Shadow(RATE, salt=str(salt))
        if sum(shadow.takes(str(one.id)) for one in requests) == round(RATE * len(requests)):
            return shadow
    raise AssertionError("no salt takes 2% of these ids")


def served(engine: Engine, requests: list[Request], slots: int) -> tuple[float, float]:
    """CPU seconds a request of a busy engine, and of all until they ended.

    Busy is from when twice its slots were taken, so that these are at all stages, until the last was.
    """
    began = full = taken = time.process_time()

    def asked() -> Iterator[Request]:
        nonlocal full, taken
        for number, request in enumerate(requests):
            if number == 2 * slots:
                full = time.process_time()
            yield request
        taken = time.process_time()

    errors = [done.error for done in engine.run(asked())]
    ended = time.process_time()
    assert errors == [None] * len(requests)
    return (taken - full) / (len(requests) - 2 * slots), (ended - began) / len(requests)


def median(ratios: np.ndarray) -> tuple[float, float, float]:
    """With its 95% interval."""
    place = max(int(binom.ppf(0.025, len(ratios), 0.5)), 1)
    held = np.sort(ratios)
    return float(np.median(held)), float(held[place - 1]), float(held[-place])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("g2p", "numbers"), default="g2p")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", help="some of the engines, beside the plain one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
    if options.prompts <= 2 * options.slots:
        parser.error(
            "--prompts: give more than twice --slots, which are served before the engine is busy"
        )
    if options.rounds < 6:
        parser.error("--rounds: give at least 6; of fewer no interval holds 95%")
    torch.set_num_threads(options.threads)
    decoder, texts = load_example(options.model), prompts(options.model, options.prompts)
    longest = max(len(decoder.encode([text])[0][0]) for text in texts)
    threshold, limit = 0.85, decoder.default_length
    if options.model == "g2p":
        limit = 24
        threshold = riskcal.calibrate(riskcal.load_example("g2p"), delta=0.1).threshold
    policy = ExitPolicy(threshold=threshold, max_new_tokens=limit)
    requests = [
        Request(text, id=f"r{i}", task=("news", "chat")[i % 2]) for i, text in enumerate(texts)
    ]
    busy: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"slots": options.slots, "max_prompt": longest}
        made = engines(decoder, policy, Path(folder), two_percent(requests), **sizes)
        if options.only:
            made = {name: one for name, one in made.items() if name in (PLAIN, *options.only)}
        order = list(made)
        rng = np.random.default_rng(0)
        for turn in tqdm(range(options.rounds + 2), desc="rounds"):
            rng.shuffle(order)
            for name in order:
                while_busy, in_all = served(made[name], requests, options.slots)
                if turn > 1:  # the first two are to warm up
                    busy.setdefault(name, []).append(while_busy)
                    whole.setdefault(name, []).append(in_all)
    plain, plain_whole = np.array(busy[PLAIN]), np.array(whole[PLAIN])
    rows = []
    for name, engine in made.items():
        middle, low, high = median(np.array(busy[name]) / plain)
        rows.append(
            {
                "around it": name,
                "us a request": 1e6 * float(np.median(busy[name])),
                "x plain": middle,
                "low": low,
                "high": high,
                "of the quickest": min(busy[name]) / float(plain.min()),
                "to the end": median(np.array(whole[name]) / plain_whole)[0],
                "shadows": engine.stats.shadows,
            }
        )
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))
    if FULL in busy:
        share = RATE * median(np.array(busy[FULL]) / plain)[0]
        print(
            f"a full decode of {RATE:.0%} of the requests in a busy engine is {share:.1%} of its work"
        )
    if options.json:
        told = {
            "options": vars(options) | {"json": None},
            "torch": torch.__version__,
            "threshold": threshold,
            "rows": rows,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
