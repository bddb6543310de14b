"""Indexes that tests ask through everything that stands before one, and servers for them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn

from agentr1.retrieval.base import Hit, Passage


class EchoIndex:
    """Finds for any query `k` passages that quote it; keeps what it was asked, and where."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], int]] = []
        self.threads: list[threading.Thread] = []

    def __len__(self) -> int:
        return 1000

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.asked.append((tuple(queries), k))
        self.threads.append(threading.current_thread())
        return [echo(query, k) for query in queries]


def echo(query: str, k: int) -> list[Hit]:
    return [
        Hit(Passage(f"{query}-{place}", f"About {query}", f"Text {place} of {k}."), 1.0 / place)
        for place in range(1, k + 1)
    ]


class GatedIndex(EchoIndex):
    """Every search waits until it is let through."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)

    def search(self, queries: Sequence[str], k: int) -> list[list[Hit]]:
        self.entered.release()
        assert self.gate.acquire(timeout=20)
        return super().search(queries, k)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """A web application on a real port of this machine, in a thread; its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def free_port() -> int:
    """A port where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
