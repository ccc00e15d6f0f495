"""Early-exit decoding in JAX: what exits save, against our own full decode in the same compiled program.

Two parts, batch 1, encoder included; settings take turns, and ratios are medians over rounds, paired within them.

1. The shipped spelling-to-phonemes model on held-out words: full model, thresholds, and the policies certified on the shipped
   records for a textual delta of .1 and .05; the PyTorch decoder beside it.
2. d_model 512, 8 layers, 32,128 tokens, random weights: **a cost measurement**, which says nothing about quality. Every token
   exits at a depth drawn from the exits that the policy certified for .1 takes in part 1; confidences are computed all the
   same, at every layer up to the exit, as their measure needs it.

What compiling takes is printed apart: it is paid once per size (rows, prompt tokens, generated tokens).
"""

import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import torch
from jax import lax
from tqdm.auto import tqdm

import command
import riskcal
import riskcal_adapters.jax
import riskcal_adapters.torch
from recipes.g2p import data
from riskcal import ExitPolicy
from riskcal_adapters.jax import T5, EarlyExitT5, layers, measures, program
from riskcal_adapters.jax.weights import expected_shapes, read_shape

LENGTH = 24  # what the shipped records were made with
FULL = "JAX, full model"
BARE = "JAX, full model, nothing for exits"
LARGE = {
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_heads": 6,
    "num_layers": 8,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "scale_decoder_outputs": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}


@partial(jax.jit, static_argnums=0)
def without_machinery(
    static: Any, params: Any, special: Any, request: program.Request
) -> jax.Array:
    """Greedy decoding with a cache and nothing for exits, layer after layer: what our own full decode is compared with."""
    batch, length, _ = request.thresholds.shape
    context = layers.read_prompt(static.shape, params, request.input_ids, request.mask, length)

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        position, previous, going, own, said = carry
        seen = layers.at_position(static.shape, params, context, position, own)
        states, memory = layers.all_layers(static.shape, params, seen, params.embedding[previous])
        best = layers.logits(static.shape, params, states[-1]).argmax(-1).astype(jnp.int32)
        token = jnp.where(going, best, special.pad)
        going = going & (token[:, None] != special.ends).all(-1) & (position + 1 < request.lengths)
        own = lax.dynamic_update_index_in_dim(own, memory, position, -2)
        return (
            position + 1,
            token,
            going,
            own,
            lax.dynamic_update_index_in_dim(said, token, position, 1),
        )

    start = jnp.broadcast_to(special.start, (batch,))
    said = jnp.broadcast_to(special.pad, (batch, length))
    carry = jnp.int32(0), start, request.lengths > 0, context.own, said
    return lax.while_loop(lambda carry: carry[2].any(), step, carry)[-1]


