"""Before anything imports torch: waiting compute threads park, as they do in the engine, and hubs are not asked."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):  # before anything imports triton: kernels for a card are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
