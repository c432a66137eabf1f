"""Settings of all tests."""

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# the same examples in every run, so that a failure is of the change at hand; others are looked for
# with pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random numbers that no test has seeded are the same in every order of tests."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """The runner of sae-lens replaces them and leaves it at that."""
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in previous.items():
        signal.signal(signum, handler)
