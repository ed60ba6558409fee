"""The account that a pod runs as: its token, its namespace, and the CA of the cluster's own services."""

import os
from pathlib import Path
from urllib.parse import urlsplit

FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def token() -> str:
    """The account's bearer token; empty outside a pod."""
    return _read("token")


def namespace() -> str:
    """The pod's namespace; empty outside a pod."""
    return _read("namespace")


def is_step_of_pipeline() -> bool:
    """Whether this process runs in the pod of a pipeline's step, not on a person's machine."""
    return "KFP_POD_NAME" in os.environ


def service_ca(address: str) -> str:
    """The CA's file for an address of a service in the cluster; empty where there is none, or it is for another.

    The environment may name another file, in SSL_CERT_FILE.
    """
    file = FOLDER / "service-ca.crt"
    is_ours = is_inside_only(address) and file.is_file()
    return os.environ.get("SSL_CERT_FILE") or (str(file) if is_ours else "")


def is_inside_only(address: str) -> bool:
    """Whether an address is one of a cluster's own services, which mean nothing outside."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname or ""
    return host.endswith((".svc", ".svc.cluster.local"))


def _read(name: str) -> str:
    file = FOLDER / name
    return file.read_text().strip() if file.is_file() else ""
