"""The Kubernetes manifests are what the API takes, run confined, and hold no secret.

Nothing is applied here, for there is no cluster; the schema and plain rules are what is held.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsm_tune.cli.options import gather
from dsm_tune.cli.studies import tune

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
FILES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")


def documents(*files: Path) -> list[dict[str, Any]]:
    return [one for file in files for one in yaml.safe_load_all(file.read_text())]


ALL = documents(*FILES)
LISTED = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and template of each kind of pod."""
    for one in ALL:
        spec = one.get("spec", {})
        templates = {"": spec.get("template"), "submitter": spec.get("submitterPodTemplate")}
        templates["head"] = spec.get("headGroupSpec", {}).get("template")
        for group in spec.get("workerGroupSpecs", []):
            templates[group["groupName"]] = group["template"]
        for part, template in templates.items():
            if template is not None:
                yield f"{one['kind']} {one['metadata']['name']} {part}".strip(), template


PODS = dict(pods())
CONTAINERS = {
    f"{name}: {one['name']}": (pod, one)
    for name, pod in PODS.items()
    for one in pod["spec"]["containers"]
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_object_has_only_keys_and_types_that_the_api_knows(file: Path) -> None:
    pytest.importorskip("kubernetes", reason="its client has the API's types")
    from kubernetes_schema import misfits

    assert [line for one in documents(file) for line in misfits(one)] == []


def test_a_wrong_key_or_type_would_be_found() -> None:
    pytest.importorskip("kubernetes", reason="its client has the API's types")
    from kubernetes_schema import misfits

    (cluster,) = documents(FOLDER / "raycluster.yaml")
    group = cluster["spec"]["workerGroupSpecs"][0]
    group["maxReplicas"] = "4"
    (container,) = group["template"]["spec"]["containers"]
    container["readinesProbe"] = container.pop("readinessProbe")
    container["env"][0]["value"] = 3
    del cluster["spec"]["headGroupSpec"]["rayStartParams"]
    assert sorted(line.split(": ", 1)[1] for line in misfits(cluster)) == [
        "'4' is no int",
        "'rayStartParams' is missing",
        "'readinesProbe' is no key of V1Container",
        "3 is no str",
        "3 is no str",  # the head has the same list
    ]


def test_the_kustomization_lists_every_file_but_the_secret_and_the_job() -> None:
    assert sorted([*LISTED, "rayjob.yaml", "secret.example.yaml"]) == [f.name for f in FILES]


def test_kubectl_builds_it_with_one_image_for_all_roles() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl")
    done = subprocess.run([kubectl, "kustomize", FOLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(documents(*(FOLDER / name for name in LISTED)))
    inside = {one["metadata"].get("namespace") for one in built if one["kind"] != "Namespace"}
    assert inside == {"dsm-tune"}
    (job,) = documents(FOLDER / "rayjob.yaml")
    (submitter,) = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images == {submitter["image"], "postgres:15.13-bookworm"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_container_runs_confined_within_limits(name: str) -> None:
    pod, container = CONTAINERS[name]
    of_pod, own = pod["spec"]["securityContext"], container["securityContext"]
    assert of_pod["runAsNonRoot"] is True
    assert of_pod["runAsUser"] > 0
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    resources = container["resources"]
    assert {"cpu", "memory"} <= resources["requests"].keys()
    assert "memory" in resources["limits"]
    tag = container["image"].rpartition(":")[2]
    assert tag == "dsm-tune" or re.search(r"\d", tag)  # the kustomization sets the former's
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    claimed = {volume["name"] for volume in pod["spec"].get("volumes", [])}
    assert mounts - {"storage"} <= claimed


@pytest.mark.parametrize("name", [name for name in CONTAINERS if "submitter" not in name])
def test_a_container_that_stays_has_probes_of_what_it_serves(name: str) -> None:
    _, container = CONTAINERS[name]
    ports = {port["name"] for port in container.get("ports", [])}
    for kind in ("readinessProbe", "livenessProbe"):
        probe = container[kind]
        if "httpGet" in probe and isinstance(probe["httpGet"]["port"], str):
            assert probe["httpGet"]["port"] in ports


def test_passwords_come_from_a_secret_that_no_file_fills() -> None:
    for name, (_, container) in CONTAINERS.items():
        for one in container.get("env", []):
            secret = re.search(r"PASSWORD|ACCESS_KEY|TOKEN", one["name"])
            assert bool(secret) == ("secretKeyRef" in one.get("valueFrom", {})), (name, one)
            assert not re.search(r"//[^/]*:[^/]*@", one.get("value", "")), (name, one)
    (example,) = documents(FOLDER / "secret.example.yaml")
    assert set(example["stringData"].values()) == {""}
    asked = {
        one["valueFrom"]["secretKeyRef"]["key"]
        for _, container in CONTAINERS.values()
        for one in container.get("env", [])
        if "valueFrom" in one
    }
    assert asked == example["stringData"].keys()


def test_every_pod_is_named_by_a_network_policy_and_all_else_is_closed() -> None:
    policies = [one for one in ALL if one["kind"] == "NetworkPolicy"]
    (closed,) = [one for one in policies if one["metadata"]["name"] == "nothing"]
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    named = re.findall(
        r"(?<=name: )[a-z-]+|(?<=')[a-z-]+(?=')",
        " ".join(str(one["spec"]["podSelector"]) for one in policies),
    )
    labels = {pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in PODS.values()}
    assert labels <= set(named)


def test_services_find_their_pods() -> None:
    labels = [pod["metadata"]["labels"] for pod in PODS.values()]
    for one in ALL:
        if one["kind"] == "Service":
            assert one["spec"]["selector"] in labels
            assert one["spec"].get("type", "ClusterIP") == "ClusterIP"


def test_the_job_is_a_tune_that_its_cluster_can_run() -> None:
    (job,) = documents(FOLDER / "rayjob.yaml")
    (cluster,) = documents(FOLDER / "raycluster.yaml")
    spec, (group,) = job["spec"], cluster["spec"]["workerGroupSpecs"]
    assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    program, *words = shlex.split(spec["entrypoint"])
    assert program == "dsm-tune"
    with tune.make_context("tune", words) as context:
        config = gather(tune, context.params, {}).config()
    assert config.workers == group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert config.threads == int(worker["resources"]["limits"]["cpu"])
    offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
    assert json.loads(spec["entrypointResources"]).keys() <= offered.keys()
    assert config.timeout is not None
    assert config.timeout < spec["activeDeadlineSeconds"]
