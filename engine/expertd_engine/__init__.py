"""The engine process: tokens in, tokens out, inside a byte budget. One thread owns all state."""

import os

# Before torch loads its thread pools: waiting threads park, because a box with few cores needs them for kernels and
# reads. Here, so that whoever measures computes as the engine process does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
