"""The emulated cluster: what is asked for, the relay's arithmetic, and what it says is missing.

Hosts are made in ``test_cluster_soak.py``, which needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("not a source tree", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("namespaces are Linux's", allow_module_level=True)


def bench_module(name: str) -> ModuleType:
    """A module of bench/cluster, whose own imports are those of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench" / "cluster"))
        return importlib.import_module(name)


links, netns, relay = map(bench_module, ("links", "netns", "relay"))
SECOND = 10**9


def parsed(*arguments: str) -> Any:
    parser = argparse.ArgumentParser(parents=[links.network_options()])
    return links.Network.of(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "hosts", "local"),
    [("", 4, 1), ("--hosts 8", 8, 1), ("--topology 4x2", 4, 2), ("--topology 200x10", 200, 10)],
)
def test_topology(arguments: str, hosts: int, local: int) -> None:
    network = parsed(*arguments.split())
    assert (network.hosts, network.local, network.ranks) == (hosts, local, hosts * local)


@pytest.mark.parametrize("name", ["--rtt-ms", "--delay-ms"])
def test_options_are_recorded(name: str) -> None:
    network = parsed("--topology", "4x2", name, "50", "--rate=100mbit", "--inner-rate=10gbit")
    record = network.record()
    assert record["topology"] == "4x2"
    assert record["link"]["rtt_ms"] == 50 and record["link"]["rate"] == 10**8
    assert record["inner_link"]["rate"] == 10**10
    assert str(network) == "4 hosts of 2 ranks at 100mbit (10gbit inside), round trip 50 ms"
    assert record["link"]["buffer"] >= 10**8 // 8 * 50 // 1000  # what is under way in a round trip


