"""The step register: the published version in OpenShift AI's model registry, through the registry's own client.

One registered model for each ``destination_path``, one model version for each version in S3, and an artifact with its
address. The registered model says which version is champion. All figures are text, which the dashboard shows as it is.
"""

import asyncio
import logging
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from components.config import RegisterConfig
from components.kubernetes import account
from components.kubernetes.api import PASSING_FAULTS, sentence
from components.runtime.errors import Tune16Error
from components.runtime.retry import OUTAGE_SECONDS, Answer, retry
from components.runtime.steps import say
from components.runtime.timeouts import at_most
from components.storage import s3

if TYPE_CHECKING:
    from model_registry import ModelRegistry

_CHAMPION, _CONTENT = "champion", "content_sha256"
_AUTHOR = "Tune16"
_ARCHIVED = "ARCHIVED"  # the client's states are text, too
POLL_SECONDS = 5.0
_TIMEOUT_SECONDS = 60  # for one call of the client, which is a few requests


class UnavailableError(Tune16Error):
    """The registry does not answer, or refuses for a transient reason."""


@dataclass(frozen=True)
class Source:
    """Where a version comes from and how it is read: the run, its project, and the connection's Secret."""

    run_id: str
    run_name: str
    connection: str


@dataclass(frozen=True)
class Registered:
    """What the registry calls it; empty where no registry is named."""

    registry: str = ""
    model: str = ""
    model_id: str = ""
    version: str = ""
    version_id: str = ""

    def as_metadata(self) -> dict[str, str]:
        """The keys by which the dashboard makes a link of an artifact."""
        return {
            "modelRegistryName": self.registry,
            "registeredModelName": self.model,
            "registeredModelId": self.model_id,
            "modelVersionName": self.version,
            "modelVersionId": self.version_id,
        }


def register_patiently(manifest: dict[str, Any], path: str, source: Source, config: RegisterConfig) -> Registered:
    """Register as :func:`register` does, and wait a quarter of an hour for a registry that does not answer.

    Raises:
        Tune16Error: as there.
    """
    told: list[str] = []

    def tell(fault: BaseException) -> None:
        if not told:
            told.append(str(fault))
            say("register", f"waiting: {fault}")

    return retry(
        lambda: register(manifest, path, source, config),
        lambda fault: isinstance(fault, UnavailableError),
        outage=OUTAGE_SECONDS,
        pause=POLL_SECONDS,
        before_pause=tell,
    )


def register(manifest: dict[str, Any], path: str, source: Source, config: RegisterConfig) -> Registered:
    """Register a published version, and say that it is the champion; a second time it changes nothing.

    Args:
        manifest: the version's manifest, from the step upload.
        path: ``prefix/model-name`` in the connection's bucket.
        source: where it comes from.
        config: the registry; without one nothing is done.

    Raises:
        Tune16Error: the registry cannot be reached or refuses, or has something else under these names.
        UnavailableError: it may answer later.
    """
    if not config.server:
        say("register", "registry_url is empty: nothing registered")
        return Registered()
    with _explained(config.server):
        registry = _connect(config.server, _token())
        model = _own_model(registry, path, config.server)
        if model is None or registry.get_model_version(model, manifest["version"]) is None:
            _create(registry, manifest, path, source)
        version = _checked_version(registry, manifest, path, source)
        _mark_champion(registry, path, manifest["version"])
        found = registry.get_registered_model(_name(path))
    assert found is not None
    registered = Registered(_registry_name(config.server), found.name, found.id, version.name, version.id)
    say("register", f"{found.name} {version.name} is champion in {config.server}")
    return registered


def archive(server: str, path: str) -> None:
    """Archive the registered model of `path`, since a registry cannot remove it.

    Raises:
        Tune16Error: the registry cannot be reached or refuses.
    """
    with _explained(server):
        registry = _connect(server, _token())
        found = registry.get_registered_model(_name(path))
        if found and found.owner == _owner(path):
            found.state = type(found.state)(_ARCHIVED)
            registry.update(found)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _registry_name(server: str) -> str:
    """The registry's name: its host's first part, without the ending that OpenShift AI gives its route."""
    return (urlsplit(server).hostname or "").partition(".")[0].removesuffix("-rest")


