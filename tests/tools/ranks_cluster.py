"""What ``test_cluster_soak.py`` runs on every rank of emulated hosts; each task prints JSON."""

from __future__ import annotations

import json
import os
import socket
import sys
import time

SIZES = [0, 33, 20_003]
PLAIN = 1 << 18  # float32 values, 1 MiB
PORT = 29700


def equals_simulation() -> int:
    """Codecs and sizes, flat and on two levels; how many results were compared."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import pydist

    codecs = [
        (pydist.Sign(scale=None), "vote"),
        (pydist.Sign("l1"), "mean"),
        (pydist.QSGD(4), "mean"),
        (pydist.QSGD(4, entropy="elias"), "sum"),
        (pydist.BlockInt(2), "mean"),
        (pydist.TopK(1 / 16), "mean"),
        (pydist.Ternary(), "mean"),
        (pydist.Raw(), "sum"),
    ]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = ranks // local
    mesh = init_device_mesh("cpu", (nodes, local))
    compared = 0
    for codec, op in codecs:
        for size in SIZES:
            inputs = [
                torch.randn(size, generator=torch.Generator().manual_seed(100 * size + i))
                for i in range(ranks)
            ]
            for group, grid in ((None, {}), (mesh, {"nodes": nodes})):
                mine = inputs[rank].clone()
                pydist.all_reduce(mine, codec, op=op, group=group, step=3)
                expected = pydist.simulate.all_reduce(inputs, codec, op=op, step=3, **grid)
                same = torch.equal(mine.view(torch.int32), expected.view(torch.int32))
                assert same, (codec, size, grid)
                compared += 1
    dist.destroy_process_group()
    return compared


def traffic() -> dict[str, int]:
    """Bytes on this host's link for 1 MiB summed inside every host, then on all ranks."""
    import torch
    import torch.distributed as dist
    from rounds import sent_bytes, settle
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (dist.get_world_size() // local, local))
    inside, x = mesh.get_group(1), torch.ones(PLAIN)
    found = {}
    for name, group in (("inside", inside), ("all", None)):
        dist.all_reduce(torch.ones(1), group=group)  # makes connections
        settle()
        before = sent_bytes()
        dist.barrier()  # no rank of this host sends before the others have looked
        dist.all_reduce(x, group=group)
        dist.barrier()
        settle()
        found[name] = sent_bytes() - before
    dist.destroy_process_group()
    return found


def transfer() -> dict[str, float]:
    """Host 0 sends 2 MB to host 1: seconds by the machine's one clock, and the bytes that came."""
    size, target = 2_000_000, os.environ["MASTER_ADDR"].rsplit(".", 1)[0] + ".2"
    if os.environ["RANK"] == "1":
        with socket.create_server(("", PORT)) as server:
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as stream:
                data = stream.read()
        return {"ended": time.monotonic(), "bytes": len(data)}
    for _ in range(600):
        began = time.monotonic()
        try:
            with socket.create_connection((target, PORT)) as connection:
                connection.sendall(bytes(size))
            return {"began": began, "bytes": size}
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"{target} does not listen")


def variables() -> dict[str, str]:
    """What torchrun would set."""
    return {k: v for k, v in os.environ.items() if "RANK" in k or k.endswith("WORLD_SIZE")}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
