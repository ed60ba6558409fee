"""Training jobs as the cluster takes them: a TrainJob or a PyTorchJob, made from the step's own pod."""

import json
import os
from dataclasses import dataclass
from typing import Any

from components.config import GPU, TrainConfig
from components.kubernetes.api import main_container
from components.kubernetes.kueue import QUEUE_LABEL
from components.runtime import lines

Json = dict[str, Any]

_RUNTIME = "torch-distributed"  # the ClusterTrainingRuntime that comes with OpenShift AI
_CA_VARIABLES = ("SSL_CERT_FILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
_OF_THE_STEP_ALONE = ("KFP_", "ARGO_", "PET_", lines.VARIABLE)  # variables that mean the step's own pod
_TEMPLATE = "ARGO_TEMPLATE"  # the variable in which Argo Workflows tells a pod's containers what it was made of


@dataclass(frozen=True)
class Kind:
    """A kind of training job: where the API serves it, how its container is called and how its pods are labelled."""

    group: str
    version: str
    plural: str
    name: str
    container: str
    pods: str  # label selector with {job}
    first: tuple[str, str]  # the label that only the first pod has


@dataclass(frozen=True)
class Placement:
    """Where a job's pods run, as which account, with which ConfigMaps (CAs): the pod's fields and its container's."""

    pod: Json
    container: Json


TRAIN_JOB = Kind(
    "trainer.kubeflow.org",
    "v1alpha1",
    "trainjobs",
    "TrainJob",
    "node",
    "jobset.sigs.k8s.io/jobset-name={job}",
    ("batch.kubernetes.io/job-completion-index", "0"),
)
PYTORCH_JOB = Kind(
    "kubeflow.org",
    "v1",
    "pytorchjobs",
    "PyTorchJob",
    "pytorch",
    "training.kubeflow.org/job-name={job}",
    ("training.kubeflow.org/replica-type", "master"),
)


def describe(kind: Kind, job: str, pod: Json, source: str, config: TrainConfig, has_patches: bool) -> Json:
    """The job's object; it belongs to the step's own pod, so the cluster removes it with it.

    Args:
        kind: what the cluster serves.
        job: the job's name.
        pod: the step's own pod: image, account, variables, CAs, nodes and queue are the job's too.
        source: ``s3://`` folder of the inputs.
        config: how many nodes and GPUs.
        has_patches: whether the cluster's TrainJob has ``runtimePatches``; older ones have ``podTemplateOverrides``.
    """
    main, resources = main_container(pod), resources_of(pod, config)
    container = {
        "image": main["image"],
        "command": ["python3", "-m", "components", "train-node", "--source", source],
        "env": _environment(main),
    }
    labels = {name: text for name, text in pod["metadata"].get("labels", {}).items() if name == QUEUE_LABEL}
    metadata = pod["metadata"]
    owner = {"apiVersion": "v1", "kind": "Pod", "name": metadata["name"], "uid": metadata["uid"]}
    placement = _placement(pod, main)
    if kind is TRAIN_JOB:
        spec = _train_job(container, resources, placement, config, has_patches)
    else:
        spec = _pytorch_job(container, resources, placement, config)
    return {
        "apiVersion": f"{kind.group}/{kind.version}",
        "kind": kind.name,
        "metadata": {"name": job, "labels": labels, "ownerReferences": [owner]},
        "spec": spec,
    }


def resources_of(pod: Json, config: TrainConfig) -> Json:
    """What each pod of the job asks for: as much as the step's own pod, and the GPUs."""
    own = main_container(pod).get("resources", {})
    gpus = {GPU: str(config.num_gpus)} if config.num_gpus else {}
    return {name: {**own.get(name, {}), **gpus} for name in ("requests", "limits")}


def _train_job(container: Json, resources: Json, placement: Placement, config: TrainConfig, has_patches: bool) -> Json:
    spec: Json = {
        "runtimeRef": {"name": _RUNTIME, "kind": "ClusterTrainingRuntime", "apiGroup": TRAIN_JOB.group},
        "trainer": {
            **container,
            "numNodes": config.num_nodes,
            "numProcPerNode": config.processes_per_node,
            "resourcesPerNode": resources,
        },
    }
    if has_patches:
        pod = {**placement.pod, "containers": [{"name": TRAIN_JOB.container, **placement.container}]}
        replicated_job = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
        replicated = {"template": {"spec": {"replicatedJobs": [replicated_job]}}}
        spec["runtimePatches"] = [{"manager": "tune16/train", "trainingRuntimeSpec": replicated}]
    else:
        fields = ("serviceAccountName", "nodeSelector", "tolerations", "volumes")
        pod = {name: placement.pod[name] for name in fields}
        mounts = {"name": TRAIN_JOB.container, "volumeMounts": placement.container["volumeMounts"]}
        spec["podTemplateOverrides"] = [{"targetJobs": [{"name": "node"}], "spec": {**pod, "containers": [mounts]}}]
    return spec


def _pytorch_job(container: Json, resources: Json, placement: Placement, config: TrainConfig) -> Json:
    full = {"name": PYTORCH_JOB.container, **container, "resources": resources, **placement.container}
    replica = {"restartPolicy": "Never", "template": {"spec": {**placement.pod, "containers": [full]}}}
    return {
        "nprocPerNode": str(config.processes_per_node),
        "pytorchReplicaSpecs": {
            "Master": {"replicas": 1, **replica},
            "Worker": {"replicas": config.num_nodes - 1, **replica},
        },
    }


def _environment(main: Json) -> list[Json]:
    """The step's variables, secrets by name, and those of its CA, which the launcher sets in its own process only."""
    own = [
        entry
        for entry in main.get("env", [])
        if not entry["name"].startswith(_OF_THE_STEP_ALONE) and "fieldRef" not in entry.get("valueFrom", {})
    ]
    names = {entry["name"] for entry in own}
    added = [name for name in _CA_VARIABLES if name in os.environ and name not in names]
    said = {"name": lines.VARIABLE, "value": lines.JSON}  # the step reads what its pods print
    return [*own, *({"name": name, "value": os.environ[name]} for name in added), said]


def _nodes(pod: Json) -> tuple[Json, list[Json]]:
    """Node selector and tolerations that the pipeline asked for, of this pod: parameters would be in the cache's key.

    They stand in the workflow's patch of the pod. The pod's own may have others: a queue's that has no GPUs, and those
    that Kubernetes gives to every pod.
    """
    for container in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
        for entry in container.get("env", []):
            if entry["name"] == _TEMPLATE and (patch := json.loads(entry["value"]).get("podSpecPatch")):
                patched = json.loads(patch)
                return patched.get("nodeSelector") or {}, patched.get("tolerations") or []
    own = pod["spec"].get("tolerations", [])
    asked = [entry for entry in own if not entry.get("key", "").startswith("node.kubernetes.io/")]
    return pod["spec"].get("nodeSelector") or {}, asked


def _placement(pod: Json, main: Json) -> Placement:
    spec = pod["spec"]
    selector, tolerations = _nodes(pod)
    volumes = [volume for volume in spec.get("volumes", []) if "configMap" in volume]
    names = {volume["name"] for volume in volumes}
    mounts = [mount for mount in main.get("volumeMounts", []) if mount["name"] in names]
    return Placement(
        {
            "serviceAccountName": spec.get("serviceAccountName", "default"),
            "nodeSelector": selector,
            "tolerations": tolerations,
            "volumes": [*volumes, {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}],
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        },
        {
            "volumeMounts": [*mounts, {"name": "shm", "mountPath": "/dev/shm"}],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        },
    )