def check_registry(server: str, token: str) -> None:
    """Check that a registry answers and accepts this token.

    Raises:
        Tune16Error: it does not.
    """
    with _explained(server):
        _connect(server, token)


def _token() -> str:
    """The bearer token: TUNE16_TOKEN, else the pod's own account's; empty where there is neither."""
    return os.environ.get("TUNE16_TOKEN") or account.token()


def _connect(server: str, token: str) -> "ModelRegistry":
    """The registry's client, with the account's CA.

    Raises:
        Tune16Error: the address has no scheme, or there is no token for a registry that needs one.
    """
    from model_registry import ModelRegistry

    scheme = urlsplit(server).scheme
    if scheme not in ("http", "https"):
        raise Tune16Error(f"registry_url {server!r}: write the whole address, as https://host or http://host:8080.")
    if scheme == "https" and not token:
        raise Tune16Error(
            f"{server}: needs a token. In a pod it is the account's own; elsewhere export TUNE16_TOKEN=$(oc whoami "
            "--show-token)."
        )
    return ModelRegistry(
        server.rstrip("/"),
        author=_AUTHOR,
        is_secure=scheme == "https",  # the client checks no certificate where this is false
        user_token=token if scheme == "https" else "none",  # a token goes over TLS only
        custom_ca=account.service_ca(server) or None,
        log_level=logging.ERROR,
        async_runner=_run,
    )


