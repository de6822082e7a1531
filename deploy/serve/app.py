"""Serves an exported bundle over HTTP: ONNX Runtime behind a small ASGI application.

    python app.py BUNDLE --port 8080

    POST /predict   an image (jpeg, png, webp, bmp), or JSON {"pixels": [3][H][W]}, normalised
    GET  /healthz   200 while the process lives
    GET  /readyz    200 when requests are answered

Requests that wait are run together, up to --max-batch at a time; none waits for others to come.
Every refusal is one line of JSON, {"error": …}, with a status of 4xx or 503; a failure is 500.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import warnings
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dsm_tune.errors import DsmTuneError
from dsm_tune.exporting.manifest import Manifest, read_files
from dsm_tune.exporting.preprocessing import read_preprocessing

MOST_BYTES = 16 << 20  # of a request
MOST_PIXELS = 50_000_000  # of an image
BODY_SECONDS = 30.0  # that a request may take to arrive
MOST_WAITING = 256  # requests; further ones are told to come again
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
IMAGES = tuple(f"image/{name.lower()}" for name in FORMATS)
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Pixels = np.ndarray[Any, np.dtype[np.float32]]


class Model:
    """The model of a bundle, and its own transform.

    Args:
        folder: a bundle with ``model.onnx``; nothing of it is used before its hashes agree.
        threads: of one forward.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        found = read_files(folder, Manifest.read(folder), ("model.onnx", "preprocess.json"))
        if "model.onnx" not in found:
            raise SystemExit(f"{folder} has no model.onnx; `dsm-tune export … --to onnx` adds it")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that spin for work take the cores from those that decode the next images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(
                found["model.onnx"], options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no base of their own
            raise SystemExit(f"error: {folder}/model.onnx cannot be run: {error}") from None
        self.numbers = read_preprocessing(found["preprocess.json"])
        self.shape = tuple(self.numbers["input_size"])
        if self.numbers["crop_mode"] not in ("center", "squash"):
            raise SystemExit(f"the crop mode {self.numbers['crop_mode']} is not served here")
        self.run(np.zeros((1, *self.shape), np.float32))

    def run(self, pixels: Pixels) -> Pixels:
        """[B, 3, H, W] to logits [B, classes]."""
        found: Pixels = self.session.run(None, {"pixels": pixels})[0]
        return found

    def pixels_of(self, content: bytes) -> Pixels:
        """Decode an image and transform it as the model wants it: [3, H, W]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                    if opened.width * opened.height > MOST_PIXELS:
                        raise HTTPException(413, f"an image must have at most {MOST_PIXELS} pixels")
                    image = opened.convert("RGB")
            except HTTPException:
                raise
            except Exception:  # Pillow raises many kinds for what is no image
                raise HTTPException(
                    400, f"the body must be an image: {', '.join(FORMATS)}"
                ) from None
        _, height, width = self.shape
        image = self._resized(image, height, width)
        left = round((image.width - width) / 2.0)
        top = round((image.height - height) / 2.0)
        image = image.crop((left, top, left + width, top + height))
        scaled = np.asarray(image, np.float32) / np.float32(255)
        mean, std = (np.asarray(self.numbers[name], np.float32) for name in ("mean", "std"))
        return ((scaled - mean) / std).transpose(2, 0, 1)

    def _resized(self, image: Image.Image, height: int, width: int) -> Image.Image:
        share = self.numbers["crop_pct"]
        sides = [int(side / share) for side in (height, width)]
        kind = FILTERS.get(self.numbers["interpolation"], Image.Resampling.BICUBIC)
        if self.numbers["crop_mode"] == "squash" or height != width:
            return image.resize((sides[1], sides[0]), kind)
        short, long = sorted(image.size)
        scaled = sides[0], int(sides[0] * long / short)
        if scaled[0] * scaled[1] > MOST_PIXELS:
            raise HTTPException(413, "an image must not be so much longer than it is wide")
        return image.resize(scaled if image.width <= image.height else scaled[::-1], kind)

    def array_of(self, content: bytes) -> Pixels:
        """Read JSON pixels: [3, H, W]."""
        try:
            pixels = np.asarray(json.loads(content)["pixels"], np.float32)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            pixels = np.empty(0, np.float32)
        if pixels.shape != self.shape or not np.isfinite(pixels).all():
            wanted = "x".join(map(str, self.shape))
            raise HTTPException(400, f'the body must be {{"pixels": {wanted} finite numbers}}')
        return pixels


class Batcher:
    """Runs requests that wait together.

    Args:
        model: runs them.
        most: images in one forward.
    """

    def __init__(self, model: Model, most: int) -> None:
        self.model, self.most = model, most
        self.queue: asyncio.Queue[tuple[Pixels, asyncio.Future[Pixels]]] = asyncio.Queue()
        self.is_ready = False

    async def logits_of(self, pixels: Pixels) -> Pixels:
        """Wait for one image's logits."""
        if not self.is_ready or self.queue.qsize() >= MOST_WAITING:
            raise HTTPException(503, "too many requests wait; try again", {"Retry-After": "1"})
        future: asyncio.Future[Pixels] = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((pixels, future))
        return await future

    async def work(self) -> None:
        """Take what waits, run it, answer; for ever."""
        self.is_ready = True
        while True:
            taken = [await self.queue.get()]
            while len(taken) < self.most and not self.queue.empty():
                taken.append(self.queue.get_nowait())
            batch = np.stack([pixels for pixels, _ in taken])
            try:
                found = await asyncio.to_thread(self.model.run, batch)
            except Exception as error:
                for _, future in taken:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), logits in zip(taken, found, strict=True):
                if not future.done():  # its client may have gone
                    future.set_result(logits)


