"""The InferenceService (KServe v1beta1) of a version, for each kind of server."""

from dataclasses import dataclass, field
from typing import Any

from components.config import CONNECTION_VARIABLES, GPU, SESSION_TOKEN
from components.kubernetes import api as kubeapi
from components.models.references import parse
from components.runtime.errors import Tune16Error

Json = dict[str, Any]

API = "serving.kserve.io/v1beta1"
OWNER = "tune16.dev/path"
VERSION = "tune16.dev/version"
ALIAS = "tune16.dev/alias"
NO_KSERVE = (
    "this cluster has no KServe. Ask its administrator for single-model serving, or leave serving_runtime empty."
)

_USUAL_CONTEXT = 4096  # tokens; a model trained on longer rows gets twice those
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM makes room for
SERVED_BY = {"llama.cpp": "tune16-llama-cpp", "llama.cpp-gpu": "tune16-llama-cpp-gpu"}
_CPUS = ((2 * 2**30, "4"), (2**29, "2"))  # for GGUF files of at least so many bytes
_ADAPTER_MOUNT = "/mnt/adapter"


@dataclass(frozen=True)
class Placing:
    """What a version is served with: the connection's Secret, the registry's ids, and the GPU nodes."""

    connection: str
    model_id: str = ""
    version_id: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Json] = field(default_factory=list)


def alias(path: str, version: str, runtime: str) -> str:
    """The server's name for this version, besides the one that stays the same."""
    return f"{kubeapi.service_name(path)}@{version}-{runtime}"


def describe(manifest: Json, path: str, runtime: str, placing: Placing, pod: Json) -> Json:
    """The InferenceService of the version in `manifest`, served by `runtime`, in the namespace of this step's `pod`.

    Raises:
        Tune16Error: the version has no GGUF file for llama.cpp, or the base model is not where KServe can fetch it.
    """
    name, version = kubeapi.service_name(path), manifest["version"]
    if runtime in SERVED_BY:
        server = _llama_cpp(manifest, path, runtime)
    elif runtime == "vllm":
        server = _vllm(manifest, path)
    else:
        server = _vllm_adapter(manifest, path, placing.connection, kubeapi.main_container(pod)["image"])
    predictor: Json = {"minReplicas": 1, "maxReplicas": 1, **server}
    if runtime != "llama.cpp":
        predictor |= {"nodeSelector": placing.node_selector, "tolerations": placing.tolerations}
    if "storage" in predictor["model"]:
        predictor["model"]["storage"]["key"] = placing.connection
    labels = {
        "opendatahub.io/dashboard": "true",  # the dashboard lists it
        "app.kubernetes.io/managed-by": "tune16",
        **({"modelregistry.opendatahub.io/registered-model-id": placing.model_id} if placing.model_id else {}),
        **({"modelregistry.opendatahub.io/model-version-id": placing.version_id} if placing.version_id else {}),
    }
    annotations = {
        "openshift.io/display-name": path.rpartition("/")[2],
        "serving.kserve.io/deploymentMode": "RawDeployment",
        OWNER: owner(manifest),
        VERSION: version,
        ALIAS: alias(path, version, runtime),
    }
    return {
        "apiVersion": API,
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": pod["metadata"]["namespace"],
            "labels": labels,
            "annotations": annotations,
        },
        "spec": {"predictor": predictor},
    }


def owner(manifest: Json) -> str:
    """The owner of the endpoint: the path of the model's versions."""
    return str(manifest["address"]).rpartition("/")[0]


def _llama_cpp(manifest: Json, path: str, runtime: str) -> Json:
    """llama.cpp on the version's first GGUF file: CPUs and memory by the file's size, or one GPU."""
    sizes = {file["path"]: file["size"] for file in manifest["files"]}
    models = [name for name in manifest.get("gguf", []) if name in sizes]
    if not models:
        raise Tune16Error(
            f"deploy.runtime {runtime}: {manifest['address']} has no GGUF file. Name one in gguf_quantizations."
        )
    cache = context(manifest) * manifest["cache_bytes_per_token"]
    memory = f"{(sizes[models[0]] * 5 // 4 + cache) // 2**30 + 2}Gi"  # the file, keys and values, Python
    gpu = {GPU: "1"} if runtime.endswith("gpu") else {}
    return {
        "model": {
            "modelFormat": {"name": "gguf"},
            "runtime": SERVED_BY[runtime],
            "storage": {"path": f"{path}/{manifest['version']}/{models[0]}"},
            "args": [f"--alias={alias(path, manifest['version'], runtime)}", f"--context={context(manifest)}"],
            "resources": _resources("2" if gpu else _cpus(sizes[models[0]]), memory, gpu),
        }
    }


