"""The TCP connections below process groups: to notice that a peer is gone, and to end a wait.

``torch.distributed`` with gloo offers neither. A rank that waits for a message from a peer that
lives is not woken when a third rank is gone, and nothing ends a wait before its timeout. The
sockets tell, and shutting them down ends every wait on them, here and at the peers.

Which sockets are a group's is found without guessing: every rank publishes the addresses of the
connections that came up while the groups were made; one is a connection to a peer if the peer
published the same pair of addresses the other way around. Where addresses are rewritten in between
(NAT) nothing is found, and the group's timeout is what remains.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch._C._distributed_c10d import Store

Pair = tuple[tuple[str, int], tuple[str, int]]
"""Address and port here, and of the other end."""

_HANG_UP = getattr(select, "POLLRDHUP", 0)  # Linux


def _file_descriptors() -> list[int]:
    for directory in ("/proc/self/fd", "/dev/fd"):
        with contextlib.suppress(OSError):
            return [int(name) for name in os.listdir(directory) if name.isdigit()]
    return []


def _own_copy(descriptor: int) -> socket.socket | None:
    """The socket behind a file descriptor, if it is one, with a descriptor of its own."""
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return socket.socket(fileno=os.dup(descriptor))
    except OSError:  # closed in the meantime
        pass
    return None


def _established() -> Iterator[tuple[Pair, socket.socket]]:
    """The TCP connections of this process; each socket is the caller's to close."""
    for descriptor in _file_descriptors():
        found = _own_copy(descriptor)
        if found is None:
            continue
        try:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                raise OSError
            local, remote = found.getsockname()[:2], found.getpeername()[:2]
        except OSError:  # another kind of socket, or one that is not connected
            found.close()
            continue
        yield (local, remote), found


def established() -> set[Pair]:
    """The addresses of this process's TCP connections."""
    pairs = set()
    for pair, found in _established():
        pairs.add(pair)
        found.close()
    return pairs


class Connections:
    """The connections of a rank's process groups to its peers.

    Args:
        store: Where ranks publish addresses.
        name: Unique, the same on all ranks.
        rank: This rank's place in the group.
        size: Ranks of the group.
        before: What :func:`established` gave before the groups were made.
        timeout: How long to wait for the others' addresses.

    Attributes:
        hung_up: Places of the peers that ended a connection before this rank did.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        before: set[Pair],
        timeout: timedelta,
    ) -> None:
        new = {pair: found for pair, found in _established() if pair not in before}
        store.set(f"{name}/connections/{rank}", json.dumps(list(new)))
        keys = {peer: f"{name}/connections/{peer}" for peer in range(size) if peer != rank}
        if keys:
            store.wait(list(keys.values()), timeout)
        self._sockets: dict[int, tuple[int, socket.socket]] = {}  # by descriptor; with the peer
        for peer, key in keys.items():
            for local, remote in json.loads(store.get(key)):
                found = new.pop((tuple(remote), tuple(local)), None)
                if found is not None:
                    self._sockets[found.fileno()] = peer, found
        for found in new.values():  # somebody else's
            found.close()
        self.hung_up: list[int] = []
        self._aborted = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None

    def watch(self, lost: Callable[[], None]) -> None:
        """Starts a thread that calls ``lost`` for every peer that hangs up."""
        if not self._sockets or not _HANG_UP or self._thread is not None:
            return
        self._wake = socket.socketpair()
        poller = select.poll()
        for _, found in self._sockets.values():
            poller.register(found, _HANG_UP)
        poller.register(self._wake[0], select.POLLIN)
        self._thread = threading.Thread(
            target=self._watch, args=(poller, lost), name="pydist-watch", daemon=True
        )
        self._thread.start()

    def _watch(self, poller: select.poll, lost: Callable[[], None]) -> None:
        told: set[int] = set()
        while self._sockets:
            for descriptor, _ in poller.poll():
                poller.unregister(descriptor)
                with self._lock:
                    self._note(descriptor)
                peer = self._let_go(descriptor)
                if peer is None:  # woken up to end
                    return
                if peer not in told:
                    told.add(peer)
                    lost()

    def _let_go(self, descriptor: int) -> int | None:
        """Closes a socket of which gloo has closed its own copy, or will; the peer behind it.

        As long as one copy is open gloo's thread is told of the hang-up over and over again.
        """
        with self._lock:
            peer, found = self._sockets.pop(descriptor, (None, None))
            if found is not None:
                found.close()
            return peer

    def _note(self, descriptor: int) -> None:
        """Remembers who has hung up first, unless this rank has."""
        peer, _ = self._sockets.get(descriptor, (None, None))
        if not (self._aborted or peer is None or peer in self.hung_up):
            self.hung_up.append(peer)

    def abort(self) -> None:
        """Ends everything that waits for a message on them, on both ends."""
        with self._lock:
            if _HANG_UP:  # a call may fail of a hang-up before the thread has seen it
                poller = select.poll()
                for descriptor in self._sockets:
                    poller.register(descriptor, _HANG_UP)
                for descriptor, _ in poller.poll(0):
                    self._note(descriptor)
            self._aborted = True
            for _, found in self._sockets.values():
                with contextlib.suppress(OSError):
                    found.shutdown(socket.SHUT_RDWR)
        if self._thread is None:  # else it sees that they have ended
            for descriptor in list(self._sockets):
                self._let_go(descriptor)

    def close(self) -> None:
        """Ends the thread and lets go of the sockets, which the groups close themselves."""
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join()
        for descriptor in list(self._sockets):
            self._let_go(descriptor)
        for found in self._wake or ():
            found.close()
        self._wake = None
