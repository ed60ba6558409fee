"""A real S3 server on loopback: OpenStack Swift with its s3api middleware.

Four processes (account, container, object and proxy server) keep one replica of all
data under one folder. Each runs this file as a script (see ``_serve``), because Swift
patches the standard library with eventlet and must stay out of the calling process.
"""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Self

STORES = ("account", "container", "object")
START_LIMIT_S = 60.0
PR_SET_PDEATHSIG = 1

# One node has no other to fall back on: long timeouts and no error limiting. Listings
# are exact since the object server waits for the container server; segments go with
# their object since no expirer runs. Logs go to stderr (UDP port 9 discards the rest).
CONFIG = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
swift_dir = {folder}/etc
devices = {folder}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
conn_timeout = 10
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000
account_autocreate = true
log_level = WARNING
log_udp_host = 127.0.0.1
log_udp_port = 9
[pipeline:main]
pipeline = {filters} {role}-server
[app:{role}-server]
use = egg:swift#{role}
"""
PROXY_FILTERS = """\
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
max_upload_part_num = 10000
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
allow_async_delete = false
"""


class S3Server:
    """An S3 server whose data stays in a folder; the secret is new at each start.

    Enter it in a thread that outlives it: Linux ends the servers with that thread.
    """

    region = "us-east-1"
    access_key = "test:tester"  # fixed: it names the account that owns the data

    def __init__(self, folder: Path) -> None:
        """Serve the data of this folder, which may be new."""
        self.folder = folder.resolve()
        self.endpoint = ""
        self.secret_key = ""
        self._processes: list[subprocess.Popen[bytes]] = []

    def environment(self, bucket: str) -> dict[str, str]:
        """Return the variables that point an S3 client at a bucket of this server."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_S3_ENDPOINT": self.endpoint,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_S3_BUCKET": bucket,
        }

    def __enter__(self) -> Self:
        """Start the servers and wait until they answer."""
        for name in ("etc", "logs", "devices/d1"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        _require_xattrs(self.folder / "devices")
        self.secret_key = secrets.token_hex(20)
        try:
            with ExitStack() as reserved:
                ports = {role: _reserve_port(reserved) for role in (*STORES, "proxy")}
                self.endpoint = f"http://127.0.0.1:{ports['proxy']}"
                self._configure(ports)
                self._launch(ports)
                self._wait(ports)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the servers at once: with no workers, SIGTERM would do no more than SIGKILL."""
        for process in self._processes:
            process.kill()
        while self._processes:
            self._processes.pop().wait()

    def _configure(self, ports: dict[str, int]) -> None:
        """Write swift.conf and one configuration file per server."""
        etc = self.folder / "etc"
        # The suffix is part of every path on disk, so it must never change.
        (etc / "swift.conf").write_text("[swift-hash]\nswift_hash_path_suffix = loopback\n")
        for role, port in ports.items():
            filters = "s3api tempauth slo" if role == "proxy" else ""
            text = CONFIG.format(port=port, folder=self.folder, filters=filters, role=role)
            if role == "proxy":
                text += PROXY_FILTERS.format(secret=self.secret_key)
            path = etc / f"{role}.conf"
            path.unlink(missing_ok=True)
            path.touch(mode=0o600)
            path.write_text(text)

    def _launch(self, ports: dict[str, int]) -> None:
        """Start one process per server, each with a session and a log of its own."""
        script = [sys.executable, "-P", str(Path(__file__).resolve())]
        stores = [str(ports[name]) for name in STORES]
        for role in ports:
            arguments = [role, str(self.folder / "etc"), str(os.getpid()), *stores]
            with (self.folder / "logs" / f"{role}.log").open("wb") as log:
                process = subprocess.Popen(
                    script + arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self._processes.append(process)

    def _wait(self, ports: dict[str, int]) -> None:
        """Wait until all ports accept and a client lists the buckets."""
        import boto3  # here, since the servers run this file too
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(proxies={}, retries={"total_max_attempts": 1}),
        )
        problem: Exception | None = None
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit and all(p.poll() is None for p in self._processes):
            try:
                for port in ports.values():
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                client.list_buckets()
                return
            except (OSError, BotoCoreError, ClientError) as error:
                problem = error
                time.sleep(0.05)
        logs = [self.folder / "logs" / f"{role}.log" for role in ports]
        tails = "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)
        raise RuntimeError(f"Swift did not start: {problem}\n{tails}")


def _require_xattrs(folder: Path) -> None:
    """Raise RuntimeError where files cannot carry the xattrs that Swift needs."""
    probe = folder / ".xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.swift.metadata", b"probe")
    except OSError as error:
        raise RuntimeError(f"{folder} does not support user xattrs, which Swift needs: {error}") from error
    finally:
        probe.unlink()


def _reserve_port(reserved: ExitStack) -> int:
    """Return a free loopback port, held until its server listens on it too."""
    holder = reserved.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return int(holder.getsockname()[1])


def _build_ring(path: Path, port: int) -> None:
    """Write the ring of one kind of store: a single device on a loopback port."""
    from swift.common.ring import RingBuilder

    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=0)
    address = {"ip": "127.0.0.1", "port": port}
    builder.add_dev({"region": 1, "zone": 1, "device": "d1", "weight": 1.0, **address})
    builder.rebalance()
    builder.get_ring().save(str(path))


def _serve(role: str, etc: Path, parent: int, ports: list[int]) -> int:
    """Run one server in this process until it is stopped or its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    from swift.common.wsgi import run_wsgi

    if role == "proxy":  # the only one that reads the rings
        for name, port in zip(STORES, ports, strict=True):
            _build_ring(etc / f"{name}.ring.gz", port)
    return int(run_wsgi(str(etc / f"{role}.conf"), f"{role}-server", verbose=True))


if __name__ == "__main__":
    sys.exit(_serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), [*map(int, sys.argv[4:])]))
