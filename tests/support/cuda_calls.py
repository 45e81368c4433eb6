"""What the profiler sees of a card's steps: graph launches, kernels launched by themselves, and waits of the host."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

STEPS = 100
PROFILERS_WAITS = 1
"""It synchronises once itself, when it ends."""

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")


@dataclass(frozen=True)
class CudaCalls:
    graphs: int
    kernels: int
    waits: int


def calls_of_steps(engine: Any) -> CudaCalls:
    """What `STEPS` steps call, after ten that are not looked at; a sequence that lasts so long has been submitted."""
    for _ in range(10):
        engine.core.step(0.0)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(STEPS):
            engine.core.step(0.0)
    calls = Counter({one.key: one.count for one in seen.key_averages()})
    return CudaCalls(
        graphs=calls["cudaGraphLaunch"],
        kernels=sum(calls[name] for name in _LAUNCHES),
        waits=sum(calls[name] for name in _WAITS),
    )
