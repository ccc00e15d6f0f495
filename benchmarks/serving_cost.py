"""What a service's own machinery costs: the engine with and without it, in turns, on the same prompts.

``python benchmarks/serving_cost.py`` serves held-out words by the certified policy of the shipped spelling model through engines
that differ in what stands around them: a router, a log of events, a kill switch that looks for a file, forbidden classes of
tokens, shadows of 2% of the requests, all of these. The engines take turns, and each is compared with the plain one of the same
round by the process's CPU seconds until the last request is answered; told are medians over rounds with the middle half, and the
ratio of the quickest rounds. Shadows run once no request wants their slots, here after the last answer, at the full model's
depth: "with shadows" counts that work too, which a service that is busy throughout does not do but drops, counted.
Forbidden classes that no output is in cost what looking costs: what they save from leaving early is the policy's business.
What is done once a request weighs most where outputs are short: a spelling has 7 tokens, a number in words (``--model numbers``,
at threshold .85) 46.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import riskcal
from engine import prompts
from riskcal import ExitPolicy
from riskcal.serving import EventLog, Inside, KillSwitch, Pattern, PolicyBook, Shadow
from riskcal_adapters.torch import Engine, Request, load_example
from riskcal_adapters.torch.decoder import Decoder

PLAIN, ALL = "plain", "everything"
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
        "router": made("router", book),
        "events": made("events", policy, events=True),
        "kill switch": made("switch", policy, **switch),
        "forbidden classes": made("forbidden", guarded),
        "shadow 2%": made("shadow", policy, **shadows),
        "everything but shadows": made(
            "rest", PolicyBook({"news": guarded, "chat": guarded}), **rest
        ),
        ALL: made("all", PolicyBook({"news": guarded, "chat": guarded}), **rest, **shadows),
    }


def two_percent(requests: list[Request]) -> Shadow:
    """A salt by which just so many of them are taken."""
    for salt in range(1000):
        shadow = Shadow(0.02, salt=str(salt))
        if sum(shadow.takes(str(one.id)) for one in requests) == round(0.02 * len(requests)):
            return shadow
    raise AssertionError("no salt takes 2% of these ids")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("g2p", "numbers"), default="g2p")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="some of the engines, beside the plain one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args()
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
    taken: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"slots": options.slots, "max_prompt": longest}
        served = engines(decoder, policy, Path(folder), two_percent(requests), **sizes)
        if options.only:
            served = {name: one for name, one in served.items() if name in (PLAIN, *options.only)}
        order = list(served)
        rng = np.random.default_rng(0)
        for turn in tqdm(range(options.rounds + 1), desc="rounds"):
            rng.shuffle(order)
            for name in order:
                began = time.process_time()
                answered, errors = began, []
                for one in served[name].run(requests):
                    errors.append(one.error)
                    answered = time.process_time()
                ended = time.process_time()
                assert errors == [None] * len(requests)
                if turn:  # the first is to warm up
                    taken.setdefault(name, []).append(answered - began)
                    whole.setdefault(name, []).append(ended - began)
    plain = np.array(taken[PLAIN])
    rows = []
    for name, engine in served.items():
        ratio = np.array(taken[name]) / plain
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        rows.append(
            {
                "around it": name,
                "ms a prompt": 1e3 * float(np.median(taken[name])) / len(texts),
                "x plain": float(middle),
                "lower quartile": float(low),
                "upper quartile": float(high),
                "of the quickest": float(min(taken[name]) / plain.min()),
                "with shadows": float(np.median(np.array(whole[name]) / plain)),
                "shadows": engine.stats.shadows,
            }
        )
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"))
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
