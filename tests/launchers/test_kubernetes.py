"""The manifests are valid to Kubernetes and to the controllers, and their pods run what was meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainfleet.config import load_config, to_yaml
from trainfleet.errors import LaunchError
from trainfleet.launchers.command import Command
from trainfleet.launchers.kubernetes import KINDS, RECIPE, Pods, below, manifests
from trainfleet.training.recipe import Recipe

SCHEMAS = Path(__file__).parent / "schemas"
COMMAND = Command(recipe=RECIPE, nodes=2, nproc_per_node=4, max_restarts=3, resume="auto")
PODS = Pods(
    image="registry.example/train:1", claim="runs", name="gpt", namespace="team", gpus=4, cpus="16", memory="64Gi",
    shared_memory="16Gi", claim_size="500Gi", storage_class="nfs",
)  # fmt: skip


def made(kind: str, pods: Pods = PODS, command: Command = COMMAND) -> dict[str, dict[str, Any]]:
    """By kind, as they come out of the file."""
    written = "---\n".join(
        to_yaml(each) for each in manifests(command, pods, recipe="folder: /mnt/runs/run\n", kind=kind)
    )
    assert "&id" not in written  # an anchor is valid, and nobody reads it with pleasure
    return {each["kind"]: each for each in yaml.safe_load_all(written)}


def pod_template(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if "JobSet" in found:
        return found["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]  # type: ignore[no-any-return]
    return found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]  # type: ignore[no-any-return]


def core(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What Kubernetes itself has a schema of: also the Jobs and the pods that the controllers make of the rest."""
    rest = [each for kind, each in found.items() if kind not in ("JobSet", "PyTorchJob")]
    metadata = {"name": "x"}
    if "JobSet" in found:
        (replicated,) = found["JobSet"]["spec"]["replicatedJobs"]
        return [*rest, {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **replicated["template"]}]
    return [*rest, {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_template(found)["spec"]}]


@pytest.mark.parametrize("version", ["1.29", "1.34"])
@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_the_core_of_them(kind: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'trainfleet[manifests]'").validate
    checked = core(made(kind))
    assert {each["kind"] for each in checked} == {"ConfigMap", "PersistentVolumeClaim"} | (
        {"Job"} if kind == "jobset" else {"Pod"}
    )
    for each in checked:
        validate(each, version, strict=True)
    pod = checked[-1]["spec"].get("template", checked[-1])["spec"]
    pod["containers"][0]["volumeMount"] = pod["containers"][0].pop("volumeMounts")
    with pytest.raises(Exception, match="volumeMount"):
        validate(checked[-1], version, strict=True)


def schema_of(kind: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'trainfleet[test]'")
    name = {"jobset": "jobset.v1alpha2", "pytorchjob": "pytorchjob.v1"}[kind]
    return jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text()))


@pytest.mark.parametrize("pods", [PODS, Pods(image="a", claim="b")], ids=["all", "least"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_controllers_take_theirs(kind: str, pods: Pods) -> None:
    found = made(kind, pods)
    own = found.get("JobSet") or found["PyTorchJob"]
    assert list(schema_of(kind).iter_errors(own)) == []
    spec = own["spec"]
    spec["restarts"] = 1
    assert [error.validator for error in schema_of(kind).iter_errors(own)] == ["additionalProperties"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pod_runs_the_launcher_of_its_host(kind: str) -> None:
    (container,) = pod_template(made(kind))["spec"]["containers"]
    first = {"jobset": "gpt-host-0-0.gpt", "pytorchjob": "gpt-worker-0"}[kind]
    assert " ".join(container["command"]) == (
        f"trainfleet train {RECIPE} --nproc 4 --nnodes 2 --rendezvous {first}:29500 --max-restarts 3 "
        "--resume auto --node-rank $(NODE_RANK)"
    )
    assert container["resources"]["limits"] == {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert container["name"] == {"jobset": "trainfleet", "pytorchjob": "pytorch"}[kind]
    used = {variable for word in container["command"] for variable in re.findall(r"\$\((\w+)\)", word)}
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert used == {"NODE_RANK"} and env == {"NODE_RANK": None, "OMP_NUM_THREADS": "4"}  # 16 cores for 4 ranks
    (container,) = pod_template(made(kind, Pods(image="a", claim="b")))["spec"]["containers"]
    assert [variable["name"] for variable in container["env"]] == ["NODE_RANK"]


@pytest.mark.parametrize("kind", KINDS)
def test_volumes_and_mounts_fit_together(kind: str) -> None:
    found = made(kind)
    spec = pod_template(found)["spec"]
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"recipe": "/etc/trainfleet", "work": "/mnt/runs", "shared-memory": "/dev/shm"}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert set(volumes) == set(mounts)
    assert volumes["recipe"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert volumes["work"]["persistentVolumeClaim"]["claimName"] == found["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert found["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    assert spec["terminationGracePeriodSeconds"] >= 60  # what the launcher gives its ranks to save


def test_a_failed_pod_has_the_set_made_anew_and_a_drained_node_is_not_counted() -> None:
    spec = made("jobset")["JobSet"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (2, 2, "Indexed", 0)
    assert job["podFailurePolicy"]["rules"][0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy asks for it


def test_the_recipe_in_the_pods_is_the_one_that_was_resolved() -> None:
    recipe = load_config(Recipe, values={"batch.micro_batch": 2, "folder": "runs/gpt", "train.steps": 7}, env={}).value
    moved = below(recipe, "/mnt/runs")
    assert moved.folder == "/mnt/runs/runs/gpt" and below(moved, "/mnt/runs") == moved
    found = manifests(COMMAND, PODS, recipe=to_yaml(moved), kind="jobset")
    again = load_config(Recipe, values=yaml.safe_load(found[0]["data"]["recipe.yaml"]), env={}).value
    assert again == moved


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"name": "My_Job"}, "The name is 'My_Job'; use at most 40 small letters"),
        ({"name": "a" * 41}, "at most 40"),
        ({"memory": "64 GB"}, "memory is '64 GB'; write a quantity"),
        ({"mount": "work"}, "mount is 'work'; write an absolute path"),
        ({"image": "a b"}, "image is 'a b'"),
    ],
)
def test_what_the_cluster_would_refuse_is_refused_here(asked: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        Pods(**{"image": "a", "claim": "b", **asked})  # type: ignore[arg-type]


def test_another_kind_is_refused() -> None:
    with pytest.raises(LaunchError, match="The kind is 'job'; allowed: jobset, pytorchjob"):
        manifests(COMMAND, PODS, recipe="", kind="job")
