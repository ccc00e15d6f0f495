"""Settings for every property test, and how much of a test runs where numba's compiler is off (`make coverage`)."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

COMPILED = os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
#: CPU seconds of a test without the compiler: Monte Carlo tests would take hours. What it has run by then counts as covered.
SECONDS = 2.0

settings.register_profile("riskcal", settings.default, deadline=None)
settings.register_profile("covering", settings.get_profile("riskcal"), max_examples=20)
settings.load_profile("riskcal" if COMPILED else "covering")


class _LeftOut(BaseException):
    """Not an Exception, which tests expect."""


if not COMPILED:

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call() -> Iterator[None]:
        left_out = False

        def leave_out(*_: Any) -> None:
            nonlocal left_out
            left_out = True
            raise _LeftOut

        signal.signal(signal.SIGPROF, leave_out)
        # again and again: doctest goes on to the next example
        signal.setitimer(signal.ITIMER_PROF, SECONDS, SECONDS)
        try:
            return (yield)
        except BaseException:  # doctest reports every exception as a failure of its own
            if not left_out:
                raise
            pytest.skip(f"more than {SECONDS:g} s without numba's compiler")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
