"""The flags of `expertd bench` and its subcommands, and what they allow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from expertd_engine.config import Config, DeviceMisses, Policy
from expertd_engine.experts.store_format import TARGETS

DEVICES = ("cpu", "cuda")
PEERS = ("llamacpp", "transformers")


def parser() -> argparse.ArgumentParser:
    """Of the whole command line; the subcommand's name is `command`."""
    whole = argparse.ArgumentParser(
        prog="expertd bench", description="Measure. Prints a table, then one JSON object on the last line."
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    decode = commands.add_parser("decode", help="tokens a second of running streams")
    prefill = commands.add_parser("prefill", help="time to the first token, alone and beside a decode")
    serve = commands.add_parser("serve", help="streams over HTTP against a daemon")
    for command, prompt, tokens in ((decode, 32, 64), (prefill, 512, 64), (serve, 32, 64)):
        _add_engine(command)
        _add_run(command, prompt, tokens)
    io = commands.add_parser("io", help="read bandwidth of disk and memory")
    _add_model(io)
    io.add_argument("--runs", type=_positive, default=5, metavar="N", help="runs of a second each (default: 5)")
    _add_foresight(commands.add_parser("foresight", help="a governed predictor against none, cell by cell"))
    _add_quality(commands.add_parser("quality", help="what virtual mode costs in quality, beside its baselines"))
    _add_virtual(commands.add_parser("virtual", help="a token of virtual mode beside one of a smaller model"))
    _add_planner(commands.add_parser("planner", help="what plans foretell beside what is measured"))
    _add_perplexity(commands.add_parser("perplexity", help="what store formats cost, on held-out text"))
    _add_make_model(commands.add_parser("make-model", help="write a store of random weights in a known shape"))
    _add_readme(commands.add_parser("readme", help="what routes known ahead buy, on traces of conversations"))
    _add_routing(commands.add_parser("routing", help="the generated routes: how well they fit what was published"))
    return whole


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="store, or whatever `expertd serve` takes")
    command.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    command.add_argument("--threads", type=_positive, metavar="N", help="compute threads (default: all cores)")
    command.add_argument("--io-threads", type=_positive, default=2, metavar="N", help="reading threads (default: 2)")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", choices=DEVICES, default="cpu", help="what computes (default: cpu)")


def _add_engine(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_device(command)
    command.add_argument("--expert-budget", metavar="SIZE", help="as for serve, such as 25%% or 2GiB")
    command.add_argument("--memory-budget", metavar="SIZE", help="as for serve")
    command.add_argument("--cgroup", action="store_true", help="run in a memory cgroup of --memory-budget; needs root")
    command.add_argument("--policy", choices=get_args(Policy), default="auto", help="which expert gives way")
    command.add_argument("--no-prefetch", action="store_true", help="load on demand alone")
    command.add_argument("--device-misses", choices=get_args(DeviceMisses), default="link", help="as for serve")
    command.add_argument(
        "--routing",
        default="model",
        metavar="R",
        help="model, uniform, calibrated:qwen3-30b, calibrated:fine, trace:FILE",
    )
    command.add_argument(
        "--hints", default="none", metavar="H",
        help="what is foreseen of generated routes: none, exact (a step's, when it begins), exact:LEADS (so many "
        "layers ahead), default, or recalls by lead such as 0.9,0.8",
    )  # fmt: skip
    command.add_argument("--max-step-tokens", type=_positive, default=512, metavar="N", help="tokens in one step")


def _add_run(command: argparse.ArgumentParser, prompt: int, tokens: int) -> None:
    command.add_argument(
        "--streams", type=_positives, default=[1], metavar="N", help="sequences at once (default: 1); cuda: also N+M+…"
    )
    command.add_argument(
        "--prompt", type=_positive, default=prompt, metavar="N", help=f"prompt (default: {prompt} tokens)"
    )
    command.add_argument(
        "--tokens", type=_positive, default=tokens, metavar="N", help=f"timed tokens (default: {tokens})"
    )
    command.add_argument("--warm", type=_positive, default=32, metavar="N", help="tokens before (default: 32)")
    command.add_argument("--pairs", type=_positive, default=5, metavar="N", help="interleaved rounds (default: 5)")
    command.add_argument("--peer", choices=PEERS, help="time a peer on the same shape, in turn with ours")
    command.add_argument("--versus", metavar="K=V,…", help="time a second engine with these options changed")
    command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="wait so long for one answer")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of routes and prompts")


def _add_foresight(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_device(command)
    command.add_argument(
        "--routing", default="uniform,calibrated:fine", metavar="R,…", help="(default: uniform,calibrated:fine)"
    )
    command.add_argument("--trace", type=Path, metavar="TRACE", help="routes of `expertd trace record` too")
    command.add_argument(
        "--hints", default="default", metavar="H", help="of these routes: default, exact[:LEADS], recalls by lead"
    )
    command.add_argument("--disk-mib-s", type=_positive, metavar="N", help="as on a disk that reads N MiB a second")
    command.add_argument("--policy", choices=get_args(Policy), default="auto", help="which expert gives way")
    command.add_argument("--pairs", type=_positive, default=15, metavar="N", help="interleaved rounds (default: 15)")
    command.add_argument("--tokens", type=_fours, default=48, metavar="N", help="timed tokens (default: 48)")
    command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="wait so long for one answer")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of routes and prompts")


