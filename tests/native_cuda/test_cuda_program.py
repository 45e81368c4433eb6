"""The device's layer program, interpreted on the CPU, against the CPU engine's own, family by family.

Routed experts are stood in for by an exact function of their input and routes, so that all that is seen is the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from expertd_engine.kernels.library import Pool

pytest.importorskip("triton")

from golden.tolerances import DEVICE_FLOAT32_LOGITS
from support.device_models import TinyDevice
from support.kernels import native_pool
from support.native_models import eager_model
from support.tiny_families import TINY_FAMILIES

UNMATCHED = {"deepseek_v2", "deepseek_v3"}
TOKENS = 7
USUAL = {"afmoe", "cohere2_moe", "gpt_oss"}
"""Between them: gated attention, layers side by side, layer norms, sinks, windows, biases. The interpreter is slow: the
others are run with the acceptance tests, and on cards."""
FAMILIES = [
    family if family in USUAL else pytest.param(family, marks=pytest.mark.acceptance)
    for family in sorted(TINY_FAMILIES - UNMATCHED)
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with native_pool(threads=1) as pool:
        yield pool


def tokens(count: int = TOKENS) -> list[int]:
    return [(7919 * i + 13) % 256 for i in range(count)]


def reference(family: str) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = eager_model(family)(torch.tensor([tokens()]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, pool: Pool) -> None:
    device, ids = TinyDevice(family, pool), tokens()
    prompt = device.step([(0, 0, ids[:-1])], tiled=True)[0]
    ours = torch.cat([prompt, *device.step([(0, len(ids) - 1, ids[-1:])])]).log_softmax(-1)
    error = float((ours - reference(family)).abs().max())
    assert error <= DEVICE_FLOAT32_LOGITS.allowed
    assert int(device.best[0]) == int(ours[-1].argmax())