async def _body(request: Request) -> bytes:
    """The body, of bounded length."""
    parts, length = [], 0
    too_long = HTTPException(413, f"a request must have at most {MOST_BYTES} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > MOST_BYTES:
        raise too_long
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                length += len(part)
                if length > MOST_BYTES:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"a request must arrive within {BODY_SECONDS:g} s") from None
    return b"".join(parts)


def _answer(logits: Pixels) -> dict[str, Any]:
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-logits, kind="stable")[:5]
    top = [{"class": int(i), "probability": float(shares[i])} for i in best]
    return {"class": top[0]["class"], "top": top}


def application(folder: Path, threads: int, most: int) -> Starlette:
    """The ASGI application that serves a bundle."""
    model = Model(folder, threads)
    batcher = Batcher(model, most)

    async def predict(request: Request) -> JSONResponse:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind not in (*IMAGES, "application/json"):
            wanted = ", ".join((*IMAGES, "application/json"))
            raise HTTPException(415, f"the content type must be one of {wanted}")
        content = await _body(request)
        read = model.array_of if kind == "application/json" else model.pixels_of
        pixels = await asyncio.to_thread(read, content)
        return JSONResponse(_answer(await batcher.logits_of(pixels)))

    async def alive(request: Request) -> JSONResponse:
        return JSONResponse({"status": "alive"})

    async def ready(request: Request) -> JSONResponse:
        status = "ready" if batcher.is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if batcher.is_ready else 503)

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": "the server failed on this request"}, 500)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        try:
            yield
        finally:
            batcher.is_ready = False
            worker.cancel()

    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/healthz", alive),
            Route("/readyz", ready),
        ],
        exception_handlers={HTTPException: refuse, Exception: fail},
        lifespan=lifespan,
    )


def _within(low: int, high: int) -> Callable[[str], int]:
    """What reads a whole number of a range."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text[:9]) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, but got {text!r:.40}")
        return int(text)

    return read


def main() -> None:
    """Serve until a signal comes; requests that have begun are answered."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("bundle", type=Path, help="folder of `dsm-tune export --to onnx`")
    options.add_argument("--host", default="127.0.0.1", help="[127.0.0.1: this machine only]")
    options.add_argument("--port", type=_within(0, 65535), default=8080)
    options.add_argument("--threads", type=_within(1, 1024), default=os.cpu_count() or 1)
    options.add_argument("--max-batch", type=_within(1, 1024), default=8)
    chosen = options.parse_args()
    try:
        app = application(chosen.bundle, chosen.threads, chosen.max_batch)
    except DsmTuneError as error:
        raise SystemExit(f"error: {error}") from None
    uvicorn.run(
        app, host=chosen.host, port=chosen.port, timeout_graceful_shutdown=10, access_log=False
    )


if __name__ == "__main__":
    main()