def _add_quality(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--tokens", type=_positive, default=512, metavar="N", help="of text (default: 512)")
    command.add_argument("--methods", metavar="M,…", help="some of the methods (default: all)")
    command.add_argument("--slots", metavar="X,…", help="slots a layer, of top-k (default: 6,4,3,2,1.25)")
    command.add_argument("--png", type=Path, metavar="FILE", help="draw slots against perplexity")


def _add_virtual(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    _add_device(command)
    command.add_argument("--slots", type=_positive, required=True, metavar="N", help="experts held in each layer")
    command.add_argument("--pairs", type=_positive, default=15, metavar="N", help="interleaved rounds (default: 15)")
    command.add_argument("--tokens", type=_positive, default=48, metavar="N", help="timed in a round (default: 48)")


def _add_planner(command: argparse.ArgumentParser) -> None:
    command.add_argument("stores", nargs="+", type=Path, metavar="STORE", help="stores that were profiled")
    command.add_argument(
        "--routing", default="model,calibrated:fine", metavar="R,…", help="(default: model,calibrated:fine)"
    )
    command.add_argument(
        "--budgets", default="100%,75%,50%,35%,20%", metavar="SIZE,…",
        help="for experts, as for serve (default: 100%%,75%%,50%%,35%%,20%%)",
    )  # fmt: skip
    command.add_argument("--rounds", type=_positive, default=5, metavar="N", help="of all budgets (default: 5)")
    command.add_argument("--tokens", type=_positive, default=64, metavar="N", help="timed in each (default: 64)")
    command.add_argument("--only", choices=("speed", "memory"), help="of the two (default: both)")


def _add_perplexity(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="checkpoint, GGUF file, hub id or demo")
    command.add_argument("--cache-dir", type=Path, default=Config().cache_dir, metavar="DIR", help="prepared models")
    command.add_argument("--formats", default="int8,int4,int4s", metavar="F,…", help="(default: int8,int4,int4s)")
    command.add_argument("--windows", type=_positive, default=40, metavar="N", help="of 512 tokens (default: 40)")


def _add_make_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("destination", type=Path, metavar="DST", help="folder of the new store")
    command.add_argument("--shape", required=True, help="olmoe-1b-7b, qwen3-30b-a3b, mixtral-8x7b or gpt-oss-20b")
    command.add_argument("--experts", required=True, metavar="FORMAT", help="format of experts, as for prepare")
    command.add_argument("--dense", metavar="FORMAT", help="format of all other matrices (default: as experts)")
    command.add_argument("--layers", type=_positive, metavar="N", help="cut to so many layers")
    command.add_argument("--vocabulary", type=_positive, metavar="N", help="cut to so many tokens")
    command.add_argument("--for", dest="order", choices=TARGETS, default="cpu", help="what computes (default: cpu)")
    command.add_argument("--one-layer", action="store_true", help="let all layers share the records of the first")
    command.add_argument("--narrow", type=_positive, default=1, metavar="N", help="divide widths and heads by N")
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.add_argument("--force", action="store_true", help="replace DST if it is a store already")


def _add_readme(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--texts", type=Path, required=True, metavar="DIR", help="one folder of plain text a domain")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="recorded answers, figures, plots")
    command.add_argument("--traces", type=_positive, default=10, metavar="N", help="(default: 10)")
    command.add_argument("--requests", type=_positive, default=48, metavar="N", help="of a trace (default: 48)")
    command.add_argument("--cached", type=_positive, default=3, metavar="N", help="experts a layer (default: 3)")
    command.add_argument("--load", type=float, default=0.7, metavar="X", help="of what the best baseline serves (0.7)")
    command.add_argument("--max-sequences", type=_positive, default=64, metavar="N", help="(default: 64)")
    command.add_argument("--max-step-tokens", type=_positive, default=16, metavar="N", help="(default: 16)")
    command.add_argument(
        "--real", type=_positive, default=0, metavar="N", help="also run traces of N requests for real"
    )
    command.add_argument(
        "--real-arms", choices=("all", "prefetch"), default="all", help="ways of serving that run for real (all)"
    )
    command.add_argument("--real-only", action="store_true", help="leave the simulation out")
    command.add_argument("--disk-mib-s", type=_positive, metavar="N", help="as on a disk that reads N MiB a second")


def _add_routing(command: argparse.ArgumentParser) -> None:
    command.add_argument("--fit", action="store_true", help="fit the parameter file anew before it is shown")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a whole number from 1 on")
    return int(text)


def _fours(text: str) -> int:
    if _positive(text) % 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: give a multiple of 4")
    return int(text)


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split("+")]
