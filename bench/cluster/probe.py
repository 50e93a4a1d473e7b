"""What the emulated links give: round trips by ping, and the rate of TCP, held against the asked.

``ddp.py goodput`` runs this file on every host, first as ``ping``, when the links are idle, then as
``pour``, when each host sends to the next one. Only the first rank of a host works.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from links import ClusterError, Network
from netns import Cluster
from rounds import go_first

_PORT = 29600
PINGS = 40
_LOST_SECONDS = 10.0

Report = dict[str, Any]

# ---------------------------------------------------------------- what runs on each host


def ping(address: str, count: int = PINGS) -> list[float]:
    """Milliseconds of round trips to a host whose kernel answers: ICMP echoes, one by one.

    Raises:
        TimeoutError: A reply did not come within ten seconds.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pinger:
        pinger.settimeout(_LOST_SECONDS)
        for number in range(count):
            # Type 8, code 0, an identifier of 0: the checksum is the complement of two words.
            echo = struct.pack("!HHHH", 0x0800, 0xFFFF - 0x0800 - number, 0, number)
            start = time.perf_counter()
            pinger.sendto(echo, (address, 0))
            while True:
                reply, (sender, _) = pinger.recvfrom(1024)
                kind, _, _, which = struct.unpack_from("!HHHH", reply, 20)
                if kind == 0 and which == number and sender == address:
                    break
            found.append(1e3 * (time.perf_counter() - start))
    return found


def pour(target: str, seconds: float) -> float:
    """Send to a host for a while, receive from another; bits per second of the second half."""
    with socket.create_server(("", _PORT)) as server:
        sender = threading.Thread(target=_send, args=(target, seconds))
        sender.start()
        connection, _ = server.accept()
        with connection:
            buffer, received = bytearray(1 << 20), 0
            begin = last = time.perf_counter()
            middle = (begin, 0)
            while count := connection.recv_into(buffer):
                received, last = received + count, time.perf_counter()
                if last - begin < seconds / 2:
                    middle = last, received
        sender.join()
    return 8 * (received - middle[1]) / (last - middle[0])


def _send(address: str, seconds: float) -> None:
    """Send zeros to a host, once it listens."""
    for _ in range(200):
        try:
            connection = socket.create_connection((address, _PORT))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    else:
        raise ClusterError(f"{address} does not listen")
    data, end = bytes(1 << 16), time.perf_counter() + seconds
    with connection:
        while time.perf_counter() < end:
            connection.sendall(data)


def main(task: str, seconds: float, *, realtime: bool) -> None:
    """Entry on each host: prints what it found as JSON."""
    if os.environ["LOCAL_RANK"] != "0":
        return
    if realtime:
        go_first()
    host, hosts = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
    network = os.environ["MASTER_ADDR"].rsplit(".", 1)[0]
    following = f"{network}.{(host + 1) % hosts + 1}"
    if task == "ping":
        print(json.dumps(ping(following)))
    else:
        # A host's own address is a way over its loopback, which is the link inside.
        print(json.dumps(pour(f"{network}.{host + 1}" if task == "inside" else following, seconds)))


# ---------------------------------------------------------------- what starts and sums up


def probe(network: Network, *, realtime: bool = False) -> Report:
    """Measure the links of a network, on hosts made for it, and show what was found.

    Args:
        network: The network.
        realtime: Measure ahead of other programs.

    Returns:
        ``rtt_ms`` (every ping of each host to the next), ``bits_per_second``, ``share_of_rate``,
        ``packets_dropped``, and with several ranks per host ``inner_bits_per_second``.
    """
    seconds = 4.0 + 40 * network.rtt_ms / 1e3  # TCP needs round trips to find the rate

    def ask(cluster: Cluster, task: str) -> list[Any]:
        command = [sys.executable, __file__, task, str(seconds), *(["realtime"] * realtime)]
        finished = cluster.run(command, timeout=60 + 10 * seconds)
        return [json.loads(rank.stdout) for rank in finished[:: network.local]]

    with Cluster(network) as cluster:
        pings = ask(cluster, "ping")
        poured = ask(cluster, "pour")
        inside = ask(cluster, "inside") if network.local > 1 else []
        counted = cluster.counters()
    shares = [bits / network.outer.rate for bits in poured]
    print(network)
    for host, (rtts, bits, share) in enumerate(zip(pings, poured, shares, strict=True)):
        print(f"host {host} received {bits / 1e6:8.1f} Mbit/s, {100 * share:5.1f} % of the rate; "
              f"round trips {_spread(rtts)} ms, asked {network.rtt_ms:g}; "
              f"{counted[host]['drops']} packets dropped")  # fmt: skip
    for host, bits in enumerate(inside):
        print(f"host {host} inside {bits / 1e9:8.2f} Gbit/s, asked {network.inner_rate or 'any'}")
    return {
        "rtt_ms": pings,
        "bits_per_second": poured,
        "share_of_rate": shares,
        "packets_dropped": sum(counts["drops"] for counts in counted),
        "longest_queue": [counts.get("longest_queue") for counts in counted],
        **({"inner_bits_per_second": inside} if inside else {}),
    }


def _spread(found: Sequence[float]) -> str:
    """Least, median and greatest."""
    return f"{min(found):.2f} … {statistics.median(found):.2f} … {max(found):.2f}"


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), realtime="realtime" in sys.argv)
