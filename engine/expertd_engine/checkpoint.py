"""Reads a Hugging Face checkpoint (safetensors, sharded or not, quantised or not) as the model's own parameters.

Which stored tensors make which parameter is transformers' knowledge (its weight-conversion mapping); here it is applied
to one parameter, or one expert of it, at a time. Owns the open files; holds no weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.quantizers import AutoHfQuantizer

from expertd_engine.errors import ModelError
from expertd_engine.families import Config, Model, expert_parameter_names, tied_names, weight_dtypes

Slice: TypeAlias = Any
"""safetensors' lazy view of one stored tensor; the library publishes no types."""

_PIECE_BYTES = 64 * 2**20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(slots=True)
class _Recipe:
    """How one converter application, or one renamed tensor, makes parameters."""

    first_target: str
    converter: Any | None
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Source pattern → stored names in natural order (one name under itself where nothing is converted)."""

    def targets(self) -> list[str]:
        if self.converter is None:
            return [self.first_target]
        first, *rest = self.converter.target_patterns
        return [self.first_target, *(self.first_target.replace(first, other) for other in rest)]


class Checkpoint:
    """The stored tensors of a folder, arranged by the parameters of `model` (on the meta device) that they make.

    Raises ModelError at once for unreadable files, and for missing or unexpected tensors: scales of a quantised
    checkpoint that nothing consumes would otherwise be lost without a word.
    """

    def __init__(self, folder: Path, model: Model, dtype: torch.dtype) -> None:
        self._folder = folder
        self._model = model
        self._tensors = _open_tensors(folder)
        self._dtypes = weight_dtypes(model, dtype)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        quantizer = _quantizer(model.config)
        mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        self._recipes = self._arrange(mapping)
        self._drop_tied_copies()
        self._check_experts()
        missing = sorted(self._shapes.keys() - self._recipes.keys() - tied_names(model).keys())
        if missing:
            raise ModelError(f"checkpoint {folder} lacks {len(missing)} weights of the model: {_some(missing)}")

    def pieces(self, target: str, *, row_multiple: int = 1) -> Iterator[torch.Tensor]:
        """Parameter `target` as consecutive pieces of rows, each at most 64 MiB unless it must be converted.

        All but the last have a multiple of `row_multiple` rows, and that many at least.
        """
        recipe = self._recipes[target]
        if recipe.converter is not None:
            yield self._checked(target, self._convert(recipe, None)[target])
            return
        stored = self._tensors[recipe.sources[target][0]]
        shape = tuple(stored.get_shape())
        self._check_shape(target, shape)
        if not shape or shape[0] == 0:
            yield stored[...]
            return
        row_bytes = max(1, self._dtypes[target].itemsize * torch.Size(shape[1:]).numel())
        step = max(1, _PIECE_BYTES // row_bytes // row_multiple) * row_multiple
        for begin in range(0, shape[0], step):
            yield stored[begin : begin + step]

    def expert(self, targets: list[str], expert: int) -> dict[str, torch.Tensor]:
        """Slice `[expert]` of each parameter in `targets` (shape without the expert dimension), in stored precision."""
        made: dict[str, torch.Tensor] = {}
        for target in targets:
            if target not in made:
                made.update(self._convert(self._recipes[target], expert))
        return {target: self._checked(target, made[target], expert_slice=True) for target in targets}

    def _arrange(self, mapping: list[Any]) -> dict[str, _Recipe]:
        """Parameter name → recipe, for every stored tensor. Mirrors `convert_and_load_state_dict_in_model`."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        meta, prefix = self._model.state_dict(), self._model.base_model_prefix
        recipes: dict[str, _Recipe] = {}
        unexpected = []
        for key in sorted(self._tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            if target not in meta and key in meta:
                target, pattern = rename_source_key(key, [], [], prefix, meta)
            if target not in meta:
                unexpected.append(key)
                continue
            recipe = recipes.setdefault(target, _Recipe(target, by_pattern[pattern] if pattern else None))
            recipe.sources.setdefault(pattern or target, []).append(key)
            if pattern is None and len(recipe.sources[target]) > 1:
                raise ModelError(f"checkpoint {self._folder}: {_some(recipe.sources[target])} are all {target}")
        self._refuse_unexpected(unexpected)
        return {target: recipe for recipe in recipes.values() for target in recipe.targets()}

    def _refuse_unexpected(self, keys: list[str]) -> None:
        # Older checkpoints store the rotary frequencies, which the model computes; transformers ignores them likewise.
        ignored = {r"rotary_emb\.inv_freq", *(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ())}
        left = [key for key in keys if not any(re.search(pattern, key) for pattern in ignored)]
        if left:
            raise ModelError(
                f"checkpoint {self._folder} has {len(left)} tensors that a {type(self._model).__name__} does not know: "
                f"{_some(left)}"
            )

    def _check_experts(self) -> None:
        """Raise ModelError unless every experts parameter has exactly the sources of all its experts."""
        for target in sorted(expert_parameter_names(self._model) & self._recipes.keys()):
            recipe, num_experts = self._recipes[target], self._shapes[target][0]
            for pattern, keys in recipe.sources.items():
                if _is_per_expert(recipe, pattern):
                    _check_expert_keys(target, keys, num_experts)
                elif len(keys) != 1 or self._tensors[keys[0]].get_shape()[:1] != [num_experts]:
                    raise ModelError(f"checkpoint {self._folder}: {_some(keys)} do not stack {num_experts} experts")

    def _drop_tied_copies(self) -> None:
        """Forget a stored copy of a tied weight, after making sure that it is one."""
        for copy, original in tied_names(self._model).items():
            if copy in self._recipes and original in self._recipes:
                pairs = zip(self.pieces(copy), self.pieces(original), strict=True)
                if not all(torch.equal(one, other) for one, other in pairs):
                    raise ModelError(f"checkpoint {self._folder}: {copy} and {original} are tied but differ")
                del self._recipes[copy]
            elif copy in self._recipes:
                self._recipes[original] = self._renamed(self._recipes.pop(copy), copy, original)

    @staticmethod
    def _renamed(recipe: _Recipe, old: str, new: str) -> _Recipe:
        return _Recipe(new, recipe.converter, {new if key == old else key: v for key, v in recipe.sources.items()})

    def _convert(self, recipe: _Recipe, expert: int | None) -> dict[str, torch.Tensor]:
        """All parameters of a recipe; with `expert`, that expert's slice of each."""
        if recipe.converter is None:
            ((_, stored),) = self._sources(recipe, recipe.first_target, expert)
            return {recipe.first_target: stored[...] if expert is None else stored[0]}
        converter = deepcopy(recipe.converter)
        for pattern in recipe.sources:
            for key, tensor in self._sources(recipe, pattern, expert):
                converter.add_tensor(recipe.first_target, key, pattern, tensor[...])
        made = converter.convert(recipe.first_target, model=self._model, config=self._model.config)
        whole = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return whole if expert is None else {name: value[0] for name, value in whole.items()}

    def _sources(self, recipe: _Recipe, pattern: str, expert: int | None) -> list[tuple[str, Slice]]:
        """Stored tensors behind a pattern; with `expert`, that expert's alone, with a leading dimension if stacked."""
        keys = recipe.sources[pattern]
        if expert is None:
            return [(key, self._tensors[key]) for key in keys]
        if _is_per_expert(recipe, pattern):
            return [(keys[expert], self._tensors[keys[expert]])]
        return [(keys[0], self._tensors[keys[0]][expert : expert + 1])]

    def _checked(self, target: str, tensor: torch.Tensor, *, expert_slice: bool = False) -> torch.Tensor:
        self._check_shape(target, tuple(tensor.shape), expert_slice=expert_slice)
        return tensor

    def _check_shape(self, target: str, found: tuple[int, ...], *, expert_slice: bool = False) -> None:
        expected = self._shapes[target][1:] if expert_slice else self._shapes[target]
        if found != expected:
            raise ModelError(
                f"checkpoint {self._folder}: {target} has shape {list(found)}, but the model wants {list(expected)}"
            )


def copy_text_files(source: Path, destination: Path) -> None:
    """Tokenizer, chat template and generation settings of a checkpoint folder. ModelError if it has no tokenizer."""
    for name in _TEXT_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, destination / name)
    if not (destination / "tokenizer.json").is_file():
        save_tokenizer(source, destination)


