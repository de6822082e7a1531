"""A newcomer's walk: the commands that the README prints, in its order, in an empty folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from command_line import REPOSITORY, environment
from servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def walk() -> tuple[list[str], str]:
    """The commands and the Python of the README's walk."""
    text = (REPOSITORY / "README.md").read_text()
    (part,) = re.findall(r"<!-- walk -->\n(.*?)<!-- end of walk -->", text, re.DOTALL)
    (commands,) = re.findall(r"^```\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    return commands.splitlines(), snippet


def with_program(folder: Path) -> dict[str, str]:
    """An environment in which ``dsm-tune`` is this checkout's."""
    folder.mkdir()
    program = folder / "dsm-tune"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dsm_tune "$@"\n')
    program.chmod(0o755)
    kept = environment()
    return {**kept, "PATH": f"{folder}{os.pathsep}{kept['PATH']}"}


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return str(answer.read().decode())


def look_at(command: str, cwd: Path, environ: dict[str, str]) -> str:
    """Open the page that ``ui`` prints, as far as HTTP shows it; return the study's note."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 5000)) == 0:  # somebody else's
            command = command.replace("dsm-tune ui", f"dsm-tune ui --port {free_port()}")
    words = shlex.split(command, comments=True)
    process = subprocess.Popen(
        words, cwd=cwd, env=environ, text=True, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/#/runs/([0-9a-f]{32})", said)
        assert found, said
        root, run_id = found.groups()
        assert "<title>MLflow</title>" in fetch(root)
        report = fetch(f"{root}/get-artifact?path=report.html&run_uuid={run_id}")
        assert "What tuning bought" in report
        run = json.loads(fetch(f"{root}/api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        return tags["mlflow.note.content"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_readmes_walk_can_be_walked(tmp_path: Path) -> None:
    environ = with_program(tmp_path / "bin")
    folder = tmp_path / "empty"
    folder.mkdir()
    commands, snippet = walk()
    said: dict[str, str] = {}
    for command in commands:
        verb = shlex.split(command)[1]
        if verb == "ui":
            said[verb] = look_at(command, folder, environ)
            continue
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder,
            env=environ,
            text=True,
            capture_output=True,
            timeout=500,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said[verb] = done.stdout
    assert list(said) == ["--budget-gflops", "show", "ui", "export", "verify"]
    answer = "A merged plan meets the budget of 0.0123 GMACs"
    for verb in ("--budget-gflops", "show", "ui"):
        assert answer in said[verb]
    assert "dsm-tune verify out" in said["export"]
    assert said["verify"].endswith("it holds\n")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=folder,
        env=environ,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (top1,) = re.findall(r"tensor\(([\d.]+)\)", done.stdout)
    assert float(top1) > 0.9