def _cpus(num_bytes: int) -> str:
    """CPUs for a GGUF file: every byte is read for every token, so a small file keeps few CPUs busy."""
    return next((cpus for least, cpus in _CPUS if num_bytes >= least), "1")


def context(manifest: Json) -> int:
    """The longest conversation to serve, in tokens."""
    return int(min(manifest["context"], max(_USUAL_CONTEXT, 2 * manifest["trained_tokens"])))


def _vllm(manifest: Json, path: str) -> Json:
    """The project's vLLM runtime, which KServe picks by the model's format, on merged weights."""
    version = manifest["version"]
    model = _vllm_model(manifest, "--served-model-name", kubeapi.service_name(path), alias(path, version, "vllm"))
    return {"model": {**model, "storage": {"path": f"{path}/{version}/merged"}}}


def _vllm_adapter(manifest: Json, path: str, connection: str, image: str) -> Json:
    """The same with the base model, and the adapter as a model beside it."""
    names = (kubeapi.service_name(path), alias(path, manifest["version"], "vllm-adapter"))
    modules = [f"{name}={_ADAPTER_MOUNT}/files" for name in names]
    rank = next((rank for rank in _LORA_RANKS if rank >= manifest["adapter_rank"]), None)
    if rank is None:
        raise Tune16Error(
            f"deploy.runtime vllm-adapter: vLLM serves adapters up to rank {_LORA_RANKS[-1]}, this one has "
            f"{manifest['adapter_rank']}. Use runtime vllm."
        )
    options = ("--enable-lora", f"--max-lora-rank={rank}", "--served-model-name", "base", "--lora-modules")
    model = _vllm_model(manifest, *options, *modules)
    mount = {"name": "adapter", "mountPath": _ADAPTER_MOUNT, "readOnly": True}
    return {
        "model": {**model, **_base_storage(manifest), "volumeMounts": [mount]},
        "volumes": [{"name": "adapter", "emptyDir": {}}],
        "initContainers": [_fetch_adapter(path, manifest["version"], connection, image)],
    }


def _vllm_model(manifest: Json, *arguments: str) -> Json:
    return {
        "modelFormat": {"name": "vLLM"},
        "args": [f"--max-model-len={context(manifest)}", *arguments],
        "resources": _resources("4", "24Gi", {GPU: "1"}),
    }


def _base_storage(manifest: Json) -> Json:
    """Where KServe fetches the base model from.

    Raises:
        Tune16Error: it cannot.
    """
    base = parse(manifest["lineage"]["model"], "model")
    if base.scheme == "hf":
        return {"storageUri": f"hf://{base.address}:{base.pin}"}
    bucket = owner(manifest).removeprefix("s3://").partition("/")[0]
    if base.scheme == "s3" and base.address.startswith(f"{bucket}/"):
        return {"storage": {"path": base.address.partition("/")[2]}}
    raise Tune16Error(
        f"deploy.runtime vllm-adapter: KServe cannot fetch the base model {base}. Put it into the connection's "
        "bucket, or use runtime vllm."
    )


def _fetch_adapter(path: str, version: str, connection: str, image: str) -> Json:
    """A container that downloads the adapter and checks every file before the server starts."""
    secrets = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": connection, "key": name}}}
        for name in CONNECTION_VARIABLES
    ]
    session = {"name": connection, "key": SESSION_TOKEN, "optional": True}
    secrets.append({"name": SESSION_TOKEN, "valueFrom": {"secretKeyRef": session}})
    download = ["download", "--path", path, "--version", version, "--part", "adapter", "--output"]
    return {
        "name": "adapter",
        "image": image,
        "command": ["python", "-m", "components", *download, f"{_ADAPTER_MOUNT}/files"],
        "env": secrets,
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [{"name": "adapter", "mountPath": _ADAPTER_MOUNT}],
    }


def _resources(cpu: str, memory: str, gpu: dict[str, str]) -> Json:
    amounts = {"cpu": cpu, "memory": memory, **gpu}
    return {"requests": amounts, "limits": amounts}
