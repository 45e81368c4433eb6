"""`expertd convert`. `--texts` and `--trained` are `refactor.command`'s; here is `--blocks E`: a dense Llama or Mistral
becomes a standard Mixtral checkpoint, the *block model*.

Expert e of a layer is block e of its FFN neurons; all E are chosen for every token by a zero router (top_k = E, each
weight exactly 1/E), and `down_proj` is scaled by E. With E a power of two no rounding is added: the same function.
`dense_source` reads the dense model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig

from expertd_engine.console import Progress, progress_bar, run_command, silent
from expertd_engine.dense_source import Weights, load_dense_config, open_weights, write_text_files
from expertd_engine.errors import ModelError, UsageError
from expertd_engine.families import DTYPES, Config, build_meta_model, tied_names
from expertd_engine.publish import publish
from expertd_engine.refactor.command import add_options, merge, refactor
from expertd_engine.refactor.gguf_export import write_gguf
from expertd_engine.tensor_file import TensorFileWriter, TensorShape

DEFAULT_BLOCKS = 16
_BLOCK_MULTIPLE = 32
_SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor to write: rows or columns `[begin, end)` of a dense weight times `scale`; zeros without a source."""

    shape: TensorShape
    source: str | None
    dim: int = 0
    begin: int = 0
    end: int | None = None
    scale: int = 1


def convert_blocks(
    source: Path, destination: Path, blocks: int | None = None, dtype: str = "auto", *, progress: Progress = silent
) -> None:
    """Write the block model of `source` (checkpoint folder or GGUF file) to the new folder `destination`.

    `blocks` None means 16, or the most that the FFN allows below. `dtype` is `float32`, `bf16`, or `auto`: bf16 if the
    source is, float32 otherwise. Raises ModelError for a model that Mixtral cannot express and for a `blocks` that its
    FFN does not divide into, naming what is allowed; ResourceError for a full disk.
    """
    config = load_dense_config(source)
    blocks = choose_blocks(config, blocks)
    torch_dtype = _dtype_of(config, dtype)
    progress("read", 0.0)
    weights = open_weights(source, config, torch_dtype)
    parts = _plan(config, blocks, torch_dtype)
    shards = _shards(parts)
    needed = sum(part.shape.num_bytes for part in parts.values())
    with publish(destination, needed_bytes=needed) as folder:
        _block_config(config, blocks, torch_dtype).save_pretrained(folder)
        write_text_files(source, config, folder)
        done = 0
        for path, names in shards.items():
            with TensorFileWriter(folder / path, {name: parts[name].shape for name in names}) as file:
                for name in names:
                    file.write(name, _read(weights, parts[name]))
                    done += parts[name].shape.num_bytes
                    progress("blocks", done / needed)
        if len(shards) > 1:
            _write_index(folder, shards, needed)


def allowed_blocks(config: Config) -> list[int]:
    """Block counts that work: powers of two whose blocks are a multiple of 32 neurons."""
    ffn = int(config.intermediate_size)
    return [2**power for power in range(ffn.bit_length()) if ffn % (2**power * _BLOCK_MULTIPLE) == 0]


def choose_blocks(config: Config, wanted: int | None) -> int:
    """`wanted`, or the best default. Raises ModelError, listing what works, unless the FFN divides so."""
    allowed = allowed_blocks(config)
    blocks = max((count for count in allowed if count <= DEFAULT_BLOCKS), default=1) if wanted is None else wanted
    if blocks not in allowed:
        raise ModelError(
            f"--blocks {blocks} does not work for an FFN of {config.intermediate_size} neurons: allowed are "
            f"{', '.join(map(str, allowed)) or 'none'} (powers of two, each block a multiple of {_BLOCK_MULTIPLE})"
        )
    return blocks


