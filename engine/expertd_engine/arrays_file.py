"""Arrays that lie beside a store and hold for it alone: a dataclass of arrays, as a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from expertd_engine.errors import StoreError


@dataclass(frozen=True, slots=True)
class ArraysFile:
    """`names`: of a dataclass' fields, in order. `made_by`: the command that makes the file, for errors."""

    name: str
    version: int
    names: tuple[str, ...]
    made_by: str

    @classmethod
    def of(cls, name: str, version: int, kind: type[Any], made_by: str) -> ArraysFile:
        """For a dataclass `kind`, all of whose fields are arrays."""
        return cls(name, version, tuple(field.name for field in fields(kind)), made_by)

    def write(self, folder: Path, numbers: Any, store_id: str, told: Mapping[str, str] | None = None) -> Path:
        """`told`: what else the file says. Raises StoreError where the folder cannot be written to."""
        path = folder / self.name
        tensors = {name: np.ascontiguousarray(getattr(numbers, name)) for name in self.names}
        try:
            save_file(tensors, path, {"version": str(self.version), "store_id": store_id, **(told or {})})
            path.chmod(0o644)  # whoever reads the store reads this too
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot write {path}: {error}") from error
        return path

    def is_in(self, folder: Path) -> bool:
        return (folder / self.name).is_file()

    def read(self, folder: Path, store_id: str) -> dict[str, NDArray[Any]]:
        """The arrays by name. Raises StoreError where there is no such file, or none of this store and version."""
        path = folder / self.name
        if not path.is_file():
            raise StoreError(f"{folder} has no {self.name}: make one with `{self.made_by}`")
        try:
            with safe_open(path, "numpy") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in self.names}
        except (OSError, SafetensorError) as error:
            raise StoreError(f"cannot read {path}: {error}") from error
        if told.get("version") != str(self.version) or told.get("store_id") != store_id:
            raise StoreError(f"{path} is of another store or version: make one with `{self.made_by}`")
        return tensors
