"""A device profile: what the parts of a model take on one device, and what a plan takes by it."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsm_tune.errors import PlanError, ProfileError, nearest
from dsm_tune.plan import Geometry, MergePlan, Step

__all__ = ["FORMAT", "DeviceProfile", "fingerprint_of"]

FORMAT = "dsm_tune.profile/1"
PARTS = ("attention", "attention_sized", "mlp", "merge_k", "head")


def fingerprint_of(facts: Any) -> str:
    """Sixteen hexadecimal digits of anything that JSON can say."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class DeviceProfile:
    """Times of the parts of a model, on a grid of token counts.

    Attributes:
        device: what was measured: ``name``, ``torch``, ``threads`` … (strings and numbers).
        geometry: of the model; its name and weights do not matter.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        batch_size: images per forward.
        runtime: ``eager``, ``onnx`` or ``cudagraphs``.
        tokens: ascending token counts at which the parts were timed.
        parts: milliseconds of each part at these counts: ``block`` (of the dense model, where its
            blocks run otherwise than those of a plan), ``attention`` (half of a block),
            ``attention_sized`` (the same with token sizes), ``mlp``, ``prefix_block`` (a last
            block for prefix tokens only), ``stem`` and ``head`` (at every count the same), and
            what a step adds: ``merge_<feature>``, ``local``, ``salience_<attention>``,
            ``size_penalty``, ``norm``, ``prune_<score>``.
        scale: factor that brings the sum of the parts to whole forwards.
        error: relative error of predictions, as found on plans that were measured whole.
    """

    device: dict[str, Any]
    geometry: Geometry
    dtype: str
    batch_size: int
    runtime: str
    tokens: tuple[int, ...]
    parts: dict[str, tuple[float, ...]]
    scale: float = 1.0
    error: float = 0.0

    def __post_init__(self) -> None:
        counts = list(self.tokens)
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        if not counts or not whole or counts != sorted(set(counts)):
            raise ProfileError(f"tokens must be ascending counts, but got {counts!r:.80}")
        if not isinstance(self.device, dict):
            raise ProfileError(f"device must be a JSON object, but got {self.device!r:.80}")
        for name, low in [("scale", 1e-6), ("error", 0.0)]:
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or not low <= number < 1e6:
                raise ProfileError(f"{name} must be a number from {low:g}, but got {number!r:.80}")
        for name in PARTS:
            if name not in self.parts:
                raise ProfileError(
                    f"parts must hold {name}, but has {', '.join(self.parts)!r:.120}"
                )
        for name, times in self.parts.items():
            numbers = [isinstance(t, (int, float)) and 0 <= t < 1e9 for t in times]
            if len(times) != len(counts) or not all(numbers):
                raise ProfileError(
                    f"parts.{name} must hold {len(counts)} times >= 0, but got {times!r:.80}"
                )

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of device, geometry, dtype, batch size and runtime."""
        return fingerprint_of(
            [
                self.device,
                dataclasses.asdict(self.geometry),
                self.dtype,
                self.batch_size,
                self.runtime,
            ]
        )

    def check(self, geometry: Geometry, dtype: str, batch_size: int, runtime: str) -> None:
        """Refuse a model or setting that the profile was not made for.

        Raises:
            ProfileError: naming what differs.
        """
        for name, mine, asked in [
            ("geometry", self.geometry, geometry),
            ("dtype", self.dtype, dtype),
            ("batch size", self.batch_size, batch_size),
            ("runtime", self.runtime, runtime),
        ]:
            if mine != asked:
                raise ProfileError(
                    f"the device profile was made for the {name} {mine}, but got {asked}"
                )

    def predict(self, plan: MergePlan) -> float:
        """Milliseconds of one forward under a plan.

        Raises:
            PlanError: if the plan is for another geometry.
        """
        if plan.geometry != self.geometry:
            raise PlanError(f"the profile is for {self.geometry}, but the plan for {plan.geometry}")
        steps = {step.block: step for step in plan.active_steps}
        total, sized = self._at("stem", plan.tokens[0]) + self._at("head", plan.tokens[0]), False
        if plan.is_dense and "block" in self.parts:
            return (total + plan.geometry.depth * self._at("block", plan.tokens[0])) * self.scale
        for block in range(plan.geometry.depth):
            before, after = plan.tokens[block], plan.tokens[block + 1]
            weighted = sized and plan.proportional_attention
            if plan.last_block == "prefix" and block == plan.geometry.depth - 1:
                total += self._at("prefix_block", before)
                continue
            total += self._at("attention_sized" if weighted else "attention", before)
            if block in steps:
                total += self._step(plan, steps[block], before)
                sized = sized or steps[block].kind != "prune"
            total += self._at("mlp", after)
        return total * self.scale

    def _step(self, plan: MergePlan, step: Step, count: int) -> float:
        matching = plan.matching
        if step.kind != "merge":
            score = matching.prune_score
            if score == "ats" and "prune_ats" not in self.parts:  # of a profile that is older
                score = "class"
            total = self._at(f"prune_{score}", count)
            return total + (self._at("fuse", count) if step.kind == "fuse" else 0.0)
        total = self._at(f"merge_{matching.feature}", count)
        if step.window is not None:
            total += self._at("local", count)
        if matching.needs_attention:
            total += self._at(f"salience_{matching.attention}", count)
        if matching.norm != "free":
            total += self._at("norm", count)
        if matching.size_penalty:
            total += self._at("size_penalty", count)
        return total

    def _at(self, part: str, count: int) -> float:
        """Time of a part at a token count, linear between the counts of the grid."""
        times = self.parts.get(part, self.parts["merge_k"] if part.startswith("merge_") else None)
        if times is None:
            return 0.0
        right = min(max(bisect.bisect_left(self.tokens, count), 1), len(self.tokens) - 1)
        if len(self.tokens) == 1:
            return times[0]
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (count - low) / (high - low)
        return max(times[right - 1] + share * (times[right] - times[right - 1]), 0.0)

    def to_json(self) -> str:
        """Return the profile as JSON that :meth:`from_json` reads back."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> DeviceProfile:
        """Read a profile.

        Raises:
            ProfileError: for anything that is not a valid profile of a known format.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"a device profile must be a JSON object, but: {error}") from None
        if not isinstance(body, Mapping) or body.get("format") != FORMAT:
            raise ProfileError(f"a device profile must be a JSON object of the format {FORMAT!r}")
        parts = {key: value for key, value in body.items() if key != "format"}
        known = [field.name for field in dataclasses.fields(cls)]
        for key in parts:
            if key not in known:
                raise ProfileError(
                    f"{key[:60]!r} is not a key of a profile{nearest(key[:60], known)}"
                )
        try:
            parts["geometry"] = Geometry(**parts["geometry"])
            parts["tokens"] = tuple(parts["tokens"])
            parts["parts"] = {name: tuple(times) for name, times in parts["parts"].items()}
            return cls(**parts)
        except (KeyError, TypeError, AttributeError, PlanError) as error:
            raise ProfileError(f"a device profile is malformed: {error}") from None

    @classmethod
    def load(cls, file: str | Path) -> DeviceProfile:
        """Read a profile from a file; raises :class:`ProfileError`."""
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ProfileError(f"--device-profile must be a readable file: {error}") from None
        return cls.from_json(text)
