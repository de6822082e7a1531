"""What the serving example answers per second, by the most images that it runs together.

Serves an exported bundle with ``--max-batch`` 1 and larger, in turn, and asks each with as many
clients at once. Prints requests per second and the median and 95th percentile of their times.
"""

from __future__ import annotations

import argparse
import http.client
import io
import os
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, most: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start a server and wait until it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, str(ROOT / "deploy" / "serve" / "app.py"), str(folder)]
    command += ["--port", f"{port}", "--max-batch", f"{most}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return process, port
        except OSError:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit("the server does not start")


def ask(port: int, body: bytes, clients: int, seconds: float) -> list[float]:
    """Seconds of each request of some clients, each of which asks again when it is answered."""
    end = time.monotonic() + seconds

    def client(number: int) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        taken = []
        while time.monotonic() < end:
            first = time.perf_counter()
            connection.request("POST", "/predict", body, {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            taken.append(time.perf_counter() - first)
        return taken

    with ThreadPoolExecutor(clients) as pool:
        return [one for found in pool.map(client, range(clients)) for one in found]


def main() -> int:
    """Print a line per setting and round."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--batches", default="1,8")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=5.0)
    chosen = options.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    found: dict[int, list[float]] = {int(most): [] for most in chosen.batches.split(",")}
    servers = {most: start(chosen.bundle, most) for most in found}
    try:
        for _ in range(chosen.rounds):
            for most, (_, port) in servers.items():
                taken = ask(port, file.getvalue(), chosen.clients, chosen.seconds)
                found[most].append(len(taken) / chosen.seconds)
                slow = statistics.quantiles(taken, n=20)[-1]
                print(
                    f"max-batch {most}: {found[most][-1]:.0f} per second, median "
                    f"{statistics.median(taken) * 1e3:.0f} ms, 95 % within {slow * 1e3:.0f} ms"
                )
    finally:
        for process, _ in servers.values():
            process.terminate()
            process.wait()
    for most, rates in found.items():
        print(f"max-batch {most}: median {statistics.median(rates):.0f} per second")
    return 0


if __name__ == "__main__":
    sys.exit(main())
