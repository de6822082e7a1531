"""The serving example answers many requests, refuses bad ones in one line, and stops in order."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from dsm_tune import production
from dsm_tune.config import TuneConfig
from dsm_tune.demo import create_model, load_split
from dsm_tune.merging.merged import merged_view
from dsm_tune.merging.published import tome_plan
from dsm_tune.sources import Source

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "deploy" / "serve" / "app.py"
PLAN = tome_plan(create_model(), r=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "bundle"
    source = Source(TuneConfig(budget_gflops="100%"), create_model(), PLAN, {})
    production.export(source, "onnx", str(folder))
    return folder


class Server:
    """The served process, and how to talk to it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        command = [sys.executable, str(APP), str(folder), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.get("/readyz")[0] == 200:
                    return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server is not ready")

    def _call(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        return self._call("GET", path, b"", "text/plain")

    def predict(self, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
        return self._call("POST", "/predict", body, kind)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    started = Server(folder)
    yield started
    started.stop()


def as_json(pixels: torch.Tensor) -> bytes:
    return json.dumps({"pixels": pixels.tolist()}).encode()


def as_png(seed: int, size: tuple[int, int] = (40, 31)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def test_a_thousand_requests_at_once_get_the_eager_classes(server: Server) -> None:
    images, _ = load_split("holdout")
    images = images[:100]
    with torch.no_grad():
        expected = merged_view(create_model(), PLAN)(images).softmax(dim=1)
    bodies = [as_json(image) for image in images]

    def ask(number: int) -> tuple[int, Any]:
        return server.predict(bodies[number % len(bodies)])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(1000)))
    assert {status for status, _ in answers} == {200}
    for number, (_, body) in enumerate(answers):
        wanted = expected[number % len(bodies)]
        assert body["class"] == int(wanted.argmax())
        assert abs(body["top"][0]["probability"] - float(wanted.max())) < 1e-3


def test_an_image_is_transformed_as_timm_does(server: Server) -> None:
    model = create_model()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    view = merged_view(model, PLAN)
    for seed, size in enumerate([(40, 31), (31, 40), (28, 28), (300, 200)]):
        body = as_png(seed, size)
        with Image.open(io.BytesIO(body)) as image, torch.no_grad():
            shares = view(transform(image.convert("RGB"))[None]).softmax(dim=1)[0]
        status, answer = server.predict(body, "image/png")
        assert status == 200
        found = {one["class"]: one["probability"] for one in answer["top"]}
        for number, share in found.items():
            assert abs(share - float(shares[number])) < 1e-3


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"not json", "application/json", 400),
        (b'{"pixels": [1, 2]}', "application/json", 400),
        (b'{"pixels": [[["a"]]]}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"pixels": [1' + b"0" * 400 + b"]}", "application/json", 400),
        (b"[]", "application/json", 400),
        (
            json.dumps({"pixels": [[[float("nan")] * 28] * 28] * 3}).encode(),
            "application/json",
            400,
        ),
        (b"not an image", "image/png", 400),
        (b"", "image/jpeg", 400),
        (as_png(0)[:60], "image/png", 400),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png", 400),
        (b"\0" * (17 << 20), "image/png", 413),
        (as_png(0, (3_000_000, 1)), "image/png", 413),
        (b"text", "text/plain", 415),
        (b"text", "", 415),
    ],
)
def test_a_bad_request_gets_one_clear_line_and_the_server_lives(
    server: Server, body: bytes, kind: str, status: int
) -> None:
    try:
        found, answer = server.predict(body, kind)
    except (BrokenPipeError, ConnectionResetError):
        assert status == 413  # the server hung up on what it will not read
    else:
        assert found == status, answer
        assert list(answer) == ["error"]
        assert answer["error"]
        assert "\n" not in answer["error"]
    assert server.predict(as_png(1), "image/png")[0] == 200


def test_what_is_not_there_is_said(server: Server) -> None:
    assert server.get("/nothing")[0] == 404
    assert server.get("/predict")[0] == 405
    assert server.get("/healthz") == (200, {"status": "alive"})


def test_it_serves_again_after_it_was_killed(folder: Path) -> None:
    first = Server(folder)
    assert first.predict(as_png(2), "image/png")[0] == 200
    first.stop(signal.SIGKILL)
    second = Server(folder)
    assert second.predict(as_png(2), "image/png")[0] == 200
    second.stop()


def test_a_request_that_has_begun_is_answered_before_the_server_stops(folder: Path) -> None:
    server = Server(folder)
    body = as_png(3)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:50])
    time.sleep(0.5)  # it has begun
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    connection.send(body[50:])
    assert connection.getresponse().status == 200
    connection.close()
    assert server.stop() == -signal.SIGTERM  # the signal itself, once all is answered


@pytest.mark.parametrize(
    "words", [("--port", "99999"), ("--threads", "0"), ("--max-batch", "-1"), ("--max-batch", "x")]
)
def test_a_setting_out_of_range_is_one_line(folder: Path, words: tuple[str, str]) -> None:
    command = [sys.executable, str(APP), str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"argument {words[0]}: must be from" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_bundle_is_not_served(folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    with (changed / "model.onnx").open("ab") as file:
        file.write(b"\0")
    command = [sys.executable, str(APP), str(changed), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr
