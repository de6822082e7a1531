"""The manifest of a bundle: what it is, and the SHA-256 of each of its files, and of itself.

Nothing of a bundle is used before its bytes are those that the manifest names. That finds damage
and mistakes; it is no signature: who can write the folder can write another bundle.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsm_tune.errors import BundleError, shown
from dsm_tune.exporting.folders import holds_only

__all__ = [
    "FORMAT",
    "MANIFEST",
    "OPTIONAL",
    "REQUIRED",
    "Manifest",
    "digest_of",
    "is_bundle",
    "read_files",
]

FORMAT = "dsm_tune.bundle/1"
MANIFEST = "manifest.json"
REQUIRED = ("card.md", "model.safetensors", "plan.json", "preprocess.json", "probes.safetensors")
OPTIONAL = ("model.onnx", "model.pt2")
LARGEST_MANIFEST = 1 << 20  # bytes
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        model: ``name`` and ``kwargs`` that make its architecture.
        dtype: of the weights.
        tolerance: by how much outputs may differ from those stored, relative to the largest.
        made: versions, device, budget, study, run and figures, as they were when it was made.
        files: SHA-256 by name.
    """

    model: Mapping[str, Any]
    dtype: str
    tolerance: float
    made: Mapping[str, Any]
    files: Mapping[str, str]

    def to_json(self) -> str:
        """The file: sorted, with the digest of all the rest; the same text each time."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        whole = {**body, "sha256": digest_of(_canonical(body).encode())}
        return _canonical(whole)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            BundleError: if there is none, or it is damaged or of another format.
        """
        with _regular(folder, MANIFEST).open("rb") as file:
            content = file.read(LARGEST_MANIFEST + 1)
        where = f"{folder / MANIFEST}"
        try:
            body = json.loads(content, parse_constant=_no_number)
            body = body if len(content) <= LARGEST_MANIFEST else None
        except (ValueError, RecursionError):
            body = None
        if not isinstance(body, dict):
            raise BundleError(f"{where}: a manifest must be JSON of at most 1 MiB, and is not")
        if body.get("format") != FORMAT:
            raise BundleError(
                f"{where}: the format must be {FORMAT}, but got {shown(body.get('format'))}; "
                "a newer dsm-tune may read it"
            )
        fields = {field.name for field in dataclasses.fields(cls)}
        if body.keys() != {"format", "sha256", *fields}:
            raise BundleError(f"{where}: its keys must be those of {FORMAT}, but got {shown(body)}")
        found = cls(**{name: body[name] for name in fields})
        problem = found._problem()
        if problem:
            raise BundleError(f"{where}: {problem}")
        try:
            is_same = found.to_json().encode() == content
        except (ValueError, RecursionError):  # a number beyond all numbers
            is_same = False
        if not is_same:
            raise BundleError(f"{where}: the manifest has been changed since it was written")
        return found

    def _problem(self) -> str:
        """The first rule that is broken, or ``""``."""
        name = self.model.get("name") if isinstance(self.model, dict) else None
        kwargs = self.model.get("kwargs") if isinstance(self.model, dict) else None
        if not isinstance(name, str) or not isinstance(kwargs, dict):
            return f"model must have a name and kwargs, but got {shown(self.model)}"
        if not isinstance(self.tolerance, float) or not 0 <= self.tolerance < 1:
            return f"tolerance must be from 0 to below 1, but got {shown(self.tolerance)}"
        if not isinstance(self.made, dict) or not isinstance(self.dtype, str):
            return "made must be an object and dtype a name"
        if not isinstance(self.files, dict) or not set(REQUIRED) <= self.files.keys():
            return f"files must name {', '.join(REQUIRED)}"
        for file, digest in self.files.items():
            if file not in (*REQUIRED, *OPTIONAL):
                return f"{shown(file)} is no file of a bundle"
            if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                return f"the SHA-256 of {file} must have 64 hexadecimal digits"
        return ""


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a bundle, sound or damaged, and nothing else."""
    if not holds_only(folder, MANIFEST, (MANIFEST, *REQUIRED, *OPTIONAL)):
        return False
    with (folder / MANIFEST).open("rb") as file:
        return b'"dsm_tune.bundle/' in file.read(LARGEST_MANIFEST)


def read_files(folder: Path, manifest: Manifest, wanted: Collection[str]) -> dict[str, bytes]:
    """Compare every file of a bundle with its manifest, and return the content of some.

    What is returned is what was compared: a file that changes meanwhile changes nothing.

    Args:
        folder: of the bundle.
        manifest: of this folder.
        wanted: names of files to return; absent ones are left out.

    Raises:
        BundleError: if a file is absent, no regular file, or another than the manifest names.
    """
    found: dict[str, bytes] = {}
    for name, digest in sorted(manifest.files.items()):
        path, seen = _regular(folder, name), hashlib.sha256()
        parts = []
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                seen.update(chunk)
                if name in wanted:
                    parts.append(chunk)
        if seen.hexdigest() != digest:
            raise BundleError(f"{path}: it has been changed since the bundle was written")
        if name in wanted:
            found[name] = b"".join(parts)
    return found


def digest_of(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _regular(folder: Path, name: str) -> Path:
    """A file of the folder itself, no link."""
    path = folder / name
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise BundleError(f"{path}: a bundle needs this file: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path}: it must be a regular file, not a link or anything else")
    return path


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n"
