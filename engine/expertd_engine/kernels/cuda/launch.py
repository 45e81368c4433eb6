"""How launches follow each other: on cards that can (compute capability 9 and up) a kernel begins while the one before
it still runs, reads its weights, and waits only where it first needs what that one made.

Every kernel launched with `OPTIONS` calls `wait_for_inputs` once in every program, before it reads anything that a
kernel made and before it writes anything. Whatever is launched without waits as ever.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

OVERLAPS = tl.constexpr(
    "OVERLAPS" in os.environ and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
)
OPTIONS = {"launch_pdl": True} if OVERLAPS.value else {}


@triton.jit
def wait_for_inputs() -> None:
    """Until the kernels before have ended; the next may then begin."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
