"""A case: the small record from which every array of a test is made again.

Hypothesis draws cases, never arrays; a seeded NumPy generator makes the data. A failing case is a
JSON file that replays without Hypothesis and outlives edits of the suite.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One input of an operation, up to the bits.

    `sizes` gives every axis its length, `parameters` the plain arguments, `options` the optional
    arrays that are present; `values` and `layout` name how the data look and lie in memory.
    """

    operation: str
    sizes: Mapping[str, int]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    values: str = "normal"
    layout: str = "contiguous"
    dtype: str = "float32"
    seed: int = 0

    @property
    def heads(self) -> int:
        """Query heads: the group times the kv heads."""
        return self.sizes.get("kv_heads", 1) * self.sizes.get("group", 1)

    def shape(self, axes: str) -> tuple[int, ...]:
        """The shape of an array with the named axes; "4" is a literal length, "2*d" a product."""
        return tuple(self.size(axis) for axis in axes.split())

    def size(self, axis: str) -> int:
        if "*" in axis:
            return math.prod(self.size(factor) for factor in axis.split("*"))
        if axis == "heads":
            return self.heads
        return int(axis) if axis.isdigit() else self.sizes[axis]

    def generator(self, stream: str) -> np.random.Generator:
        """A generator of its own for each named array: adding one array changes no other."""
        digest = hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def with_(self, **changes: Any) -> Case:
        """A copy with fields replaced; `sizes` and `parameters` are merged into the old ones."""
        for name in ("sizes", "parameters"):
            if name in changes:
                changes[name] = {**getattr(self, name), **changes[name]}
        return replace(self, **changes)

    @property
    def key(self) -> str:
        """A short name that is equal for equal cases."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=6).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=_plain)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        return cls(**{**data, "options": tuple(data.get("options", ()))})

    def __str__(self) -> str:
        sizes = " ".join(f"{axis}={length}" for axis, length in self.sizes.items())
        rest = [f"{name}={value}" for name, value in self.parameters.items()]
        rest += [*self.options, f"values={self.values}"]
        if self.layout != "contiguous":
            rest.append(f"layout={self.layout}")
        return f"{sizes} {' '.join(rest)} {self.dtype} seed={self.seed}"


def _plain(value: Any) -> Any:
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return value.item()
    raise TypeError(f"case: got {type(value).__name__}, expected JSON values")


@dataclass(frozen=True)
class SavedCase:
    """A counterexample on disk: which kernel broke which law, on which case, and how."""

    kernel: str
    law: str
    case: Case
    message: str = ""
    version: str = ""

    def save(self, folder: Path) -> Path:
        """Write ``<kernel>-<law>-<key>.json`` below `folder` and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        safe = self.kernel.replace("/", "_").replace(" ", "_")
        path = folder / f"{safe}-{self.law}-{self.case.key}.json"
        data = {**asdict(self), "case": json.loads(self.case.to_json())}
        path.write_text(json.dumps(data, indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> SavedCase:
        data = json.loads(path.read_text())
        return cls(**{**data, "case": Case.from_dict(data["case"])})
