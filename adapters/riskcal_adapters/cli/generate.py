"""`riskcal generate`: decode prompts with a policy."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from tqdm.auto import tqdm

from riskcal import RiskcalError, internal
from riskcal.policy import ExitPolicy
from riskcal_adapters import request_checks
from riskcal_adapters.cli.decoders import DecoderOption, HeadsOption, ModelOption, asked_decoder
from riskcal_adapters.cli.prompts import read_prompts


def generate(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="One prompt per line (.txt), or a table (.parquet, .csv, .jsonl) with a column text and optionally prompt (id).",
            show_default=False,
        ),
    ],
    policy: Annotated[
        Path | None,
        typer.Option(help="A policy file.", show_default="the full model"),
    ] = None,
    decoder: DecoderOption = None,
    model: ModelOption = None,
    heads: HeadsOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSON lines, one per prompt.", show_default="print the texts"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Length limit of each generation.", show_default="the policy's, else the model's"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts generated together.")] = 1,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine", help="Each prompt at its own layer and position: for many prompts at once."
        ),
    ] = False,
    slots: Annotated[int, typer.Option(help="With --engine: prompts in flight.")] = 64,
) -> None:
    """Decode prompts, each token exiting as the policy says.

    Texts are printed. With --out, JSON lines are written instead, in the order of the prompts, whole or not at all: prompt, text,
    tokens, exit_layers.
    """
    table = read_prompts(prompts)
    internal.count(batch_size, "--batch-size", least=1)
    asked = ExitPolicy.full_model() if policy is None else ExitPolicy.load(policy)
    running: Any = asked_decoder(decoder, model, heads)()
    texts = table["text"].tolist()
    ids = table["prompt"].tolist() if "prompt" in table.columns else list(range(len(texts)))
    found = (
        _by_engine(running, asked, texts, slots, max_new_tokens)
        if engine
        else _in_batches(running, asked, texts, batch_size, max_new_tokens)
    )
    bar = tqdm(found, total=len(texts), desc="prompts", disable=None)
    if out is None:
        for one in bar:
            print(one["text"])
        return
    lines = [json.dumps({"prompt": name} | one) for name, one in zip(ids, bar, strict=True)]
    with internal.replacing(out) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} prompts, {_layers(lines)} layers a token on average: {os.fspath(out)}")


def _in_batches(
    decoder: Any, policy: ExitPolicy, texts: list[str], size: int, limit: int | None
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        generation = decoder.generate(*decoder.encode(some), policy=policy, max_new_tokens=limit)
        exits = np.asarray(generation.exit_layers)
        tokens = np.asarray(generation.tokens)
        for text, row, own in zip(decoder.decode(generation.tokens), exits, tokens, strict=True):
            size_of_row = int((row > 0).sum())
            yield _told(text, own[:size_of_row], row[:size_of_row])


def _by_engine(
    decoder: Any, policy: ExitPolicy, texts: list[str], slots: int, limit: int | None
) -> Iterator[dict[str, Any]]:
    try:  # torch is not needed for a decoder in JAX
        from riskcal_adapters.torch import Engine, Request
    except ImportError as missing:
        raise RiskcalError(f"--engine: {missing}") from None

    # an engine serves others' policies at full depth; who asks for one here must hear of it, as without an engine
    named = policy.named()
    decoder.refuse_other([named])
    decoder.needed([named], 1, 1)
    if not named.is_full_model:
        request_checks.fit_for_engine(named, "policy", "leave --engine out")
    longest = max(decoder.encode([text])[0].shape[1] for text in texts)
    with Engine(
        decoder, policy, slots=min(slots, len(texts)), max_prompt=longest, max_new_tokens=limit
    ) as engine:
        done = {}
        for one in engine.run(Request(text, id=str(i)) for i, text in enumerate(texts)):
            if one.error is not None:
                raise RiskcalError(f"{one.error} (prompt {one.id})")
            done[int(one.id)] = one
    for i in range(len(texts)):
        yield _told(done[i].text, done[i].tokens, done[i].exit_layers)


def _told(text: str | None, tokens: Any, exits: Any) -> dict[str, Any]:
    return {"text": text, "tokens": tokens.tolist(), "exit_layers": exits.tolist()}


def _layers(lines: list[str]) -> str:
    exits = pd.Series([json.loads(line)["exit_layers"] for line in lines]).explode()
    return f"{exits.astype(float).mean():.2f}"
