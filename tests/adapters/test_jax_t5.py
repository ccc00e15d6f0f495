"""What is JAX's own: one compiled program per size, its loops, caches, types and devices.

The rest is in test_decoding_in_both_frameworks.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_models import CONFIG, prompts, random_t5
from processes import environment

from riskcal import Decaying, ExitPolicy
from riskcal_adapters.jax import EarlyExitT5, layers, program

LENGTH = 12
EARLY = ExitPolicy(threshold=0.2)


@pytest.fixture(scope="module")
def model():
    return random_t5()


@pytest.fixture(scope="module")
def decoder(model):
    return EarlyExitT5(model, stacked=True)


@pytest.fixture(scope="module")
def expected(decoder):
    generation = decoder.generate(*prompts(7), policy=EARLY, max_new_tokens=LENGTH)
    assert len(np.unique(generation.exit_layers)) == CONFIG["num_decoder_layers"], (
        "all exits should be taken"
    )
    return generation


@pytest.fixture
def compilations():
    """Every compilation of JAX while the test runs, whatever it is of."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def assert_same(ours, theirs, tolerance=1e-5):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.exit_layers, theirs.exit_layers)
    np.testing.assert_allclose(ours.confidence, theirs.confidence, rtol=0, atol=tolerance)
    np.testing.assert_allclose(ours.refused, theirs.refused, rtol=0, atol=tolerance)


# -- compiled once -----------------------------------------------------------------------------------------------------


def test_within_a_size_nothing_is_compiled_again(model, compilations):
    small = EarlyExitT5(model, stacked=True)
    small.generate(*prompts(5), max_new_tokens=9)
    once = len(compilations)
    assert once >= 1, "the listener hears nothing"
    schedule = Decaying(temperature=4.0, max_length=LENGTH)
    names = ["softmax", "max", "entropy", "state", "softmax", "max", "state", "entropy"]
    per_row = [
        ExitPolicy(threshold=0.1 * i, min_layer=1 + i % 3, measure=name)
        for i, name in enumerate(names)
    ]
    decaying = ExitPolicy(threshold=0.9, schedule=schedule)
    state = ExitPolicy(threshold=0.5, measure="state")
    for policy in (ExitPolicy.full_model(), EARLY, decaying, ExitPolicy.static(2), state, per_row):
        small.generate(*prompts(8, seed=1, width=16), policy=policy, max_new_tokens=16)
    for rows, width, length in ((5, 2, 1), (6, 11, 13), (7, 16, 16)):
        small.generate(*prompts(rows, width=width), policy=EARLY, max_new_tokens=length)
    assert len(compilations) == once
    EarlyExitT5(random_t5(seed=5), stacked=True).generate(*prompts(8), max_new_tokens=LENGTH)
    assert len(compilations) == once, "other weights of the same shapes"
    small.generate(*prompts(5, width=17), max_new_tokens=9)
    assert len(compilations) == once + 1, "a longer prompt is another size"


def test_rounding_up_changes_nothing(decoder, expected):
    """Rows that fill a batch, padding and spare positions are not seen."""
    ids, mask = prompts(7)
    wide = [np.pad(values, ((0, 0), (0, 5))) for values in (ids, mask)]
    assert_same(decoder.generate(*wide, policy=EARLY, max_new_tokens=LENGTH), expected)
    longer = decoder.generate(ids, mask, policy=EARLY, max_new_tokens=16)
    np.testing.assert_array_equal(longer.tokens[:, :LENGTH], expected.tokens)
    assert longer.tokens.shape == (7, 16)


def whiles(jaxpr):
    """How many while-loops stand in each while-loop of a program, outermost first."""
    nested = []
    for equation in jaxpr.eqns:
        inner = [
            n
            for value in equation.params.values()
            for sub in subprograms(value)
            for n in whiles(sub)
        ]
        nested += [inner] if equation.primitive.name == "while" else inner
    return nested


