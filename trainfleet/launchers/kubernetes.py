"""A run on Kubernetes: manifests of a JobSet, or of Kubeflow's PyTorchJob, one pod a host."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from trainfleet.comm.environment import DEFAULT_PORT
from trainfleet.errors import LaunchError
from trainfleet.launchers.command import Command

if TYPE_CHECKING:
    from trainfleet.training.recipe import Recipe

Manifest = dict[str, Any]
KINDS = ("jobset", "pytorchjob")

RECIPE = "/etc/trainfleet/recipe.yaml"
"""Where the recipe is in every pod."""
_GRACE_SECONDS = 120  # more than `trainfleet train` gives its ranks to save after SIGTERM
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # RFC 1035: also the name of a service
_LONGEST_NAME = 40  # what controllers append has to fit into 63
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTP]i?|Ki)?")
_RULE = {
    "action": "FailJob",
    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pods:
    """What is asked of the cluster for each host of the run."""

    image: str
    """Holds trainfleet, torch, and the code that the recipe names."""
    claim: str
    """PersistentVolumeClaim for the run folder; with several hosts one that many nodes can mount."""
    name: str = "trainfleet"
    namespace: str | None = None
    mount: str = "/mnt/runs"
    """Where the claim is mounted: a run folder that is not absolute is below it."""
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    cpus: str | None = None
    memory: str | None = None
    shared_memory: str = "8Gi"
    """Size of /dev/shm, through which data workers hand over batches. It counts towards the memory of the pod."""
    claim_size: str | None = None
    """Make the claim too, of this size."""
    storage_class: str | None = None
    max_job_restarts: int = 10
    """New starts of all pods, after failures that the launchers in them could not mend."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or len(self.name) > _LONGEST_NAME:
            raise LaunchError(
                f"The name is {self.name!r}; use at most {_LONGEST_NAME} small letters, digits and dashes, the first a "
                "letter."
            )
        for field in ("cpus", "memory", "shared_memory", "claim_size"):
            value = getattr(self, field)
            if value is not None and not _QUANTITY.fullmatch(value):
                raise LaunchError(f"{field} is {value!r}; write a quantity of Kubernetes, such as 8, 500m or 64Gi.")
        if not self.mount.startswith("/"):
            raise LaunchError(f"mount is {self.mount!r}; write an absolute path.")
        if not self.image or re.search(r"\s", self.image):
            raise LaunchError(f"image is {self.image!r}; write registry/name:tag.")


def below(recipe: Recipe, mount: str) -> Recipe:
    """The recipe, with what it writes below `mount` where it named no absolute place."""
    checkpoint = recipe.checkpoint
    if checkpoint.folder is not None and "://" not in checkpoint.folder:
        checkpoint = replace(checkpoint, folder=str(PurePosixPath(mount) / checkpoint.folder))
    return replace(recipe, folder=str(PurePosixPath(mount) / recipe.folder), checkpoint=checkpoint)


def manifests(command: Command, pods: Pods, *, recipe: str, kind: str) -> list[Manifest]:
    """What `kubectl apply` needs, in order; `recipe` is the text of the resolved recipe, `kind` one of KINDS."""
    if kind not in KINDS:
        raise LaunchError(f"The kind is {kind!r}; allowed: {', '.join(KINDS)}.")
    made = [_config_map(pods, recipe)]
    if pods.claim_size is not None:
        made.append(_claim(pods, many_nodes=command.nodes > 1))
    return [*made, _job_set(command, pods) if kind == "jobset" else _pytorch_job(command, pods)]


def _metadata(pods: Pods, name: str) -> Manifest:
    metadata: Manifest = {"name": name, "labels": {"app.kubernetes.io/name": "trainfleet"}}
    return metadata if pods.namespace is None else {**metadata, "namespace": pods.namespace}


def _config_map(pods: Pods, recipe: str) -> Manifest:
    metadata = _metadata(pods, f"{pods.name}-recipe")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"recipe.yaml": recipe}}