def save_tokenizer(source: Path, destination: Path, gguf_file: str | None = None) -> None:
    """Write the tokenizer in `tokenizer.json` form, whatever form it has now. Raises ModelError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, local_files_only=True)
        tokenizer.save_pretrained(destination)
    except (ValueError, OSError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{source} has no tokenizer we can read: {' '.join(str(error).split())}") from error
    if not (destination / "tokenizer.json").is_file():
        raise ModelError(f"the tokenizer of {source} cannot be written as tokenizer.json; allowed are fast tokenizers")


def _is_per_expert(recipe: _Recipe, pattern: str) -> bool:
    """Whether the checkpoint stores one tensor for each expert, rather than all stacked in one."""
    return recipe.converter is not None and "*" in pattern


def _check_expert_keys(target: str, keys: list[str], num_experts: int) -> None:
    """Raise ModelError unless `keys`, in natural order, are those of experts 0 … `num_experts` - 1."""
    columns = zip(*(key.split(".") for key in keys), strict=True)
    differing = [column for column in columns if len(set(column)) > 1]
    expected = tuple(str(expert) for expert in range(num_experts))
    if len(keys) != num_experts or (num_experts > 1 and differing != [expected]):
        raise ModelError(f"{target}: the checkpoint has {len(keys)} of {num_experts} experts: {_some(keys)}")


def _open_tensors(folder: Path) -> Mapping[str, Slice]:
    """Stored name → lazy view, of all files that make up the checkpoint."""
    tensors: dict[str, Slice] = {}
    for path in _files(folder):
        try:
            file: Any = safe_open(path, framework="pt")
            tensors.update({name: file.get_slice(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return tensors


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        try:
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not an index of safetensors files: {error}") from error
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    raise ModelError(f"{folder} holds no weights we read: neither {_SINGLE} nor {_INDEX} is there")


def _quantizer(config: Config) -> Any | None:
    """transformers' quantiser set to dequantise, or None for a plain checkpoint."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    try:
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    except (ValueError, ImportError) as error:
        raise ModelError(f"checkpoints quantised with {method!r} cannot be read: {error}") from error
    if not hasattr(quantizer.quantization_config, "dequantize"):
        raise ModelError(f"checkpoints quantised with {method!r} cannot be read: allowed are fp8 and mxfp4")
    quantizer.quantization_config.dequantize = True
    return quantizer


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
