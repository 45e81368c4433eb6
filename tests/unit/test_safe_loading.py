"""Nothing that comes from a file or a request is ever run: no pickles, no evaluated text, no remote code, no shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*ROOT.glob("engine/**/*.py"), *ROOT.glob("server/**/*.py")])

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
    "tempfile.mktemp",
}  # fmt: skip


def findings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            literals = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
            if name in FORBIDDEN_CALLS or (name == "torch.load" and literals.get("weights_only") is not True):
                yield name
            yield from (
                k for k in ("trust_remote_code", "shell", "allow_pickle") if literals.get(k, False) is not False
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe_is_called(path: Path) -> None:
    assert list(findings(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "eval(x)", "torch.load(p)", "torch.load(p, weights_only=False)",
        "f(trust_remote_code=True)", "f(trust_remote_code=flag)", "np.load(p, allow_pickle=True)",
        "run(c, shell=True)", "yaml.load(t)",
    ],
)  # fmt: skip
def test_what_is_unsafe_is_found(source: str) -> None:
    assert list(findings(source))
