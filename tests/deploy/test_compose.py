"""The compose files and the image, as far as they can be held without an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
# The keys of the compose specification that are used here, and no others.
KNOWN = {
    "build", "cap_drop", "command", "depends_on", "deploy", "entrypoint", "environment",
    "healthcheck", "image", "init", "networks", "ports", "profiles", "read_only", "restart",
    "security_opt", "shm_size", "tmpfs", "volumes",
}  # fmt: skip


def variables(text: str) -> set[str]:
    return set(re.findall(r"\$\{(\w+)", text))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_known_keys_and_refers_to_what_is_there(name: str) -> None:
    service = SERVICES[name]
    assert service.keys() <= KNOWN
    assert set(service["networks"]) <= COMPOSE["networks"].keys()
    assert set(service.get("depends_on", {})) <= SERVICES.keys()
    for other, how in service.get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
    for volume in service.get("volumes", []):
        source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
        assert source in COMPOSE["volumes"] or source.startswith("./")


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_and_reached_from_this_machine_alone(name: str) -> None:
    service = SERVICES[name]
    assert re.search(r":[\w.-]*\d[\w.-]*$", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "no-new-privileges:true" in service["security_opt"]
    if service["image"].startswith("dsm-tune:"):
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True


def test_databases_and_objects_are_in_a_network_without_a_way_out() -> None:
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    for name in ("postgres", "storage"):
        assert SERVICES[name]["networks"] == ["stores"]
        assert "ports" not in SERVICES[name]


def test_passwords_come_from_the_environment_and_are_in_no_command() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    secret = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert variables(text) >= secret
    for name in secret:  # refused, where it is empty
        assert set(re.findall(rf"\$\{{{name}(.)", text)) == {":"}
        assert f"${{{name}:-" not in text
    for name, service in SERVICES.items():
        words = f"{service.get('command')} {service.get('entrypoint')} {service.get('healthcheck')}"
        assert not variables(words) & secret, name
    assert not re.search(r"//[^/\s]*:[^/\s]*@", text)


def test_the_example_of_the_environment_names_every_variable_and_no_secret() -> None:
    lines = (DEPLOY / "env.example").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    assert given.keys() == variables((DEPLOY / "compose.yaml").read_text())
    assert {name for name, value in given.items() if not value} == {
        "POSTGRES_PASSWORD",
        "S3_ACCESS_KEY",
        "S3_SECRET_KEY",
    }
    assert given["RAY_WORKER_CPUS"] in str(SERVICES["ray-worker"])


def test_the_gpu_file_changes_a_service_that_exists() -> None:
    assert GPU["services"].keys() == {"ray-worker"}
    (device,) = GPU["services"]["ray-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_docker_reads_the_compose_files() -> None:
    docker = shutil.which("docker")
    found = docker and subprocess.run([docker, "compose", "version"], capture_output=True)
    if not docker or not found or found.returncode:
        pytest.skip("needs docker with its compose plug-in; no engine has to run")
    files = [f"--file={DEPLOY / name}" for name in ("compose.yaml", "compose.gpu.yaml")]
    command = [docker, "compose", *files, "config", "--quiet"]
    secret = {"POSTGRES_PASSWORD": "a", "S3_ACCESS_KEY": "b", "S3_SECRET_KEY": "c"}
    done = subprocess.run(command, env={**os.environ, **secret}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the image ------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of each instruction, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_image_starts_from_a_pinned_base_and_ends_as_an_ordinary_user() -> None:
    found = instructions()
    bases = [rest for word, rest in found if word == "FROM"]
    assert len(bases) == 2
    for base in bases:
        assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+( AS \w+)?", base)
    *_, user = [rest for word, rest in found if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number, which Kubernetes can check
    after = [word for word, _ in found][[word for word, _ in found].index("USER") :]
    assert "RUN" not in after
    assert "COPY" not in after
    (entry,) = [rest for word, rest in found if word == "ENTRYPOINT"]
    assert entry.startswith("[")


def test_the_image_takes_in_no_secret_and_nothing_from_the_network_but_pinned_packages() -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    assert {word for word, _ in instructions()} <= known  # no ADD, no ARG
    for word, rest in instructions():
        assert not re.search(r"(?i)password|secret|token", rest)
        if word == "RUN" and "pip install" in rest:
            assert "-c constraints.txt" in rest
            assert "--no-cache-dir" in rest
        assert "NVIDIA_VISIBLE_DEVICES" not in rest


def test_what_the_image_copies_is_there_and_reaches_the_build() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = {line[1:] for line in ignored if line.startswith("!")}
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = shlex.split(rest)
            assert set(sources) <= sent
            assert all((ROOT / source).exists() for source in sources)


def test_the_image_installs_extras_that_the_project_declares() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (installed,) = [rest for word, rest in instructions() if "pip install" in rest]
    asked = re.search(r"\.\[([\w,]+)\]", installed)
    assert asked is not None
    assert set(asked[1].split(",")) <= extras.keys()


def test_programs_that_the_compose_file_starts_are_in_the_image() -> None:
    started = {service["entrypoint"][0] for service in SERVICES.values() if "entrypoint" in service}
    assert started == {"python", "mlflow", "ray"}
    copied = [rest for word, rest in instructions() if word == "COPY"]
    assert "deploy/serve/app.py /opt/serve/app.py" in copied
    assert "/opt/serve/app.py" in SERVICES["serve"]["entrypoint"]


def test_the_image_has_no_lint_of_hadolint() -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint")
    done = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
