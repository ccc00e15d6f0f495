"""What the adapters' tests share: tiny random T5s of both versions, deeper in the decoder than in the encoder; recordings."""

import pytest


@pytest.fixture(scope="session", params=["v1.0", "v1.1"])
def tiny_t5(request):
    """A random T5: v1.0 (relu, head tied and scaled) with 4 decoder layers, or v1.1 (gated-gelu, own head) with 5."""
    from t5_reference import tiny

    return tiny(gated=request.param == "v1.1")


@pytest.fixture(scope="session")
def gated_t5():
    """The v1.1 alone, for what has nothing to do with the version: a model more is many programs more to compile."""
    from t5_reference import tiny

    return tiny(gated=True)


@pytest.fixture(scope="module")
def barely_optimized():
    """JAX compiles in half the time, for modules whose claims are not on what the compiler makes of a program."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def ending(tiny_t5):
    """The same model with an end token that it does say."""
    from t5_reference import ending_early

    return ending_early(tiny_t5)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A recording with traces that nothing went wrong with. Read it, and change copies."""
    from recordings import record

    return record(tmp_path_factory.mktemp("recording") / "out", traces=True)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The same of one that stops."""
    from recordings import MANY, STOPPED, record

    return record(tmp_path_factory.mktemp("stopped") / "out", MANY, **STOPPED)
