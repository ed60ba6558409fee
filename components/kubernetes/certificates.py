"""The CA of the cluster's own services, which nothing trusts by itself."""

import os
from pathlib import Path
from urllib.parse import urlsplit

_SERVICE_CA = Path("/var/run/secrets/kubernetes.io/serviceaccount/service-ca.crt")


def service_ca(address: str) -> str:
    """The CA's file for an address of a service in the cluster; empty where there is none, or it is for another.

    The environment may name another file, in SSL_CERT_FILE.
    """
    is_ours = is_inside_only(address) and _SERVICE_CA.is_file()
    return os.environ.get("SSL_CERT_FILE") or (str(_SERVICE_CA) if is_ours else "")


def is_inside_only(address: str) -> bool:
    """Whether an address is one of a cluster's own services, which mean nothing outside."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host.endswith((".svc", ".svc.cluster.local"))
