"""Hosts behind slow and far links, for real: bits, bytes, bounds on time that load cannot break.

They need root, ``ip``, ``tc`` and ``/dev/net/tun``; ``PYDIST_CLUSTER=0`` skips these tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks_cluster
from test_cluster import ROOT, bench_module, links, netns

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
RANKS = str(Path(__file__).with_name("ranks_cluster.py"))
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bench" / "cluster")]),
    "OMP_NUM_THREADS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
SLOW = links.Network(hosts=4, local=2, rate="100mbit", rtt_ms=20)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    if os.environ.get("PYDIST_CLUSTER") == "0":
        pytest.skip("PYDIST_CLUSTER=0")
    try:
        netns.check_tools(delay=True)
    except links.ClusterError as error:
        pytest.fail(f"The cluster is not tested; PYDIST_CLUSTER=0 leaves it out. It {error}")
    netns.remove_stale()
    yield
    own = f"{netns.PREFIX}-{os.getpid()}-"
    assert not [name for name in netns._namespaces() if name.startswith(own)]


def on_ranks(network: Any, task: str) -> list[Any]:
    """What a task of ``ranks_cluster.py`` found on every rank."""
    with netns.Cluster(network) as cluster:
        finished = cluster.run([sys.executable, RANKS, task], ENVIRONMENT, timeout=600)
    return [json.loads(rank.stdout) for rank in finished]


@pytest.mark.parametrize("rtt_ms", [0, 20])
def test_collectives_are_bit_identical_to_simulation(rtt_ms: float) -> None:
    network = links.Network(hosts=4, local=2, rate="100mbit", rtt_ms=rtt_ms)
    found = on_ranks(network, "equals_simulation")
    assert found == [2 * 8 * len(ranks_cluster.SIZES)] * 8  # levels, codecs; ranks


@pytest.mark.parametrize("rtt_ms", [0, 20])
def test_ranks_of_a_host_talk_inside(rtt_ms: float) -> None:
    """1 MiB inside costs the link barriers alone; on all ranks, 2 · 3/4 of it, as in a ring."""
    network = links.Network(hosts=2, local=2, rate="1gbit", rtt_ms=rtt_ms, inner_rate="2gbit")
    payload = 4 * ranks_cluster.PLAIN
    with netns.Cluster(network) as cluster:
        before = cluster.counters()
        finished = cluster.run([sys.executable, RANKS, "traffic"], ENVIRONMENT, timeout=600)
        after = cluster.counters()
    for found in (json.loads(rank.stdout) for rank in finished):
        assert found["inside"] < payload / 16
        assert 1.5 * payload <= found["all"] < 1.75 * payload
    for name in ("tx_bytes", "rx_bytes"):
        assert all(b[name] - a[name] > 1.5 * payload for a, b in zip(before, after, strict=True))
    if rtt_ms:
        assert all(host["longest_queue"] <= cluster.shape.buffer for host in after)


def test_ranks_have_the_variables_of_torchrun() -> None:
    for rank, found in enumerate(on_ranks(links.Network(hosts=2, local=2), "variables")):
        assert found["RANK"] == str(rank) and found["WORLD_SIZE"] == "4"
        assert found["LOCAL_RANK"] == str(rank % 2) and found["LOCAL_WORLD_SIZE"] == "2"
        assert found["GROUP_RANK"] == str(rank // 2) and found["GROUP_WORLD_SIZE"] == "2"


@pytest.mark.parametrize("rtt_ms", [0, 0.2, 20, 100])
def test_pings_take_what_was_asked_at_least(rtt_ms: float) -> None:
    probe = bench_module("probe")
    found = probe.probe(links.Network(hosts=2, rate="100mbit", rtt_ms=rtt_ms))
    assert all(len(host) == probe.PINGS and min(host) >= rtt_ms for host in found["rtt_ms"])
    assert len(found["bits_per_second"]) == 2 and min(found["bits_per_second"]) > 0


@pytest.mark.parametrize("rtt_ms", [0, 50])
def test_bytes_take_what_the_rate_allows_at_least(rtt_ms: float) -> None:
    """Host 1 has the last byte no earlier than the rate and one way let it, less a full bucket."""
    network = links.Network(hosts=2, rate="20mbit", rtt_ms=rtt_ms)
    sender, receiver = on_ranks(network, "transfer")
    assert receiver["bytes"] == sender["bytes"]
    shape = network.outer
    least = 8 * (sender["bytes"] - shape.burst) / shape.rate + 1.5 * rtt_ms / 1e3  # one to connect
    assert receiver["ended"] - sender["began"] >= least


def test_a_relay_that_ends_is_an_error_and_hangs_nothing() -> None:
    with netns.Cluster(SLOW) as cluster:
        assert cluster._relay is not None
        cluster._relay._process.kill()
        with pytest.raises(links.ClusterError, match="the relay of the links ended"):
            cluster.run(["sleep", "600"])
        with pytest.raises(links.ClusterError, match="the relay of the links ended"):
            cluster.counters()


def test_a_rank_that_fails_is_named() -> None:
    with netns.Cluster(SLOW) as cluster:
        script = "test $RANK != 5 || { echo because >&2; exit 3; }; sleep 600"
        with pytest.raises(links.ClusterError, match=r"(?s)rank 5 on host 2 failed.* 3\nbecause"):
            cluster.run(["sh", "-c", script])
        with pytest.raises(links.ClusterError, match="already has a cluster open"):
            netns.Cluster(SLOW).__enter__()


def runs(pid: str) -> bool:
    """Whether a process does more than wait to be collected, which is for whoever adopted it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


KILLED = """
import sys
sys.path.insert(0, "bench/cluster")
from links import Network
from netns import Cluster
with Cluster(Network(hosts=2, rtt_ms=5)) as cluster:
    cluster.run(["sh", "-c", "echo started; sleep 600"], echo=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_program_and_the_next_start(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None and program.stdout.readline() == "started\n"
        program.send_signal(number)
        program.wait()

    def names() -> list[str]:
        return [n for n in netns._namespaces() if n.split("-")[1] == str(program.pid)]

    if number == signal.SIGTERM:
        assert program.returncode == 128 + number and not names()
        return
    left = names()
    assert len(left) == 3
    switch = next(name for name in left if name.endswith("switch"))
    while netns._call("ip", "netns", "pids", switch).split():  # the relay sees its input end
        time.sleep(0.05)
    hosts = [pid for name in left for pid in netns._call("ip", "netns", "pids", name).split()]
    with netns.Cluster(links.Network(hosts=2)):
        assert not names()
    assert len(hosts) == 4  # a shell and its sleep on each
    while any(map(runs, hosts)):
        time.sleep(0.05)


def test_the_command_runs_a_script_on_a_topology() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "bench.cluster", "run", "--topology", "2x2"),
            *("--rate", "100mbit", "--delay-ms", "10", "--", "sh", "-c", "echo $WORLD_SIZE $RANK"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    first, second, _ = done.stdout.splitlines()
    assert first == "4 0"
    assert second.startswith("2 hosts of 2 ranks at 100mbit, round trip 10 ms: ")
