"""Ray nodes of this machine, each with folders of its own, as a cluster's machines have: real `ray start` processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = "a-token-of-these-tests"
# Ray takes 15 s to notice that a node is lost. Here it takes four, in which the nodes of a busy machine still answer.
SHORT_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "6",
}
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Nodes:
    """A head and workers; `environment` is what a driver or a submission needs to reach them."""

    folder: Path  # short, because Ray puts sockets into it
    environment: dict[str, str]
    gcs: str
    dashboard: str
    processes: list[subprocess.Popen] = field(default_factory=list)

    def add(self, *arguments: str, wrapper: tuple[str, ...] = (), num_cpus: int = 1) -> int:
        """Starts a node and returns its number; it is there a little later (`wait_for`)."""
        number = len(self.processes)
        own = self.folder / str(number)
        command = [
            *wrapper, RAY, "start", "--block", "--temp-dir", str(own), "--node-ip-address", "127.0.0.1",
            "--num-cpus", str(num_cpus), "--object-store-memory", "200000000", "--disable-usage-stats",
            "--dashboard-agent-listen-port", "0", *(arguments or ("--address", self.gcs)),
        ]  # fmt: skip
        environment = os.environ | self.environment | {"RAYSWEEP_SCRATCH": str(own / "scratch")}
        environment.pop("RAY_ADDRESS", None)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # jobs run `python`
        with (self.folder / f"{number}.log").open("w") as log:
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
        return number

    def kill(self, number: int) -> None:
        """Ends a node as a machine ends whose power fails."""
        process = self.processes[number]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        # Ray's workers have sessions of their own, and end with the raylet; what does not is found by its folder.
        subprocess.run(["pkill", "-KILL", "-f", str(self.folder / str(number))], check=False)
        process.wait(30)

    def wait_for(self, num_nodes: int, timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while self.num_alive() != num_nodes:
            assert time.monotonic() < deadline, f"{self.num_alive()} of {num_nodes} nodes are there: {self.logs()}"
            time.sleep(0.3)

    def num_alive(self) -> int:
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode().count('"node_id":')
        except (urllib.error.URLError, OSError):
            return 0

    def start_driver(self, code: str, *arguments: str) -> subprocess.Popen:
        """Starts a Python program that finds the cluster as RAY_ADDRESS; what it prints comes as text."""
        environment = os.environ | self.environment | {"RAY_ADDRESS": self.gcs, "PYTHONUNBUFFERED": "1"}
        environment["RAYSWEEP_SCRATCH"] = str(self.folder / "0" / "scratch")
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder
        )

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.log")))


@contextmanager
def running_nodes(
    num_workers: int, environment: Mapping[str, str] | None = None, head_cpus: int = 1
) -> Iterator[Nodes]:
    """A cluster with a token, of a head and workers with one CPU each."""
    folder = Path(tempfile.mkdtemp(prefix="rn"))
    gcs, dashboard = free_port(), free_port()
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **SHORT_HEALTH_CHECKS, **(environment or {})}
    nodes = Nodes(folder, own, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    try:
        nodes.add(
            "--head", "--port", str(gcs), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
            "--ray-client-server-port", str(free_port()), num_cpus=head_cpus,
        )  # fmt: skip
        nodes.wait_for(1)
        for _ in range(num_workers):
            nodes.add()
        nodes.wait_for(1 + num_workers)
        yield nodes
    finally:
        for number in reversed(range(len(nodes.processes))):
            nodes.kill(number)
        shutil.rmtree(folder, ignore_errors=True)
