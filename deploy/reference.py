"""Writes the tables of options and metrics in deploy/README.md anew from the code: `python deploy/reference.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path

from prometheus_client.metrics_core import Metric

from expertd_engine.config import Config

README = Path(__file__).parent / "README.md"


def options() -> Iterator[str]:
    """One row for each option, in the order of the configuration."""
    yield from ("| option | default | |", "| --- | --- | --- |")
    for option in fields(Config):
        default = option.default
        shown = "" if default is None else f"`{('on' if default else 'off') if isinstance(default, bool) else default}`"
        yield f"| `--{option.name.replace('_', '-')}` | {shown} | {option.metadata['help']} |"


def metrics(families: Iterable[Metric]) -> Iterator[str]:
    """One row for each of expertd's own families, with the labels that its samples have."""
    yield from ("| metric | type | labels | |", "| --- | --- | --- | --- |")
    for family in sorted(families, key=lambda one: one.name):
        if family.name.startswith("expertd_"):
            labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
            name = family.name + ("_total" if family.type == "counter" else "")
            shown = ", ".join(f"`{label}`" for label in labels)
            yield f"| `{name}` | {family.type} | {shown} | {family.documentation} |"


def with_tables(text: str, tables: Mapping[str, Iterable[str]]) -> str:
    """`text` with each table between its two marks."""
    for name, rows in tables.items():
        begin, end = f"<!-- {name}: written by reference.py -->\n", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        assert found and found_end, f"no marks for {name}"
        text = before + "\n".join([begin.strip(), *rows, end]) + after
    return text


def from_the_code() -> Mapping[str, list[str]]:
    """Both tables. The metrics are those of a server whose engine is ready."""
    from expertd_server.metrics import Metrics
    from support.fake_numbers import engine_info

    shown = Metrics()
    shown.serve_routes({"/": ["GET"]}, lambda: 0)
    shown.engine_ready("", engine_info(memory_budget_bytes=1))
    return {"options": list(options()), "metrics": list(metrics(shown.registry.collect()))}


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(README.parents[1] / "tests"))
    README.write_text(with_tables(README.read_text(encoding="utf-8"), from_the_code()), encoding="utf-8")