def _run(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a call of the client, for a minute at most: by itself it waits five for a server that never answers.

    Raises:
        TimeoutError: there was no answer.
    """

    async def limited() -> Answer:
        return await asyncio.wait_for(coroutine, at_most(_TIMEOUT_SECONDS))

    return asyncio.run(limited())


def _own_model(registry: "ModelRegistry", path: str, server: str) -> str | None:
    """The name of the registered model, if it is there; one that was archived is brought back, and that is said.

    Raises:
        Tune16Error: a model of this name is there, but not of this path.
    """
    found = registry.get_registered_model(_name(path))
    if found is None:
        return None
    if found.owner != _owner(path) or found.name != _name(path):
        raise Tune16Error(
            f"{server}: has a model named {found.name} already, which belongs to {found.owner or 'another'}. Choose "
            "another last part for destination_path: a registry can neither rename nor delete, and may ignore "
            "case."
        )
    if found.state == _ARCHIVED:
        found.state = type(found.state)("LIVE")
        registry.update(found)
        say("register", f"{found.name} was archived in the registry; it is live again, with a new champion")
    return str(found.name)


def _owner(path: str) -> str:
    """Whose the registered model is. The field is set as the model is created, so that a killed run leaves its mark."""
    return f"{_AUTHOR}, s3://{s3.default_bucket()}/{path}"


def _create(registry: "ModelRegistry", manifest: dict[str, Any], path: str, source: Source) -> None:
    """Create version and artifact, and the model where it is the first version."""
    registry.register_model(
        _name(path),
        _uri(manifest),
        version=manifest["version"],
        owner=_owner(path),
        version_description=_description(manifest),
        metadata=_properties(manifest),
        **_artifact(manifest, path, source),
    )


def _checked_version(registry: "ModelRegistry", manifest: dict[str, Any], path: str, source: Source) -> Any:
    """The registered version, whole: a run that was killed may have left it without its artifact.

    Raises:
        Tune16Error: the version was made of another content.
    """
    version = registry.get_model_version(_name(path), manifest["version"])
    assert version is not None
    if (version.custom_properties or {}).get(_CONTENT) != _properties(manifest)[_CONTENT]:
        raise Tune16Error(
            f"The registry has a version {manifest['version']} of {_name(path)} already, with other content. Start "
            "a new run: its version gets a name of its own."
        )
    if version.state == _ARCHIVED:
        version.state = type(version.state)("LIVE")
        registry.update(version)
        say("register", f"{version.name} was archived in the registry; it is live again")
    if registry.get_model_artifact(_name(path), manifest["version"]) is None:
        artifact = _artifact(manifest, path, source)
        _run(registry._register_model_artifact(version, _name(path), _uri(manifest), **artifact))
    return version


def _mark_champion(registry: "ModelRegistry", path: str, champion: str) -> None:
    """Record the champion on the model and on that version."""
    model = registry.get_registered_model(_name(path))
    assert model is not None
    before = (model.custom_properties or {}).get(_CHAMPION)
    if before == champion:
        return
    for name in (champion, before):
        version = registry.get_model_version(_name(path), str(name)) if name else None
        if version:
            properties = {key: value for key, value in (version.custom_properties or {}).items() if key != _CHAMPION}
            version.custom_properties = {**properties, **({_CHAMPION: ""} if name == champion else {})}  # "": a label
            registry.update(version)
    model.custom_properties = {**(model.custom_properties or {}), _CHAMPION: champion}
    registry.update(model)


def _uri(manifest: dict[str, Any]) -> str:
    """The address of the merged weights, with what the dashboard reads of an S3 address."""
    query = {
        "endpoint": os.environ.get("AWS_S3_ENDPOINT", ""),
        "defaultRegion": os.environ.get("AWS_DEFAULT_REGION", ""),
    }
    return f"{manifest['address']}/merged?{urlencode(query)}"


def _artifact(manifest: dict[str, Any], path: str, source: Source) -> dict[str, str]:
    """The artifact's properties besides its address: format, connection, and the run that the dashboard links to."""
    return {
        "model_format_name": "vLLM",
        "model_format_version": "1",
        "storage_key": source.connection,
        "storage_path": f"{path}/{manifest['version']}/merged",
        "model_source_kind": "kfp",
        "model_source_class": "pipelinerun",
        "model_source_group": account.namespace() or "local",
        "model_source_id": source.run_id,
        "model_source_name": source.run_name,
    }


def _description(manifest: dict[str, Any]) -> str:
    scores = manifest["scores"]
    return (
        f"Held-out loss {scores['tuned']['loss']['value']} against {scores['base']['loss']['value']} of the base model."
    )


def _properties(manifest: dict[str, Any]) -> dict[str, Any]:
    """Scores and lineage, flat and as text."""
    properties = {_CONTENT: manifest["content_sha256"], **{f"lineage_{k}": v for k, v in manifest["lineage"].items()}}
    for who in ("base", "tuned"):
        scores = manifest["scores"][who]
        properties[f"{who}_perplexity"] = scores["perplexity"]
        properties |= {f"{who}_{name}": scores[name]["value"] for name in ("loss", "exact_match", "chrf")}
    for name, figures in manifest["scores"].get("gguf", {}).items():
        properties[f"gguf_{name}_loss"] = figures["loss"]
    return {name: str(value) for name, value in properties.items() if str(value)}


@contextmanager
def _explained(server: str) -> Iterator[None]:
    """The client's many kinds of errors as one line each."""
    import aiohttp
    from model_registry.exceptions import StoreError
    from mr_openapi.exceptions import ApiException

    try:
        yield
    except ApiException as error:
        kind = UnavailableError if error.status in PASSING_FAULTS else Tune16Error
        raise kind(f"{server}: {_refusal(error.status, str(error.body or error.reason))}") from None
    except aiohttp.ClientConnectorCertificateError as error:
        raise Tune16Error(f"{server}: its certificate is not trusted ({error}). Set SSL_CERT_FILE to its CA.") from None
    except TimeoutError:
        raise UnavailableError(
            f"{server}: accepts connections but does not answer within {at_most(_TIMEOUT_SECONDS):.0f} s. Check "
            "registry_url: is it the registry's REST service, with its port?"
        ) from None
    except (aiohttp.ClientError, OSError) as error:
        raise UnavailableError(f"{server}: cannot be reached ({error}). Check registry_url and the network.") from None
    except (StoreError, ValueError) as error:
        raise Tune16Error(f"{server}: {sentence(str(error))[:300]}.") from None


def _refusal(status: int | None, body: str) -> str:
    if body.lstrip().startswith("<"):
        return (
            f"answers {status}, but not as a model registry: with XML or a web page. Check registry_url; it is not "
            "the object storage's address."
        )
    if status in (401, 403):
        return (
            f"the registry refuses this account ({status}). Bind it to the registry's role: manifests/components/"
            "model-registry."
        )
    if status == 404:
        return "no model registry with the API v1alpha3 answers there (404). Check registry_url."
    return f"the registry answers {status}: {sentence(body)[:300]}."
