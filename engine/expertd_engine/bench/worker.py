"""The process that holds an engine, or a peer, while it is measured: requests in on stdin, answers out on stdout.

One process for each contender, so that their memory can be told apart, limited and lost apart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from expertd_engine.bench.protocol import (
    Answer,
    DecodeRequest,
    DescribeRequest,
    DiskRequest,
    EngineSpec,
    PeerSpec,
    PrefillRequest,
    Request,
    TurnsRequest,
)
from expertd_engine.errors import ExpertdError

Serve = Callable[[Request], Any]


def main() -> None:
    """`python -m expertd_engine.bench.worker SPEC`, SPEC an `EngineSpec` or a `PeerSpec` as JSON."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a library prints must not come between answers
    specification = msgspec.json.decode(sys.argv[1], type=EngineSpec | PeerSpec)
    try:
        serve = _peer(specification) if isinstance(specification, PeerSpec) else _engine(specification)
    except ExpertdError as error:
        answers.write(_line(Answer(error=str(error))))
        return
    answers.write(_line(Answer()))
    for line in sys.stdin.buffer:
        try:
            answer = Answer(serve(msgspec.json.decode(line, type=Request)))
        except ExpertdError as error:
            answer = Answer(error=str(error))
        answers.write(_line(answer))


def _peer(specification: PeerSpec) -> Serve:
    from expertd_engine.bench.peer_llamacpp import Peer  # needs the extra [bench]

    return Peer(specification).serve


def _engine(specification: EngineSpec) -> Serve:
    from expertd_engine.bench.session import EngineSession  # loads torch, which a peer's process must not
    from expertd_engine.bench.turns import take_turns

    session = EngineSession(specification)

    def serve(request: Request) -> Any:
        match request:
            case DecodeRequest():
                return session.decode(request)
            case TurnsRequest():
                return take_turns(session, request)
            case PrefillRequest():
                return session.prefill(request)
            case DiskRequest(seconds=seconds):
                return session.disk(seconds)
            case DescribeRequest():
                return session.describe()

    return serve


def _line(answer: Answer) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


if __name__ == "__main__":
    main()
