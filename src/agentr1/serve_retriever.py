"""`agentr1 serve-retriever`: an index over HTTP, for trainers on other machines.

Opens the index, binds the address first so that a mistake shows at once, and serves until Ctrl-C or
SIGTERM, after which requests under way are still answered. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentr1.commandline import add_debug, guarded
from agentr1.retrieval.base import Index
from agentr1.retrieval.limits import Limits
from agentr1.retrieval.manifest import NAME
from agentr1.retrieval.places import open_place
from agentr1.signals import StopSignals

_GRACE_SECONDS = 5
"""Beyond what a request may take: after a signal, those under way are answered or given up by then.
"""
_HELP = {
    "default_k": "passages per query where a request does not say",
    "max_k": "passages per query",
    "max_queries": "queries of one request",
    "max_chars": "characters of one query",
    "max_bytes": "bytes of one request",
    "max_hits": "passages of one answer, queries times topk",
    "max_seconds": "seconds until a request is given up (503): most clients have left by then",
    "max_batch": "queries of one search of the index",
    "max_waiting": "queries waiting; beyond that a request is told to come back later (503)",
    "searches": "searches of the index at the same time",
}


def serve_retriever(
    place: str, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None
) -> None:
    """Serve an index until a signal ends it.

    Args:
        place: an index folder, a passages file, or the address of an engine.
        host: address to listen on; `0.0.0.0` for all of them.
        port: 0 for any free one.
        limits: of requests and searches.
    """
    try:
        import uvicorn

        from agentr1.retrieval.server import make_app
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the retriever's server needs {error.name}, which is not installed; "
            'pip install "agentr1[serve]"'
        ) from error
    limits = limits or Limits()
    with _bound(host, port) as listener:
        print(f"opening {place}", file=sys.stderr, flush=True)
        index = open_place(place)
        app = make_app(index, _about(place, index), limits)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                # Longer than clients keep an idle connection, or a request might meet its end.
                timeout_keep_alive=75,
                timeout_graceful_shutdown=limits.max_seconds + _GRACE_SECONDS,
                lifespan="off",
            )
        )
        # When it has shut down, uvicorn raises the signal again for whoever had it before: us, so
        # that being asked to stop is no failure.
        signals = StopSignals()
        signals.take_over(lambda number, frame: setattr(server, "should_exit", True))
        address = f"[{host}]" if ":" in host else host
        port = listener.getsockname()[1]
        print(f"serving {len(index):,} passages at http://{address}:{port}/retrieve", flush=True)
        try:
            server.run(sockets=[listener])
        finally:
            signals.give_back()
    print("stopped", flush=True)


def _about(place: str, index: Index) -> dict[str, Any]:
    """What `/health` says of the index: its kind and, of a folder, the manifest's checksum."""
    manifest = Path(place) / NAME
    if not manifest.is_file():
        return {"index": type(index).__name__, "manifest": None}
    text = manifest.read_bytes()
    return {"index": json.loads(text)["kind"], "manifest": hashlib.sha256(text).hexdigest()}


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken but not yet listened on: until then clients are refused, not kept."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port} ({error}); choose another --port (0 for any free "
            "one), or stop what uses it"
        ) from error
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 serve-retriever DIR [--host H] [--port P] [--max-batch N] ...`."""
    parser = argparse.ArgumentParser(
        prog="agentr1 serve-retriever",
        description="Serve an index over HTTP, in the protocol of Search-R1's servers.",
        allow_abbrev=False,
    )
    parser.add_argument("place", metavar="DIR", help="index folder, or a passages file")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 for any free one")
    for field in dataclasses.fields(Limits):
        option = f"--{field.name.replace('_', '-')}"
        words = f"{_HELP[field.name]} (default {field.default})"
        parser.add_argument(option, type=int, metavar="N", default=field.default, help=words)
    add_debug(parser)
    args = parser.parse_args(argv)
    given = {name: getattr(args, name) for name in _HELP}
    return guarded(
        lambda: serve_retriever(args.place, args.host, args.port, Limits(**given)), args.debug
    )
