"""torchrun starts a job again whose ranks die: the DDP hook goes on from the last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import ranks_ddp_faults as cases
from ranks import Worlds

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).with_name("elastic_training.py")
# Without it the agents of torch 2.13 hand every attempt the store of the first one, and in it the
# addresses of ranks that are dead (pytorch/pytorch#135712).
ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


class Agent:
    """One torchrun; its process group ends with it."""

    def __init__(self, options: list[str], arguments: list[str], log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1",
                   *options, str(SCRIPT), *arguments]  # fmt: skip
        # The workers import the test's own modules by name.
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT | path,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, timeout: float) -> int:
        return self.process.wait(timeout)

    def text(self) -> str:
        return self.log.read_text()[-4000:]

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def results_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("result-*.json"))]


def undisturbed(worlds: Worlds, ranks: int, codec: str, steps: int) -> set[str]:
    results = worlds(ranks).run(cases.straight, codec, steps)
    return {sha256(b"".join(result[0])).hexdigest() for result in results}


@pytest.mark.parametrize(
    ("codec", "ranks", "kills"),
    [("all", 2, ["7:1"]), pytest.param("topk", 3, ["3:1", "7:0"], marks=pytest.mark.soak)],
)
def test_restarts(worlds: Worlds, tmp_path: Path, codec: str, ranks: int, kills: list[str]) -> None:
    """Ranks die, the job is restarted, and ends with the parameters of an undisturbed run."""
    options = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=2"]
    arguments = [str(tmp_path), "--steps=9", f"--codec={codec}", *(f"--kill={k}" for k in kills)]
    agent = Agent(options, arguments, tmp_path / "log")
    try:
        assert agent.wait(240) == 0, agent.text()
    finally:
        agent.kill()
    results = results_of(tmp_path)
    assert [result["ranks"] for result in results] == [ranks] * ranks
    for result in results:
        found = (result["attempt"], result["start"], result["lost"])
        assert found == (len(kills), 6, 0.0), result
    wanted = undisturbed(worlds, ranks, codec, 9)
    assert {result["parameters"] for result in results} == wanted


@pytest.mark.soak
@pytest.mark.parametrize("codec", ["sign", "topk"])
def test_shrinks(tmp_path: Path, codec: str) -> None:
    """Four nodes, of which one dies with its agent: three go on, and lose nothing unsent."""
    conf = "join_timeout=120,last_call_timeout=4,keep_alive_interval=1,keep_alive_max_attempt=5"
    options = ["--nnodes=3:4", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d",
               "--rdzv-id=shrinks", f"--rdzv-conf={conf}", "--local-addr=localhost"]  # fmt: skip
    arguments = [str(tmp_path), "--steps=12", f"--codec={codec}"]
    agents: list[Agent] = []
    try:
        port = free_port()
        for i in range(4):
            fate = ["--kill-agent=5"] if i == 3 else []  # never the first, which keeps the store
            endpoint = f"--rdzv-endpoint=localhost:{port}"
            log = tmp_path / f"log{i}"
            agents.append(Agent([*options, endpoint], [*arguments, *fate], log))
        for agent in agents[:3]:
            assert agent.wait(240) == 0, agent.text()
        assert agents[3].wait(10) == -signal.SIGKILL
    finally:
        for agent in agents:
            agent.kill()
    results = results_of(tmp_path)
    assert len(results) == 3
    for result in results:
        assert (result["ranks"], result["saved_by"], result["start"]) == (3, 4, 4), result
        assert result["lost"] <= 1e-6  # float32, a few roundings at the size of its parts
    assert len({result["parameters"] for result in results}) == 1


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])
