"""What a Kubernetes object may hold: the types of the API's own description, and KubeRay's few.

The types come from the Python client of Kubernetes, which is generated from the API's OpenAPI
document; those of RayCluster and RayJob (``ray.io/v1``) are written down here as far as used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kubernetes import client

PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float)}
KINDS = {
    "apps/v1 Deployment": "V1Deployment",
    "apps/v1 StatefulSet": "V1StatefulSet",
    "networking.k8s.io/v1 NetworkPolicy": "V1NetworkPolicy",
    "ray.io/v1 RayCluster": "RayCluster",
    "ray.io/v1 RayJob": "RayJob",
    "v1 ConfigMap": "V1ConfigMap",
    "v1 Namespace": "V1Namespace",
    "v1 PersistentVolumeClaim": "V1PersistentVolumeClaim",
    "v1 Secret": "V1Secret",
    "v1 Service": "V1Service",
}
OBJECT = {"apiVersion": "str", "kind": "str", "metadata": "V1ObjectMeta"}
# Of KubeRay: key, then type; what ends in ! must be there.
RAY: Mapping[str, Mapping[str, str]] = {
    "RayCluster": {**OBJECT, "spec": "RayClusterSpec!"},
    "RayClusterSpec": {
        "rayVersion": "str",
        "enableInTreeAutoscaling": "bool",
        "autoscalerOptions": "AutoscalerOptions",
        "headGroupSpec": "HeadGroupSpec!",
        "workerGroupSpecs": "List[WorkerGroupSpec]",
    },
    "AutoscalerOptions": {
        "idleTimeoutSeconds": "int",
        "upscalingMode": "str",
        "resources": "V1ResourceRequirements",
        "securityContext": "V1SecurityContext",
    },
    "HeadGroupSpec": {
        "serviceType": "str",
        "rayStartParams": "Dict[str, str]!",
        "template": "V1PodTemplateSpec!",
    },
    "WorkerGroupSpec": {
        "groupName": "str!",
        "replicas": "int",
        "minReplicas": "int!",
        "maxReplicas": "int!",
        "rayStartParams": "Dict[str, str]!",
        "template": "V1PodTemplateSpec!",
    },
    "RayJob": {**OBJECT, "spec": "RayJobSpec!"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "int",
        "clusterSelector": "Dict[str, str]",
        "entrypoint": "str!",
        "entrypointResources": "str",
        "submissionMode": "str",
        "submitterPodTemplate": "V1PodTemplateSpec",
    },
}


def misfits(document: Any) -> list[str]:
    """All that the API would refuse of a parsed object: a line each, with its place."""
    kind = f"{document.get('apiVersion')} {document.get('kind')}"
    if kind not in KINDS:
        return [f"unknown kind {kind}"]
    return _misfits(KINDS[kind], document, document["kind"])


def _misfits(kind: str, value: Any, where: str) -> list[str]:
    kind = kind.rstrip("!")
    if kind == "object":  # anything
        return []
    if kind in PLAIN:
        is_bool = isinstance(value, bool) and kind != "bool"
        right = isinstance(value, PLAIN[kind]) and not is_bool
        return [] if right else [f"{where}: {value!r} is no {kind}"]
    if items := re.fullmatch(r"List\[(.+)\]", kind):
        if not isinstance(value, list):
            return [f"{where}: {value!r} is no list"]
        return [
            line for i, v in enumerate(value) for line in _misfits(items[1], v, f"{where}[{i}]")
        ]
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is no mapping"]
    if items := re.fullmatch(r"Dict\[str, (.+)\]", kind):
        return [x for k, v in value.items() for x in _misfits(items[1], v, f"{where}.{k}")]
    fields = _fields(kind)
    found = [f"{where}: {key!r} is no key of {kind}" for key in value if key not in fields]
    found += [
        f"{where}: {key!r} is missing"
        for key, of in fields.items()
        if of.endswith("!") and key not in value
    ]
    known = {key: v for key, v in value.items() if key in fields}
    return found + [x for k, v in known.items() for x in _misfits(fields[k], v, f"{where}.{k}")]


def _fields(kind: str) -> Mapping[str, str]:
    """Key to type, of KubeRay's types or of Kubernetes'."""
    if kind in RAY:
        return RAY[kind]
    model = getattr(client, kind)
    needed = {name for name, field in model.model_fields.items() if field.is_required()}
    return {
        key: model.openapi_types[name] + ("!" if name in needed else "")
        for name, key in model.attribute_map.items()
    }