@pytest.mark.parametrize("wrong", ["4x", "x2", "4x2x2", "-4", "four", "4 x 2", "40000"])
def test_wrong_topology(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f"--topology={wrong}")
    assert f"like 4 or 4x2, not {wrong!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hosts": 1}, "hosts must be from 2 to 200, not 1"),
        ({"hosts": 201}, "hosts must be from 2 to 200, not 201"),
        ({"local": 0}, "local must be at least 1, not 0"),
        ({"rate": "0mbit"}, "cannot read the rate '0mbit'"),
        ({"rate": "0.1bit"}, "cannot read the rate '0.1bit'"),
        ({"inner_rate": "fast"}, "cannot read the rate 'fast'"),
        ({"rtt_ms": -1.0}, "rtt_ms must be from 0 to below 60000, not -1.0"),
        ({"rtt_ms": float("nan")}, "rtt_ms must be from 0 to below 60000, not nan"),
    ],
)
def test_wrong_network(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(links.ClusterError, match=re.escape(message)):
        links.Network(**arguments)


@pytest.mark.parametrize(
    "command", ["ddp all-reduce", "ddp step", "ddp goodput", "hierarchy", "sharded"]
)
def test_every_benchmark_takes_the_network(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *task = command.split()
    main = bench_module(script).main
    with pytest.raises(SystemExit) as ended:
        main([*task, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--topology", "--hosts", "--rate", "--rtt-ms", "--delay-ms", "--inner-rate"):
        assert option in text
    assert main([*task, "--rate", "fast"]) == 2
    assert f"{script}.py: cannot read the rate 'fast'" in capsys.readouterr().err


def test_variables_are_those_of_torchrun() -> None:
    cluster = netns.Cluster(links.Network(hosts=3, local=2))
    found = cluster.environment(5)
    expected = {
        "RANK": 5, "WORLD_SIZE": 6, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 2,
        "GROUP_WORLD_SIZE": 3, "ROLE_RANK": 5, "ROLE_WORLD_SIZE": 6,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == {k: str(v) for k, v in expected.items()}
    assert found["MASTER_ADDR"] == cluster.address(0)


# ---------------------------------------------------------------- what is missing


def test_missing_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns.os, "geteuid", lambda: 1000)
    with pytest.raises(links.ClusterError, match="needs root: sudo"):
        netns.check_tools()


@pytest.mark.parametrize(
    ("status", "programs", "tun", "message"),
    [
        ("CapEff:\t0000000000001000", "ip tc", True, "root lacks CAP_SYS_ADMIN: .*--privileged"),
        ("CapEff:\t0000000000000000", "ip tc", True, "CAP_NET_ADMIN and CAP_SYS_ADMIN"),
        ("CapEff:\tffffffffffffffff", "tc", True, "ip not found: install iproute2"),
        ("CapEff:\tffffffffffffffff", "", True, "ip and tc not found: install iproute2"),
        ("CapEff:\tffffffffffffffff", "ip tc", False, "tun not found, .*: modprobe tun"),
        ("CapEff:\tffffffffffffffff", "ip tc", True, None),
    ],
)
def test_missing(
    status: str, programs: str, tun: bool, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns.os, "geteuid", lambda: 0)
    monkeypatch.setattr(netns.Path, "read_text", lambda self: status)
    monkeypatch.setattr(netns.shutil, "which", lambda name: name if name in programs else None)
    monkeypatch.setattr(netns.os.path, "exists", lambda path: tun)
    expected = pytest.raises(links.ClusterError, match=message) if message else None
    with expected or contextlib.nullcontext():
        netns.check_tools(delay=True)


# ---------------------------------------------------------------- the relay's arithmetic

ARRIVALS = st.lists(st.tuples(st.integers(0, 3 * SECOND // 1000), st.integers(1, 65_535)))


@given(ARRIVALS, st.integers(10**4, 10**10), st.integers(0, 1 << 20))
def test_a_line_sends_one_packet_after_another(
    arrivals: list[tuple[int, int]], rate: int, limit: int
) -> None:
    line = relay.Line(rate, limit)
    now = sent = dropped = 0
    for pause, size in arrivals:
        now += pause
        waiting = max(0, sent - now) * rate // (8 * SECOND)
        left = line.take(now, size)
        if left is None:
            dropped += 1
            assert waiting > limit
        else:
            assert waiting <= limit
            assert left - line.lasts(size) == max(sent, now)  # neither early, nor idle
            sent = left
    assert line.dropped == dropped and line.longest <= limit


@given(st.integers(1, 65_535), st.integers(1, 65_535), st.integers(10**3, 10**11))
def test_a_line_is_as_fast_as_its_rate(first: int, second: int, rate: int) -> None:
    line = relay.Line(rate, 1 << 20)
    line.take(0, first)
    left = line.take(0, second)
    exact = (first + second) * 8 * SECOND / rate
    assert left is not None and exact - 2 <= left <= exact * (1 + 1e-15)


def packet(to: str, payload: int, segment: int = 0, mark: int = 0) -> bytes:
    """A virtio_net_hdr and an IPv4 packet with a TCP header of 32 bytes."""
    head = struct.pack("=BBHHHH", 1, 1 if segment else 0, 52, segment, 20, 16)
    ip = struct.pack("!B11xI4s", 0x45, mark, socket.inet_aton(to))
    return head + ip + struct.pack("!12xB19x", 8 << 4) + bytes(payload)


@pytest.mark.parametrize(
    ("payload", "segment", "frames"),
    [
        (0, 0, 1),
        (1448, 0, 1),
        (1449, 1448, 2),
        (2896, 1448, 2),
        (2897, 1448, 3),
        (60_000, 1448, 42),
    ],
)
def test_a_long_packet_counts_as_its_segments(payload: int, segment: int, frames: int) -> None:
    assert relay.wire_bytes(packet("10.0.0.1", payload, segment)) == payload + 52 * frames


@contextlib.contextmanager
def hosts(count: int, rate: int, delay: int) -> Iterator[tuple[Any, list[socket.socket]]]:
    """A relay whose devices are sockets that keep packets apart, and the hosts' ends of them."""
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair(type=socket.SOCK_SEQPACKET) for _ in range(count)]
        for end in (end for pair in pairs for end in pair):
            stack.enter_context(end).setblocking(False)
        ports = {
            socket.inet_aton(f"10.0.0.{host + 1}"): relay.Port(
                ours.fileno(), relay.Line(rate, 1 << 30), relay.Line(rate, 1 << 30)
            )
            for host, (ours, _) in enumerate(pairs)
        }
        yield relay.Relay(ports, delay), [theirs for _, theirs in pairs]


def received(end: socket.socket) -> list[bytes]:
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(end.recv(1 << 17))
    return found


SENDS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(0, 2), st.integers(0, 2), st.integers(0, 9000)),
    max_size=40,
)


@given(SENDS, st.integers(10**6, 10**10), st.integers(0, 10**8))
def test_a_relay_keeps_order_rate_and_delay(
    sends: list[tuple[int, int, int, int]], rate: int, delay: int
) -> None:
    """Each line alone tells when a packet may come; a relay driven by its own clock keeps that."""
    with hosts(3, rate, delay) as (moving, ends):
        ports = list(moving.ports.values())
        events = []  # when, in which order, sender, receiver, bytes
        now = 0
        for mark, (pause, sender, receiver, payload) in enumerate(sends):
            now += pause
            events.append((now, mark, sender, f"10.0.0.{receiver + 1}", payload))
        arrived: list[list[tuple[int, int, int]]] = [[], [], []]
        now, wait = 0, None
        while events or wait is not None:
            due = [] if wait is None else [now + round(wait * SECOND)]
            now = max(now, min([*due, *(event[0] for event in events[:1])]))
            while events and events[0][0] <= now:
                _, mark, sender, to, payload = events.pop(0)
                moving.accept(now, ports[sender], packet(to, payload, mark=mark))
            wait = moving.deliver(now)
            for host, end in enumerate(ends):
                for found in received(end):
                    mark = int.from_bytes(found[22:26], "big")
                    arrived[host].append((now, mark, relay.wire_bytes(found)))
    assert sum(map(len, arrived)) == len(sends)
    starts = [sum(pause for pause, *_ in sends[: i + 1]) for i in range(len(sends))]
    line = relay.Line(rate, 0)
    for host, found in enumerate(arrived):
        assert all(sends[mark][2] == host for _, mark, _ in found)
        for sender in range(3):  # TCP would take packets out of order for lost ones
            marks = [mark for _, mark, _ in found if sends[mark][1] == sender]
            assert marks == sorted(marks)
        for when, mark, size in found:
            assert when >= starts[mark] + line.lasts(size) + delay
        for i, (when, _, _) in enumerate(found):  # no more than the line's rate from any moment on
            before = found[: i + 1]
            assert all(
                when - early + 2 * len(before) >= line.lasts(sum(s for _, _, s in before[j + 1 :]))
                for j, (early, _, _) in enumerate(before)
            )


def test_an_idle_path_costs_the_bytes_once_and_the_delay() -> None:
    with hosts(2, 10**8, 5 * 10**6) as (moving, ends):
        sender = next(iter(moving.ports.values()))
        moving.accept(0, sender, packet("10.0.0.2", 1448))
        moving.accept(0, sender, packet("10.9.9.9", 1448))  # for nobody
        assert moving.deliver(0) == pytest.approx(120e-6)  # 1,500 bytes at 100 Mbit have left
        assert moving.deliver(120_000) == pytest.approx(5e-3)
        assert not received(ends[1])
        assert moving.deliver(5_120_000) is None
        assert len(received(ends[1])) == 1 and not received(ends[0])


@pytest.mark.parametrize("limit", [10 * 1500, 5 * 1500])
def test_a_full_queue_drops_and_is_counted(limit: int) -> None:
    """Two hosts send ten packets each to a third, whose line has time for half of them."""
    with hosts(3, 10**8, 0) as (moving, ends):
        first, second, third = moving.ports.values()
        third.receives.limit = limit
        for turn in range(10):
            for sender in (first, second):
                moving.accept(0, sender, packet("10.0.0.3", 1448, mark=turn))
        now = got = 0
        while (wait := moving.deliver(now)) is not None:
            now += round(wait * SECOND)
            got += len(received(ends[2]))
        got += len(received(ends[2]))
        counted = moving.counters()
    dropped = 20 - got
    assert counted[2]["dropped"] == dropped and (dropped > 0) == (limit < 10 * 1500)
    assert 0 < counted[2]["longest_queue"] <= limit
    assert counted[0] == counted[1] == {"dropped": 0, "longest_queue": 0}