def timings(
    ways: dict[str, Callable[..., Any]], prompts: list[tuple[Any, ...]], rounds: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds by the wall and of the processor, per round (rows) and setting.

    Settings take turns on every prompt, and a first round warms up.
    """
    wall, processor = (
        pd.DataFrame(0.0, index=range(rounds + 1), columns=list(ways)) for _ in range(2)
    )
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for i, prompt in enumerate(prompts):
            first = (turn + i) % len(ways)
            for name in [*list(ways)[first:], *list(ways)[:first]]:
                started, busy = time.perf_counter(), time.process_time()
                ways[name](*prompt)
                wall.loc[turn, name] += time.perf_counter() - started
                processor.loc[turn, name] += time.process_time() - busy
    return wall.iloc[1:], processor.iloc[1:]


def summary(
    times: tuple[pd.DataFrame, pd.DataFrame], depth: dict[str, float], prompts: int
) -> pd.DataFrame:
    """Milliseconds per prompt, speed over our own full decode, and layers per token.

    On a machine that has other work to do the wall clock mostly says how long a call waits for its turn; processor time does not.
    """
    columns: dict[str, list[Any]] = {"setting": list(depth)}
    for clock, seconds in zip(("", "CPU "), times, strict=True):
        columns[f"{clock}ms/prompt"] = [1000 * seconds[name].median() / prompts for name in depth]
        columns[f"{clock}x own full"] = [(seconds[FULL] / seconds[name]).median() for name in depth]
    return pd.DataFrame(columns | {"layers": list(depth.values())})


def compile_seconds(first: Callable[..., Any], *arguments: Any) -> float:
    """What the first call takes longer than the second."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        first(*arguments)
        times.append(time.perf_counter() - started)
    return times[0] - times[1]


def on_the_shipped_model(words: int, rounds: int) -> tuple[str, pd.DataFrame, np.ndarray]:
    """Speeds on held-out words, and the exits of the policy certified for .1."""
    in_jax, in_torch = (
        riskcal_adapters.jax.load_example("g2p"),
        riskcal_adapters.torch.load_example("g2p"),
    )
    runs = riskcal.load_example("g2p")
    policies = {FULL: ExitPolicy.full_model()}
    policies |= {f"JAX, threshold {t:g}": ExitPolicy(threshold=t) for t in (0.9, 0.7, 0.5)}
    policies |= {f"JAX, static exit {k}": ExitPolicy.static(k) for k in (1, 2)}
    certified = {delta: riskcal.calibrate(runs, delta=delta).policy() for delta in (0.1, 0.05)}
    policies |= {f"JAX, certified, delta {delta:g}": policy for delta, policy in certified.items()}
    held_out = data.splits(data.read_dictionary(data.dictionary_path()))["development"].words[
        :words
    ]
    prompts = [in_jax.encode([word]) for word in held_out]
    taken = compile_seconds(partial(in_jax.generate, max_new_tokens=LENGTH), *prompts[0])
    ways = {
        name: partial(in_jax.generate, policy=one, max_new_tokens=LENGTH)
        for name, one in policies.items()
    }
    exits = {
        name: np.concatenate([way(*p).exit_layers[0] for p in prompts])
        for name, way in ways.items()
    }
    depth = {name: float(some.mean()) for name, some in exits.items()}
    for name in (FULL, "JAX, certified, delta 0.1"):
        other = name.replace("JAX", "PyTorch")
        ways[other], depth[other] = _in_torch(in_torch, policies[name]), depth[name]
    ways[BARE], depth[BARE] = partial(_bare, in_jax), float(in_jax.n_layers)
    assert in_jax.decode(_bare(in_jax, *prompts[0])[:1]) == in_jax.decode(
        ways[FULL](*prompts[0]).tokens
    )
    table = summary(timings(ways, prompts, rounds), depth, words)
    said = f"certified thresholds: {', '.join(f'delta {d:g}: {p.threshold:g}' for d, p in certified.items())}"
    return f"{said}; compiled in {taken:.1f} s", table, exits["JAX, certified, delta 0.1"]


def _bare(decoder: EarlyExitT5, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    asked = decoder._asked(ExitPolicy.full_model(), len(ids), LENGTH)
    request = decoder._request(ids, mask.astype(bool), asked)
    return np.asarray(without_machinery(*decoder._whole(oracle=False), request))


def _in_torch(
    decoder: riskcal_adapters.torch.EarlyExitT5, policy: ExitPolicy
) -> Callable[..., Any]:
    return lambda ids, mask: decoder.generate(
        torch.from_numpy(ids), torch.from_numpy(mask), policy, LENGTH
    )


def random_model(seed: int) -> T5:
    """The large T5; its states have the size of trained ones, as norms come first in every layer."""
    rng = np.random.default_rng(seed)
    shape = read_shape(LARGE, "config")
    sizes = expected_shapes(shape)
    sizes["lm_head.weight"] = sizes["shared.weight"]
    weights = {
        name: np.ones(size, np.float32)
        if len(size) == 1
        else rng.normal(0, 0.05, size).astype(np.float32)
        for name, size in sizes.items()
    }
    return T5(shape, weights, SimpleNamespace(**LARGE))


def forced(measure: str, depths: np.ndarray, n_layers: int) -> np.ndarray:
    """(1, T, L) thresholds that no confidence reaches before, and every one at, the given depths (T,)."""
    # finite: the confidence has to be computed
    never = np.inf if measure in ("full", "bare") else 1e30
    return np.where(np.arange(1, n_layers + 1) < depths[:, None], never, -1e30)[None].astype(
        np.float32
    )


def on_a_large_vocabulary(exits: np.ndarray, prompts: int, rounds: int) -> tuple[str, pd.DataFrame]:
    """Speeds with exits at given depths; `exits` are what they are drawn from."""
    classifier = SimpleNamespace(weight=np.full(512, 0.01), bias=0.0)
    decoder = EarlyExitT5(random_model(0), classifier=classifier)
    static, params, special = decoder._whole(oracle=False)
    unending = special._replace(ends=np.array([-1], np.int32))
    rng = np.random.default_rng(1)
    batch = [
        (rng.integers(2, 32128, (1, 32), np.int32), rng.choice(exits, LENGTH))
        for _ in range(prompts)
    ]
    codes = {
        name: np.array([measures.NAMES.index(name)], np.int32)
        for name in ("softmax", "state", "classifier")
    }

    def decode(measure: str, ids: np.ndarray, depths: np.ndarray) -> None:
        thresholds = forced(measure, depths if measure in codes else np.full(LENGTH, 8), 8)
        real, limit = np.ones(ids.shape, bool), np.array([LENGTH], np.int32)
        request = program.Request(
            ids, real, thresholds, codes.get(measure, codes["softmax"]), limit
        )
        if measure == "bare":
            without_machinery(static, params, unending, request).block_until_ready()
            return
        made = jax.device_get(program.generate(static, params, unending, request)).exit_layers
        assert (made == (8 if measure == "full" else depths)).all()

    taken = compile_seconds(partial(decode, "full"), *batch[0])
    names = {FULL: "full", **{f"JAX, {name}": name for name in codes}, BARE: "bare"}
    ways = {name: partial(decode, measure) for name, measure in names.items()}
    mean = float(np.mean([depths.mean() for _, depths in batch]))
    depth = {name: mean if measure in codes else 8.0 for name, measure in names.items()}
    bytes_ = sum(array.nbytes for array in jax.tree.leaves(params))
    table = summary(timings(ways, batch, rounds), depth, prompts)
    return (
        f"{LENGTH} tokens per prompt; weights of {bytes_ / 1e6:.0f} MB; compiled in {taken:.1f} s",
        table,
    )


def main() -> None:
    """Measure and print two tables."""
    parser = command.parser(__doc__, figures=False)
    parser.add_argument("--words", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=4, help="for the large vocabulary")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"jax {jax.__version__} on {jax.default_backend()}, torch {torch.__version__} with 1 thread, rounds {options.rounds}"
    )
    said, table, exits = on_the_shipped_model(options.words, options.rounds)
    print(f"\nspelling to phonemes, {options.words} words; {said}\n")
    print(table.to_string(index=False, float_format="%.2f"))
    said, table = on_a_large_vocabulary(exits, options.prompts, options.rounds)
    print(f"\nlarge vocabulary, random weights, forced exits, {options.prompts} prompts; {said}\n")
    print(table.to_string(index=False, float_format="%.2f"))


if __name__ == "__main__":
    main()
