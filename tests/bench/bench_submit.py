"""How much CPU `tune16 submit` takes before the cluster has the run: the server has this content already, or has not.

The servers are the tests' stand-ins, in this process; the command runs in one of its own, whose CPU seconds count.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from measure import write

from tests.pipelines.conftest import furnish
from tests.servers import KubernetesApi, PipelineApi

RECIPE = "llama2-7b-16gb"
TRIES = 5


def submit(cluster: KubernetesApi, server: PipelineApi, folder: Path) -> tuple[float, float]:
    """CPU seconds of the whole command, and seconds until the server's first request."""
    kubeconfig = cluster.kubeconfig(folder / "kubeconfig")
    environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "TUNE16_HOST": server.url}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipelines.cli", "submit", RECIPE], env=environment)
    num_requests, first = len(server.requests), 0.0
    while process.poll() is None:
        if not first and len(server.requests) > num_requests:
            first = time.monotonic() - started
        time.sleep(0.005)
    assert process.returncode == 0 and server.runs
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, first


if __name__ == "__main__":
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch, KubernetesApi() as cluster, PipelineApi() as server:
        furnish(cluster)
        for name in ("the server has nothing", "the server has this content"):
            measured = []
            for _ in range(TRIES):
                if name == "the server has nothing":
                    server.pipelines.clear()
                    server.versions.clear()
                measured.append(submit(cluster, server, Path(scratch)))
            cpu, first = (sorted(values)[TRIES // 2] for values in zip(*measured, strict=True))
            figures[name] = {"cpu_s": round(cpu, 2), "first_request_s": round(first, 2)}
    write("submit", figures)
