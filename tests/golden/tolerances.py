"""Every tolerance of the golden tests, with the error it was set from beside it; none is more than four times that."""

from __future__ import annotations

from dataclasses import dataclass

REQUIRED_FLOAT32 = 1e-3
"""What we promise of any family in float32. The table is far stricter, so that a small mistake does not hide in it."""


@dataclass(frozen=True)
class Tolerance:
    """`measured` is the largest seen on an x86-64 with AVX-512, with transformers 5.17 and 5.23."""

    measured: float
    allowed: float

    def __post_init__(self) -> None:
        if not self.measured <= self.allowed <= 4 * self.measured:
            raise ValueError(f"{self.allowed} is not between {self.measured} as measured and four times that")


FLOAT32_LOGITS = {f: Tolerance(1e-5, 2e-5) for f in """afmoe cohere2_moe deepseek_v2 deepseek_v3 ernie4_5_moe exaone_moe flex_olmo glm4_moe
    gpt_oss granitemoe hunyuan_v1_moe mellum minimax_m2 mixtral olmoe phimoe qwen2_moe
    qwen3_moe solar_open""".split()}
BF16_LOGITS = {f: Tolerance(0.05, 0.1) for f in ("mixtral", "deepseek_v3", "gpt_oss")}
BF16_OVER_TRANSFORMERS = Tolerance(1.0, 1.5)
