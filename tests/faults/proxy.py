"""A proxy before an S3 server that does to requests and answers what networks and servers do."""

import http.client
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("500", "503", "slow", "reset", "cut", "flip up", "flip down")
SLOW_SECONDS = 0.9
_ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>made up</Message></Error>"


@dataclass
class Plan:
    """Which fault, which share of the requests it hits, and how many at most."""

    fault: str = ""
    share: float = 0.0
    at_most: int = 0
    rng: random.Random = field(default_factory=random.Random)
    num_hit: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def hits(self) -> bool:
        """Whether this request is hit."""
        with self.lock:
            if self.num_hit >= self.at_most or self.rng.random() >= self.share:
                return False
            self.num_hit += 1
            return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    plan = Plan()
    backend = ""


@contextmanager
def proxy(endpoint: str) -> Iterator[_Server]:
    """A proxy before `endpoint`; its `plan` can be changed at any time."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.backend = urlsplit(endpoint).netloc
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.plan.fault if self.server.plan.hits() else ""
        if fault == "reset":
            return self._reset()
        if fault in {"500", "503"}:
            code = {"500": b"InternalError", "503": b"SlowDown"}[fault]
            return self._answer(int(fault), [], _ERROR % code)
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        status, headers, content = self._forward(self._flipped(body) if fault == "flip up" else body)
        if fault == "cut" and not content:
            return self._reset()
        if fault == "flip down" and status < 300:
            content = self._flipped(content)
        return self._answer(status, headers, content, is_cut=fault == "cut")

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.backend, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, is_cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if is_cut:
            self.wfile.write(content[: len(content) // 2])
            return self._reset()
        self.wfile.write(content)
        return None

    def _reset(self) -> None:
        """End the connection without goodbye."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _flipped(self, content: bytes) -> bytes:
        if not content:
            return content
        position = self.server.plan.rng.randrange(len(content))
        return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the client has gone, or this handler has sent it away
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass
