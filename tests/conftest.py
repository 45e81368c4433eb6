"""Before anything imports torch: waiting compute threads park, as they do in the engine, and hubs are not asked."""

from __future__ import annotations

import gc
import os
import tempfile
from functools import partial

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):  # before anything imports triton: kernels for a card are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    """One folder for what native programs are built from, for all workers and the tests that they start."""
    if "TESTS_OBJECTS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="objects-")
        os.environ["TESTS_OBJECTS"] = folder.name
        config.add_cleanup(folder.cleanup)
        config.add_cleanup(partial(os.environ.__delitem__, "TESTS_OBJECTS"))


def pytest_collection_finish() -> None:
    """An engine that starts collects garbage: not through all of torch and all tests, each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries call what is left a leak
