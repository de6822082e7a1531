"""The pretrained DeiT-Ti on photographs, and MLflow's own server: what production would see."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_sources import demo_plan, demo_source
from torch import Tensor, nn

from dsm_tune import production
from dsm_tune.config import TuneConfig
from dsm_tune.demo import create_model, load_split
from dsm_tune.exporting import formats
from dsm_tune.exporting.bundle import load_bundle
from dsm_tune.exporting.proof import compared
from dsm_tune.merging.merged import merged_view
from dsm_tune.merging.published import dsm_plan
from dsm_tune.sources import Source

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_deit_gives_the_eager_logits_in_every_format_on_photographs(
    deit_tiny: nn.Module, photos: Tensor, tmp_path: Path
) -> None:
    plan = dsm_plan(deit_tiny, r=16, delay=1, window=7)
    config = TuneConfig(model="deit_tiny_patch16_224", images=".", budget_ms=1)
    source, folder = Source(config, deit_tiny, plan, {}), tmp_path / "bundle"
    for kind in formats.FILES:
        production.export(source, kind, str(folder))
    expected = merged_view(deit_tiny, plan)(photos)
    runs = {kind: formats.opened(kind, folder / file, 2) for kind, file in formats.FILES.items()}
    runs["bundle"] = load_bundle(folder)
    for kind, run in runs.items():
        proof = compared(run, photos, expected, 1e-4)
        print(f"{kind}: {proof}, another class {proof.other_class}")
        assert proof.holds, (kind, proof)
        assert proof.other_class <= proof.apart


def test_mlflow_serves_the_model_and_a_request_gets_the_class(tmp_path: Path) -> None:
    production.export(demo_source(), "mlflow", str(tmp_path / "model"))
    image = load_split("holdout")[0][:1]
    with torch.no_grad():
        expected = int(merged_view(create_model(), demo_plan())(image).argmax())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["-m", str(tmp_path / "model"), "--host", "127.0.0.1", "--port", f"{port}"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        body = json.dumps({"inputs": {"pixels": image.tolist()}})
        answer = _asked(port, body, process)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    logits = answer["predictions"]["logits"][0]
    assert max(range(len(logits)), key=logits.__getitem__) == expected


def _asked(port: int, body: str, process: subprocess.Popen[bytes]) -> Any:
    """The answer of a server that may not have started yet."""
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status == 200, content
            return json.loads(content)
        except OSError:
            time.sleep(0.5)
        finally:
            connection.close()
    raise AssertionError("the server did not answer")
