"""Every tolerance of the golden tests, with the error it was set from beside it; none is more than four times that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


FLOAT32_LOGITS = {
    "afmoe": Tolerance(4.3e-6, 1.7e-5),
    "cohere2_moe": Tolerance(3.9e-6, 1.5e-5),
    "deepseek_v2": Tolerance(4.8e-6, 1.9e-5),
    "deepseek_v3": Tolerance(4.8e-6, 1.9e-5),
    "ernie4_5_moe": Tolerance(3.4e-6, 1.3e-5),
    "exaone_moe": Tolerance(5.8e-6, 2.3e-5),
    "flex_olmo": Tolerance(4.3e-6, 1.7e-5),
    "glm4_moe": Tolerance(3.9e-6, 1.5e-5),
    "gpt_oss": Tolerance(5.8e-6, 2.3e-5),
    "granitemoe": Tolerance(2.0e-6, 8.0e-6),
    "hunyuan_v1_moe": Tolerance(3.4e-6, 1.3e-5),
    "mellum": Tolerance(3.9e-6, 1.5e-5),
    "minimax_m2": Tolerance(3.4e-6, 1.3e-5),
    "mixtral": Tolerance(4.8e-6, 1.9e-5),
    "olmoe": Tolerance(2.9e-6, 1.1e-5),
    "phimoe": Tolerance(3.9e-6, 1.5e-5),
    "qwen2_moe": Tolerance(4.8e-6, 1.9e-5),
    "qwen3_moe": Tolerance(2.9e-6, 1.1e-5),
    "solar_open": Tolerance(5.8e-6, 2.3e-5),
}
"""Largest difference of a log-probability, over all positions and the whole vocabulary of a tiny random checkpoint, in
batches of 1 and 8 at the smallest and the largest expert budget. Logits reach from -6 to 6."""
BF16_LOGITS = {
    "deepseek_v3": Tolerance(0.046, 0.15),
    "gpt_oss": Tolerance(0.055, 0.15),
    "mixtral": Tolerance(0.046, 0.15),
}
"""Median over positions of the largest difference from what the same weights give in float32."""
BF16_OVER_TRANSFORMERS = Tolerance(0.98, 1.25)
"""That median as a multiple of the one which transformers' own bfloat16 has."""

DEMO_FLOAT32_LOGITS = Tolerance(8.5e-5, 3e-4)
"""The block model in our engine against the dense original under plain transformers: 20 prompts × 64 tokens."""
DEMO_PERPLEXITY_RATIO = Tolerance(1.1e-4, 4e-4)
"""|perplexity in bf16 ÷ the dense original's in bf16, minus one|."""

DENSE_MATRICES = Tolerance(3.9e-7, 1.5e-6)
"""A product with a stored matrix against float64, over the largest of the results."""
QUANTISED_DENSE_LOGITS = Tolerance(1.5e-6, 6e-6)
"""Dense matrices in int4, experts in float32: our engine against transformers with the weights those stand for, and
activations rounded alike. Median over positions of the largest difference of a log-probability."""
QUANTISED_DENSE_WORST = Tolerance(0.046, 0.15)
"""The same at the worst position: there an activation half-way between two steps is rounded the other way."""

KERNEL_SUMS = {
    "float32": Tolerance(1.36e-7, 5e-7),
    "bfloat16": Tolerance(1.52e-7, 5e-7),
    "int8": Tolerance(1.2e-7, 4e-7),
    "int4": Tolerance(4.9e-8, 1.5e-7),
    "int4s": Tolerance(1.2e-7, 4e-7),
}
"""A native matrix product against float64, of the weights and inputs that the format stands for: the difference over
the sum of the terms' magnitudes."""
KERNEL_ACTIVATIONS = {
    "silu": Tolerance(1.3e-7, 4e-7),
    "gelu": Tolerance(1.2e-6, 4e-6),
    "gelu_tanh": Tolerance(1.0e-6, 4e-6),
    "relu": Tolerance(0, 0),
    "relu2": Tolerance(6.0e-8, 1.2e-7),
    "swiglu_clamped": Tolerance(7.5e-7, 2.5e-6),
}
"""A native activation against torch's in float64: the difference over the larger of the result and 0.001."""
KERNEL_EXPERTS = Tolerance(3.3e-7, 1.2e-6)
"""A native MoE layer against float64, activations rounded alike: the difference over the largest result. In an integer
format the median over the tokens."""
KERNEL_EXPERTS_WORST = Tolerance(1.2e-3, 4e-3)
"""The worst token in an integer format: where an activation half-way between two steps is rounded the other way."""

NATIVE_FLOAT32_LOGITS = Tolerance(4.8e-6, 1.9e-5)
"""Native layers against transformers' eager ones with the same stand-in experts: log-probabilities, 17 families."""
NATIVE_BF16_LOGITS = Tolerance(0.025, 0.1)
"""The same with weights, keys and values in bfloat16, against float32: median over positions of the largest error."""

DEVICE_FLOAT32_LOGITS = Tolerance(3.8e-6, 1.5e-5)
"""Log-probabilities of the device's program, interpreted, against transformers' eager ones, over all tiny families."""

DEVICE_PRODUCTS = Tolerance(5.9e-8, 2.3e-7)
"""A dense product of the device's kernels against float64: the difference over the sum of the terms' magnitudes."""
DEVICE_PRODUCTS_BF16 = Tolerance(2.9e-3, 8e-3)
"""The same where weights and inputs are rounded to bfloat16."""
DEVICE_EXPERTS = Tolerance(4e-7, 1.6e-6)
"""A layer of experts of the device's kernels against float64 with the weights the format stands for, over the largest
result, products in float32."""
DEVICE_EXPERTS_BF16 = Tolerance(5e-3, 2e-2)
"""The same with rows and what lies between the matrices rounded to bfloat16."""
DEVICE_ATTENTION = {torch.float32: Tolerance(3.3e-7, 1.3e-6), torch.bfloat16: Tolerance(3.6e-3, 1.4e-2)}
"""The device's attention against float64 with the same keys and values, by their type. Results are near 1."""
DEVICE_DRAW = Tolerance(1.0e-8, 4e-8)
"""Shares of tokens, rounded to float32 and summed, against float64's: so far beside a token's share may the number lie
that the device draws it by."""

PREGATED_LOGPROBS = Tolerance(9.6e-7, 3.8e-6)
"""Log-probabilities of answers of tiny pre-gated models in float32 against the same classes in plain transformers."""

LLAMA_CPP_LOGITS = Tolerance(2.9e-6, 1.1e-5)
"""Log-probabilities of a tiny float32 model written as GGUF, llama.cpp 0.3.36's against transformers'."""
