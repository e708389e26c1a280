"""Who may import whom, seen in fresh processes and in the source."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

WALK = """
import importlib, json, pkgutil, sys
{before}
known = set(sys.modules)
{body}
names = {{name for name in sys.modules if not name.startswith("__editable__")}}
print(json.dumps([sorted(names), sorted(names - known)]))
"""

IMPORT_ALL = """
package = importlib.import_module({name!r})
for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(info.name)
"""


def loaded(body: str, tmp_path: Path, before: str = "") -> tuple[set[str], set[str]]:
    """Modules of a fresh process after `body`: all of them, and those that `before` had not."""
    script = WALK.format(before=before, body=body)
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    every, new = json.loads(done.stdout)
    return set(every), set(new)


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_reference_needs_numpy_only(tmp_path: Path) -> None:
    body = IMPORT_ALL.format(name="attnspec.reference")
    every, new = loaded(body, tmp_path, before="import numpy, numpy.linalg, numpy.random")
    foreign = roots(new) - set(sys.stdlib_module_names) - {"attnspec", "numpy"}
    assert not foreign
    assert not {name for name in every if name.startswith(("attnspec.fast", "attnspec.conf"))}


def test_importing_fast_imports_no_framework(tmp_path: Path) -> None:
    every, _ = loaded("import attnspec.fast", tmp_path)
    assert not roots(every) & {"torch", "triton", "numba", "numpy"}


def test_fast_mechanisms_are_lazy(tmp_path: Path) -> None:
    """Kernels are compiled by the backend that runs them, so neither is imported before a call."""
    body = """
from attnspec.fast import mechanism_modules
for path in mechanism_modules().values():
    importlib.import_module(path)
"""
    every, new = loaded(body, tmp_path, before="import torch")
    assert not roots(new) & {"triton", "numba"}
    assert not {name for name in every if name.startswith("attnspec.reference")}


def test_the_suite_never_imports_the_kernels(tmp_path: Path) -> None:
    every, _ = loaded(IMPORT_ALL.format(name="attnspec.conformance"), tmp_path)
    assert not {name for name in every if name.startswith("attnspec.fast")}
    assert not roots(every) & {"torch", "triton", "numba", "pytest"}


def test_no_second_copy_of_a_module() -> None:
    """Pytest must not import a package by its folder's name: its registry would exist twice."""
    assert not {"reference", "fast", "conformance"} & set(sys.modules)


ALLOWED = {
    "reference": {"attnspec.reference", "numpy"},
    "fast": {
        "attnspec.fast",
        "numpy",
        "torch",
        "triton",
        "numba",
        "llvmlite",
        "transformers",
        "scipy",
    },
    "conformance": {
        "attnspec.reference",
        "attnspec.conformance",
        "numpy",
        "torch",
        "triton",
        "hypothesis",
        "typer",
        "rich",
        "jinja2",
    },
}


def imports(path: Path) -> set[str]:
    """Absolute names a file imports anywhere in it; a relative import counts as "."."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." if node.level else str(node.module)
            found |= {f"{base}.{a.name}" for a in node.names} if base == "attnspec" else {base}
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_in_the_source(folder: str) -> None:
    """Late imports count too, but for the libraries that benchmarks are run against.

    fast/kernels.py makes the claims, so it may name the suite's records; the scripts in
    conformance/data recorded its arrays and are no modules.
    """
    for path in sorted((ROOT / folder).rglob("*.py")):
        allowed = set(ALLOWED[folder])
        if path.parent == ROOT / "conformance" / "data":
            continue
        if path == ROOT / "fast" / "kernels.py":
            allowed.add("attnspec.conformance")
        for name in imports(path):
            root = name.partition(".")[0]
            if path.stem.endswith("_speed") and root != "attnspec":
                continue
            mine = ".".join(name.split(".")[:2]) if root == "attnspec" else root
            assert root in sys.stdlib_module_names or mine in allowed, f"{path}: {name}"