def subprograms(value):
    if isinstance(value, list | tuple):
        return [sub for one in value for sub in subprograms(one)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


@pytest.mark.parametrize("stacked", [True, False])
def test_the_program_is_a_loop_in_a_loop_that_never_asks_the_host(model, stacked):
    made = EarlyExitT5(model, stacked=stacked)
    asked = made._asked(EARLY, 2, LENGTH)
    ids, mask = prompts(2)
    arguments = *made._whole(oracle=False), made._request(ids, mask.astype(bool), asked)
    jaxpr = jax.make_jaxpr(program.generate, static_argnums=0)(*arguments)
    assert whiles(jaxpr.jaxpr) == [[[]]], (
        "one loop over tokens, in it one over layers, in that none"
    )
    text = program.generate.lower(*arguments).as_text()
    assert text.count("stablehlo.while") >= 2
    assert not re.search(r"callback|infeed|outfeed|stablehlo\.(send|recv)|custom_call", text)


# -- the layers --------------------------------------------------------------------------------------------------------


def test_branches_and_stacked_layers_are_the_same(model, expected):
    branches = EarlyExitT5(model, stacked=False)
    assert isinstance(branches.params.decoder, tuple)
    assert_same(branches.generate(*prompts(7), policy=EARLY, max_new_tokens=LENGTH), expected)


def test_keys_and_values_of_skipped_layers_are_projections_of_the_exit_state(model, decoder):
    static, params, special = decoder._whole(oracle=False)
    ids, mask = prompts(4)
    needed = np.full((4, 3), np.inf, dtype=np.float32)
    needed[:, -1] = needed[0, 0] = needed[1, 1] = needed[3, 1] = -np.inf  # exits 1, 2, 3, 2
    depths = np.array([1, 2, 3, 2])

    @jax.jit
    def step(params, needed):
        context = layers.read_prompt(
            static.shape, params, jnp.asarray(ids), jnp.asarray(mask, bool), LENGTH
        )
        previous, going = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
        return program.exit_layers(
            static, params, special, context, previous, going, needed, jnp.zeros(4, jnp.int32)
        )

    left = step(params, needed)
    assert left.said.exit_layers.tolist() == depths.tolist()
    cut_short = step(
        params, np.where(np.arange(3) == 1, -np.inf, np.inf)[None].repeat(4, 0).astype(np.float32)
    )
    assert int(cut_short.layers) == 2, "no row needs the last layer, so it must not run"
    for one, at in ((left, depths), (cut_short, np.full(4, 2))):
        for layer in range(3):
            weights = {
                part: model.weights[f"decoder.block.{layer}.layer.0.SelfAttention.{part}.weight"]
                for part in "kv"
            }
            gain = model.weights[f"decoder.block.{layer}.layer.0.layer_norm.weight"]
            for row in np.flatnonzero(at <= layer):
                state = np.asarray(one.state[row], dtype=np.float64)
                normed = state / np.sqrt((state**2).mean() + 1e-6) * gain
                for i, part in enumerate("kv"):
                    made = np.asarray(one.memory[layer, i, row]).ravel()
                    np.testing.assert_allclose(made, weights[part] @ normed, rtol=0, atol=1e-5)


def test_rows_with_policies_of_their_own_are_as_if_alone(decoder):
    names = ["softmax", "max", "entropy", "state", "softmax", "state", "softmax"]
    asked = [
        ExitPolicy(
            threshold={"entropy": -2.0, "state": 0.6}.get(name, 0.1 * (1 + i)),
            measure=name,
            min_layer=1 + i % 2,
        )
        for i, name in enumerate(names)
    ]
    ids, mask = prompts(7)
    together = decoder.generate(ids, mask, policy=asked, max_new_tokens=LENGTH)
    for row, policy in enumerate(asked):
        alone = decoder.generate(
            np.roll(ids, -row, 0), np.roll(mask, -row, 0), policy=policy, max_new_tokens=LENGTH
        )
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_array_equal(together.exit_layers[row], alone.exit_layers[0])
        np.testing.assert_allclose(together.confidence[row], alone.confidence[0], rtol=0, atol=1e-5)


def test_the_trace_is_the_full_models_path(decoder):
    ids, mask = prompts(7)
    traces = decoder.trace(ids, mask, max_new_tokens=LENGTH, prompts=list("gfedcba"))
    full = decoder.generate(ids, mask, max_new_tokens=LENGTH)
    assert traces.agrees[:, -1].all()
    assert not traces.agrees.all()
    for row, name in enumerate("gfedcba"):
        mine = np.flatnonzero(np.asarray(traces.prompt) == name)
        assert sorted(traces.position[mine].tolist()) == list(range(LENGTH))
        np.testing.assert_allclose(
            traces.confidence[mine[np.argsort(traces.position[mine])], -1],
            full.confidence[row],
            rtol=0,
            atol=1e-5,
        )


# -- types and devices -------------------------------------------------------------------------------------------------


def test_bfloat16_layers_have_float32_confidences(model, expected):
    short = EarlyExitT5(model, stacked=True, dtype="bfloat16")
    assert {array.dtype.name for array in jax.tree.leaves(short.params)} == {"bfloat16"}
    generation = short.generate(*prompts(7), policy=ExitPolicy.static(2), max_new_tokens=1)
    exact = EarlyExitT5(model, stacked=True).generate(
        *prompts(7), policy=ExitPolicy.static(2), max_new_tokens=1
    )
    assert generation.confidence.dtype == np.float32
    np.testing.assert_allclose(generation.confidence, exact.confidence, rtol=0, atol=0.1)
    # float32 numbers, not bfloat16 ones in a wider type
    assert (generation.confidence.view(np.uint32) & 0xFFFF).any()


def test_decoding_is_deterministic(decoder, expected):
    again = decoder.generate(*prompts(7), policy=EARLY, max_new_tokens=LENGTH)
    for name in ("tokens", "exit_layers", "confidence", "refused"):
        np.testing.assert_array_equal(getattr(again, name), getattr(expected, name))


def test_weights_are_put_where_jax_puts_new_arrays(decoder):
    assert {device for array in jax.tree.leaves(decoder.params) for device in array.devices()} == {
        jax.devices()[0]
    }


def run(script, **changes):
    """A script in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(JAX_PLATFORMS="cpu", **changes),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_rows_dealt_out_among_devices_are_the_same(expected):
    """On four virtual devices, with rows that do not divide evenly; devices do not wait for each other's rows."""
    script = """
import jax, numpy as np
from jax_models import prompts, random_t5
from riskcal import ExitPolicy
from riskcal.serving import Tokens
from riskcal_adapters.jax import EarlyExitT5, program
assert jax.device_count() == 4
decoder = EarlyExitT5(random_t5(), stacked=True, devices=jax.devices())
assert all(len(array.devices()) == 4 for array in jax.tree.leaves(decoder.params))
generation = decoder.generate(*prompts(7), policy=ExitPolicy(threshold=0.2), max_new_tokens=12)
ids, mask = prompts(7)
asked = decoder._asked(ExitPolicy(), 7, 12)
request = decoder._request(ids, mask.astype(bool), asked)
lowered = program.generate.lower(*decoder._whole(False), request).as_text()
assert "while" in lowered
print(any(word in lowered for word in ("all_reduce", "all_gather", "collective", "all_to_all")))
held = ExitPolicy(threshold=0.2, forbidden=[Tokens(range(0, 29, 2))])
deep = decoder.generate(*prompts(7), policy=[held, ExitPolicy(threshold=0.2)] * 3 + [held], max_new_tokens=12)
print(((deep.tokens % 2 == 1) | (deep.exit_layers == 3))[::2].all() and (deep.exit_layers < 3).any())
print(*generation.tokens.ravel(), *generation.exit_layers.ravel())
"""
    talks, holds, *numbers = run(script, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert (talks, holds) == ("False", "True")
    tokens, exits = np.array(numbers, dtype=int).reshape(2, 7, LENGTH)
    np.testing.assert_array_equal(tokens, expected.tokens)
    np.testing.assert_array_equal(exits, expected.exit_layers)


def test_without_pytorch_everything_works(tmp_path):
    """Load, record with traces, calibrate, decode under the policy: no torch, no transformers."""
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import riskcal
from riskcal_adapters import record
from riskcal_adapters.jax import load_example
words = ["calm", "early", "exit", "layer", "risk", "token", "model", "bound"]
folder = {str(tmp_path / "runs")!r}
decoder = load_example("g2p")
record(words, lambda: decoder, [0.0, 0.9], folder, max_new_tokens=16, batch_size=8, progress=False)
runs = riskcal.Runs.read(folder)
policy = riskcal.calibrate(runs, delta=0.9, epsilon=0.5).policy()
generation = decoder.generate(*decoder.encode(["risk"] * 8), policy=policy, max_new_tokens=16)
print(runs.n, runs.k, policy.threshold < 1, "".join(decoder.decode(generation.tokens)[0].split()))
"""
    assert run(script) == ["8", "2", "True", "RIHSK"]
