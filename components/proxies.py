"""HTTP proxies of the environment are for other machines: what runs on this one is asked directly."""

import os

_HERE = ("localhost", "127.0.0.1", "::1")


def spare_loopback() -> None:
    """Keep this machine's own addresses out of HTTP_PROXY and HTTPS_PROXY, for this process and those it starts."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        os.environ[name] = ",".join([*hosts, *(host for host in _HERE if host not in hosts)])
