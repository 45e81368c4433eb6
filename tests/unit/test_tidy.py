"""The shape of the tree: who may import whom, what stays pure, and how long a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE, SERVER = ROOT / "engine" / "expertd_engine", ROOT / "server" / "expertd_server"
FILES = sorted([*ENGINE.rglob("*.py"), *SERVER.rglob("*.py")])
LONGEST_FUNCTION = 60

SERVER_MAY_IMPORT = ("errors", "config", "messages", "snapshot", "planning")
PURE = (
    "messages",
    "snapshot",
    "config",
    "errors",
    "request",
    "sequence_stats",
    "kv_pool",
    "prefix_cache",
    "paths",
    "batching",
    "queues",
    "scheduler",
    "trials",
    "step_filler",
    "step_plan",
    "core",
    "experts.events",
    "experts.ledger",
    "experts.ledger_base",
    "experts.room",
    "experts.accounting",
    *(f"experts.device_{name}" for name in ("aside", "events", "layout", "pool", "publication", "slots", "uses")),
    "experts.policy",
    "experts.lookahead",
    "experts.governor",
    "experts.payoff",
    "experts.lead",
    "experts.device_listening",
    "experts.pregated",
    "experts.held_layer",
    "experts.swaps",
    "experts.virtual",
    "experts.virtual_paths",
    "experts.virtual_room",
    *(f"planning.{path.stem}" for path in sorted((ENGINE / "planning").glob("*.py")) if path.stem != "__init__"),
)
PURE_ON_ARRAYS = tuple(f"experts.device_{name}" for name in ("columns", "ledger", "plan"))
"""As pure, but numpy is theirs: they decide about hundreds of experts at once."""
IMPURE = ("torch", "transformers", "numpy", "time", "socket", "zmq", "threading", "random")


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    names = list(imports(path))
    if ENGINE in path.parents:
        assert not [name for name in names if name.startswith("expertd_server")]
    else:
        allowed = tuple(f"expertd_engine.{name}" for name in SERVER_MAY_IMPORT)
        foreign = [name for name in names if name.startswith("expertd_engine") and not name.startswith(allowed)]
        assert not foreign and not [name for name in names if name.split(".")[0] in ("torch", "transformers")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_and_its_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring opens the file"
    assert "TODO" not in text and "FIXME" not in text
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_who_decides_is_pure() -> None:
    """None of our pure modules imports clocks, threads, sockets or numerics, directly or through another of ours."""
    assert impure_of(PURE) == {}
    on_arrays = impure_of(PURE_ON_ARRAYS)
    assert {name for names in on_arrays.values() for name in names if name.split(".")[0] != "numpy"} == set()


def impure_of(modules: tuple[str, ...]) -> dict[str, list[str]]:
    """What is impure that each of these modules and those of ours that it imports imports, where that is anything."""
    found = {}
    pending = [f"expertd_engine.{name}" for name in modules]
    while pending:
        module = pending.pop()
        path = ENGINE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if module in found or not path.is_file():
            continue
        names = list(imports(path))
        found[module] = sorted({name for name in names if name.split(".")[0] in IMPURE})
        pending += [name.rpartition(".")[0] for name in names if name.startswith("expertd_engine.")]
    assert {f"expertd_engine.{name}" for name in modules} <= found.keys()
    return {module: names for module, names in found.items() if names}


def loaded_by(modules: list[str], heavy: tuple[str, ...]) -> list[str]:
    """Which of `heavy` a fresh interpreter has loaded after importing `modules`."""
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*set({heavy!r}) & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_neither_the_pure_core_nor_the_server_loads_torch() -> None:
    heavy = ("torch", "transformers", "numpy")
    assert loaded_by([f"expertd_engine.{name}" for name in PURE], (*heavy, "zmq")) == []
    assert loaded_by([f"expertd_engine.{name}" for name in PURE_ON_ARRAYS], ("torch", "transformers", "zmq")) == []
    server = [f"expertd_server.{path.stem}" for path in sorted(SERVER.glob("*.py")) if not path.stem.startswith("__")]
    assert [name for name in loaded_by(server, heavy) if name != "numpy"] == []