def _claim(pods: Pods, *, many_nodes: bool) -> Manifest:
    spec: Manifest = {
        "accessModes": ["ReadWriteMany" if many_nodes else "ReadWriteOnce"],
        "resources": {"requests": {"storage": pods.claim_size}},
    }
    if pods.storage_class is not None:
        spec["storageClassName"] = pods.storage_class
    metadata = _metadata(pods, pods.claim)
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _job_set(command: Command, pods: Pods) -> Manifest:
    """One Job of indexed pods behind a headless service; any pod that fails has all of them made anew."""
    template = _template(
        command,
        pods,
        container="trainfleet",
        number="metadata.annotations['batch.kubernetes.io/job-completion-index']",
        first=f"{pods.name}-host-0-0.{pods.name}",
        restart="Never",
    )
    job = {
        "parallelism": command.nodes,
        "completions": command.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_RULE]},
        "template": template,
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(pods, pods.name),
        "spec": {
            # Hosts find the first one by name before any of them is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "successPolicy": {"operator": "All"},
            "failurePolicy": {
                "maxRestarts": pods.max_job_restarts,
                # A node that is drained or taken away is nobody's failure.
                "rules": [
                    {
                        "name": "disruption",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [{"name": "host", "replicas": 1, "template": {"spec": job}}],
        },
    }


def _pytorch_job(command: Command, pods: Pods) -> Manifest:
    """Workers alone, as under torchrun's c10d; each has a service of its name, and the first is the rendezvous."""
    template = _template(
        command,
        pods,
        container="pytorch",  # the operator looks for this name
        number="metadata.labels['training.kubeflow.org/replica-index']",
        first=f"{pods.name}-worker-0",
        restart=None,
    )
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(pods, pods.name),
        "spec": {
            "runPolicy": {"backoffLimit": pods.max_job_restarts, "cleanPodPolicy": "Running"},
            "nprocPerNode": str(command.nproc_per_node),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvPort": DEFAULT_PORT,
                "minReplicas": command.nodes,
                "maxReplicas": command.nodes,
                "maxRestarts": command.max_restarts,
            },
            "pytorchReplicaSpecs": {
                "Worker": {"replicas": command.nodes, "restartPolicy": "OnFailure", "template": template}
            },
        },
    }


def _threads(command: Command, pods: Pods) -> list[Manifest]:
    """A limit of cores is a share of time: the pod sees all cores of its node, and would start a thread for each."""
    if pods.cpus is None or not pods.cpus.isdigit():
        return []
    return [{"name": "OMP_NUM_THREADS", "value": str(max(1, int(pods.cpus) // command.nproc_per_node))}]


def _template(
    command: Command, pods: Pods, *, container: str, number: str, first: str, restart: str | None
) -> Manifest:
    """The pod of one host, whose number the controller writes where `number` says."""
    asked = {"cpu": pods.cpus, "memory": pods.memory, pods.gpu_resource: str(pods.gpus) if pods.gpus else None}
    resources = {name: value for name, value in asked.items() if value is not None}
    node_rank = {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": number}}}
    spec: Manifest = {
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [
            {
                "name": container,
                "image": pods.image,
                # No shell in between: SIGTERM reaches the launcher, and nothing else.
                "command": command.arguments(node_rank="$(NODE_RANK)", rendezvous=f"{first}:{DEFAULT_PORT}"),
                "env": [node_rank, *_threads(command, pods)],
                # The name is the one that Kubeflow's operator looks for, and as good as any other.
                "ports": [{"name": "pytorchjob-port", "containerPort": DEFAULT_PORT}],
                "resources": {"requests": resources, "limits": dict(resources)},
                "volumeMounts": [
                    {"name": "recipe", "mountPath": RECIPE.rpartition("/")[0], "readOnly": True},
                    {"name": "work", "mountPath": pods.mount},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "recipe", "configMap": {"name": f"{pods.name}-recipe"}},
            {"name": "work", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shared_memory}},
        ],
    }
    if restart is not None:
        spec["restartPolicy"] = restart
    return {"metadata": {"labels": {"app.kubernetes.io/name": "trainfleet"}}, "spec": spec}
