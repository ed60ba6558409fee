"""HTTP proxies of the environment are for other machines: what runs on this one is asked directly."""

import os

_HERE = ("localhost", "127.0.0.1", "::1")


def spare_loopback() -> None:
    """Keep this machine's own addresses out of HTTP_PROXY and HTTPS_PROXY, for this process and those it starts."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")  # as every library looks: the lower case wins
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    spared = given if "*" in hosts else ",".join([*hosts, *(host for host in _HERE if host not in hosts)])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = spared