def _dtype_of(config: Config, dtype: str) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if config.dtype == torch.bfloat16 else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known: allowed are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _block_config(config: Config, blocks: int, dtype: torch.dtype) -> Any:
    """Built anew, never copied: a GGUF file's configuration carries a `quantization_config`, and no architecture."""
    same = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
        "attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return MixtralConfig(
        **{name: getattr(config, name) for name in same},
        intermediate_size=config.intermediate_size // blocks,
        num_local_experts=blocks,
        num_experts_per_tok=blocks,
        sliding_window=getattr(config, "sliding_window", None),
        dtype=dtype,
        architectures=["MixtralForCausalLM"],
    )


def _plan(config: Config, blocks: int, dtype: torch.dtype) -> dict[str, _Part]:
    """Stored name → what it is made of, in the model's order."""
    model = build_meta_model(config, dtype)
    parts: dict[str, _Part] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in tied_names(model):
            continue
        if ".mlp." in name:
            parts.update(_blocks_of(name, shape, blocks, dtype))
        else:
            parts[name] = _Part(TensorShape(dtype, shape), name)
    for layer in range(config.num_hidden_layers):
        router = TensorShape(dtype, (blocks, config.hidden_size))
        parts[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = _Part(router, None)
    return parts


def _blocks_of(name: str, shape: tuple[int, ...], blocks: int, dtype: torch.dtype) -> Iterator[tuple[str, _Part]]:
    """One FFN weight, `model.layers.L.mlp.{gate,up,down}_proj.weight`, cut along its neurons."""
    layer, _, projection = name.partition(".mlp.")
    stored, dim = {"gate_proj.weight": ("w1", 0), "up_proj.weight": ("w3", 0), "down_proj.weight": ("w2", 1)}[
        projection
    ]
    size = shape[dim] // blocks
    cut = TensorShape(dtype, (size, shape[1]) if dim == 0 else (shape[0], size))
    scale = blocks if stored == "w2" else 1
    for block in range(blocks):
        part = _Part(cut, name, dim, block * size, (block + 1) * size, scale)
        yield f"{layer}.block_sparse_moe.experts.{block}.{stored}.weight", part


def _read(weights: Weights, part: _Part) -> Iterator[torch.Tensor]:
    if part.source is None:
        yield torch.zeros(part.shape.shape, dtype=part.shape.dtype)
        return
    row = 0
    for piece in weights.pieces(part.source):
        if part.end is None:
            yield piece
        elif part.dim == 1:
            yield piece[:, part.begin : part.end].to(part.shape.dtype) * part.scale
        else:
            yield piece[max(part.begin - row, 0) : max(part.end - row, 0)]
        row += piece.shape[0]


def _shards(parts: Mapping[str, _Part]) -> dict[str, list[str]]:
    """File name → stored names in it; files of about 4 GB, named as transformers names them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, part in parts.items():
        if size + part.shape.num_bytes > _SHARD_BYTES and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += part.shape.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_index(folder: Path, shards: Mapping[str, list[str]], total_bytes: int) -> None:
    weight_map = {name: path for path, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd convert`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd convert", description="Make a MoE checkpoint of a dense model.")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--blocks", type=int, help="the same function, as this many experts a layer: a power of two")
    kind.add_argument(
        "--texts", type=Path, help="train experts and their router on texts: one folder a domain, or files"
    )
    kind.add_argument("--trained", type=Path, help="merge a trained delta into SRC: a file, demo, or sparse")
    kind.add_argument("--gguf", type=Path, metavar="DENSE",
                      help="write SRC, made with --routing layers, as the GGUF file DST for llama.cpp, with the "
                      "vocabulary of DENSE, a GGUF file of the dense model")  # fmt: skip
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="default: the source's own")
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint folder or GGUF file")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder of the new checkpoint")
    add_options(parser)
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.gguf is not None:
        write_gguf(options.source, options.gguf, options.destination)
        print(options.destination)
        return
    if options.blocks is None:
        (refactor if options.texts else merge)(options)
        print(f"{options.destination}; next: expertd prepare {options.destination} STORE")
        return
    with progress_bar() as progress:
        convert_blocks(options.source, options.destination, options.blocks, options.dtype, progress=progress)
    print(f"{options.destination}: {options.blocks} experts a layer; next: expertd prepare {options.destination} STORE")
