"""Fixtures of the reference's own tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "golden"


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """Load the arrays of tests/golden/<name>.npz, with its `meta` as a dictionary."""

    def load(name: str) -> dict[str, Any]:
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
            case: dict[str, Any] = dict(file)
        case["meta"] = json.loads(str(case["meta"]))
        return case

    return load
