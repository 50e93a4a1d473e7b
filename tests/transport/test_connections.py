"""Who has ended a connection: a peer before this rank, or this rank itself."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from pydist.transport.connections import Connections, established

PEER = """
import socket, sys
socket.create_connection(("127.0.0.1", int(sys.argv[1]))).recv(1)
"""


@pytest.fixture
def peers() -> Iterator[tuple[list[subprocess.Popen[bytes]], Connections]]:
    """Ranks 1 and 2, processes with a connection each, and the connections of rank 0."""
    before, store = established(), dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        processes, ours = [], []
        for rank in (1, 2):
            processes.append(subprocess.Popen([sys.executable, "-c", PEER, port]))
            ours.append(server.accept()[0])
            theirs = ours[-1].getpeername(), ours[-1].getsockname()
            store.set(f"group/connections/{rank}", json.dumps([theirs]))
    yield processes, Connections(store, "group", 0, 3, before, timedelta(seconds=10))
    for process, found in zip(processes, ours, strict=True):
        process.kill()
        process.wait()
        found.close()


def test_a_peer_that_ended_first_is_known(
    peers: tuple[list[subprocess.Popen[bytes]], Connections],
) -> None:
    """A call may fail of it, and abort, before the thread that watches has run."""
    processes, connections = peers
    processes[1].kill()
    processes[1].wait()
    connections.abort()
    assert connections.hung_up == [2]


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "after abort"])
def test_the_thread_tells_of_those_that_ended_first(
    peers: tuple[list[subprocess.Popen[bytes]], Connections], seen: bool
) -> None:
    processes, connections = peers
    told: list[float] = []
    connections.watch(lambda: told.append(time.monotonic()))
    if not seen:
        connections.abort()
    processes[0].kill()
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    connections.abort()
    connections.close()
    assert told and connections.hung_up == ([1] if seen else [])
