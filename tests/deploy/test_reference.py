"""deploy/README.md has every option and every metric, as the code has them."""

from __future__ import annotations

import importlib.util

from support.prometheus import ROOT


def test_the_tables_are_what_the_code_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "deploy" / "reference.py")
    assert spec is not None and spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    assert text == reference.with_tables(text, reference.from_the_code()), "run deploy/reference.py"
