"""The wheel holds the three packages under one name, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("reference", "fast", "conformance")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, so that no stale build folder can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=IGNORED)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert top - {name for name in top if name.endswith(".dist-info")} == {"attnspec"}


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    expected = {
        f"attnspec/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "reference" / "_root")
    }
    assert packed == expected | {"attnspec/__init__.py"}


def test_data_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "attnspec/py.typed" in names
    for folder in ("data", "templates"):
        for path in (ROOT / "conformance" / folder).iterdir():
            if path.is_file():
                assert f"attnspec/conformance/{folder}/{path.name}" in names


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    points = ConfigParser()
    points.read_string(wheel.read(name).decode())
    assert points["console_scripts"]["attnspec"] == "attnspec.conformance.__main__:main"
    assert "fast" in points["attnspec.kernels"]


def test_the_core_needs_numpy_only(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert [r.split(">")[0] for r in required] == ["numpy"]


def test_the_package_list_is_the_folders() -> None:
    """`packages` in pyproject.toml is written by hand: a folder it lacks would not be installed."""
    folders = {
        "attnspec." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    folders = (folders - {"attnspec.reference._root"}) | {"attnspec"}
    folders |= {"attnspec.conformance.data", "attnspec.conformance.templates"}
    listed = project()["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(folders)


def test_every_python_folder_is_a_package() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            data = path.is_relative_to(ROOT / "conformance" / "data")
            assert data or (path.parent / "__init__.py").exists(), path


def test_every_pinned_version_is_exact() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert all("==" in pin for pin in pins)
