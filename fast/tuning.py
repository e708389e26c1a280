"""Which launch configuration a kernel runs with: a checked-in default, or a table tuned on a GPU.

Every engine with Triton kernels has a `Table` in its ``configs.py``: for each key (a kernel, a head
size, a kind of numbers) the candidates worth trying, the one in force first. The defaults for
16-bit numbers were chosen on H100 and H200; a key that says "other" is what other GPUs run, with
tiles for less shared memory, and one that says "32-bit" is float32 on all of them. Engines that
need no such distinction have one key for every GPU.

``attnspec tune`` times the candidates on the GPU at hand and writes the best of each key to a file,
which `load` or the environment variable ``ATTNSPEC_TABLE`` puts in force. No call is ever timed to
decide anything: a choice is a look-up in a dict, which waits for nothing, gives the same answer in
every process and is safe while a graph is captured.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from attnspec.fast import engines

VARIABLE = "ATTNSPEC_TABLE"
LARGE_MEMORY = (90, 100, 103)
"""Architectures whose multiprocessors have at least Hopper's shared memory."""

Config = TypeVar("Config")
Key = tuple[str | int, ...]

_tables: dict[str, Table[Any]] = {}
_watching: list[set[str]] = []
_version = 0
_unread = bool(os.environ.get(VARIABLE))


class Table(Generic[Config]):
    """Candidates of an engine by key, the default first, and the choice in force for each.

    `kinds` names the engine's kernels if each has keys of its own, whose first word it then is.
    """

    def __init__(
        self,
        engine: str,
        candidates: Mapping[Key, Sequence[Config]],
        kinds: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.kinds = tuple(kinds)
        self.candidates = {key: tuple(dict.fromkeys(each)) for key, each in candidates.items()}
        self.names = {key: " ".join(map(str, (engine, *key))) for key in candidates}
        self.chosen: dict[Key, Config] = {}
        self._forced: list[Mapping[str, Config]] = []
        self.reset()
        _tables[engine] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """Other processes get their own table of the engine: a copy would be in force nowhere."""
        return table_of, (self.engine,)

    def reset(self) -> None:
        """Put the defaults in force."""
        self.chosen = {key: each[0] for key, each in self.candidates.items()}

    def choose(self, *key: str | int) -> Config:
        """The configuration in force for a key, unless `use` forces another."""
        if _unread:
            load(os.environ[VARIABLE])
        for asked in _watching:
            asked.add(self.names[key])
        return self.chosen[key]

    def forced(self, kind: str = "") -> Config | None:
        """What the innermost `use` forces for a kernel, if anything."""
        if not self._forced:
            return None
        innermost = self._forced[-1]
        return innermost.get(kind, innermost.get(""))

    def state(self) -> Hashable:
        """What plans of calls that are kept depend on: another state, another plan."""
        if not self._forced:
            return _version
        return _version, *map(self.forced, self.kinds or ("",))

    @contextmanager
    def use(self, everywhere: Config | None = None, /, **kernels: Config) -> Iterator[None]:
        """Run every call of the engine inside the block with a configuration of the caller's: one
        for all its kernels, or by kernel where they have keys of their own.
        """
        unknown = set(kernels) - set(self.kinds)
        if unknown:
            raise ValueError(f"use_config: got {sorted(unknown)}, expected some of {self.kinds}")
        self._forced.append(kernels if everywhere is None else {"": everywhere, **kernels})
        try:
            yield
        finally:
            self._forced.pop()


def place(arch: int, element_size: int, width: int) -> Key:
    """Last words of a key of kernels on tiles of queries and keys, for a head size padded to
    `width`: the size alone on GPUs with as much shared memory as Hopper, or behind "other" on those
    with less, or behind "32-bit".
    """
    if element_size == 4:
        return "32-bit", max(width, 128)
    return (max(width, 64),) if arch in LARGE_MEMORY else ("other", max(width, 128))


def places(
    candidates: Mapping[Key, Sequence[Config]],
    other: Mapping[int, Config],
    single: Mapping[int, Config],
) -> dict[Key, tuple[Config, ...]]:
    """The candidates of kernels for every `place`: those for Hopper, by kernel and head size, and
    those around a default, with other warps and stages. "other" tries Hopper's too: what does not
    fit is refused when it is compiled.
    """
    found = {key: tuple(each) for key, each in candidates.items()}
    for kernel in dict.fromkeys(key[:-1] for key in candidates):
        for word, defaults in (("other", other), ("32-bit", single)):
            for width, default in defaults.items():
                around: list[Any] = [
                    replace(default, warps=warps, stages=stages)  # type: ignore[type-var]
                    for warps in (4, 8)
                    for stages in (1, 2, 3)
                ]
                more = candidates[(*kernel, width)] if word == "other" else ()
                found[(*kernel, word, width)] = (default, *around, *more)
    return found


def table_of(engine: str) -> Table[Any]:
    """The table of an engine; ValueError if there is no such engine, or it has none."""
    if engine not in _tables and engine in {x.name for x in pkgutil.iter_modules(engines.__path__)}:
        path = f"{engines.__name__}.{engine}.configs"
        try:
            importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name not in (path, path.rpartition(".")[0]):
                raise
    if engine not in _tables:
        raise ValueError(f"engine: got {engine!r}, which has no configurations")
    return _tables[engine]


def find(name: str) -> tuple[Table[Any], Key]:
    """Table and key of ``engine key``, as tables on disk name them."""
    table = table_of(name.partition(" ")[0])
    for key, known in table.names.items():
        if known == name:
            return table, key
    raise ValueError(f"key: got {name!r}, expected one of: {', '.join(table.names.values())}")


def candidate(name: str, fields: Any) -> Any:
    """The candidate of a key that has exactly these fields."""
    table, key = find(name)
    for config in table.candidates[key]:
        if asdict(config) == fields:
            return config
    count = len(table.candidates[key])
    raise ValueError(f"{name}: got {fields}, expected one of its {count} candidates")


def load(path: str | os.PathLike[str]) -> None:
    """Put a table that ``attnspec tune --json`` wrote in force, in place of any other.

    Best before the first call: compiled and captured graphs keep what they were made with, and a
    gradient must run under the table of its forward pass. ValueError, and nothing changes, if the
    table was made on a GPU of another compute capability than the current one, or if it names a key
    or a configuration that this version does not have: then tune again.
    """
    try:
        data = json.loads(Path(path).read_text())
        made_on, choices = data["capability"], dict(data["choices"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected a table of attnspec tune ({error!r})") from None
    if made_on != (here := capability()):
        raise ValueError(
            f"{path}: got a table for compute capability {made_on}, expected {here}, as this "
            "device has: run attnspec tune here"
        )
    found = []
    for name, fields in choices.items():
        try:
            found.append((*find(name), candidate(name, fields)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; run attnspec tune again") from None
    reset()
    for table, key, config in found:
        table.chosen[key] = config


def reset() -> None:
    """Put the checked-in defaults in force, whatever the environment says."""
    global _unread
    _unread = False
    for table in _tables.values():
        table.reset()
    _renew()


def capability() -> str | None:
    """Compute capability of the current GPU, "9.0" for an H100; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "{}.{}".format(*torch.cuda.get_device_capability())


def _renew() -> None:
    """Plans of calls that are kept must be made anew."""
    global _version
    _version += 1


class Tuner:
    """The tables as ``attnspec tune`` sees them: keys by name, candidates as plain data."""

    @contextmanager
    def watch(self) -> Iterator[set[str]]:
        """The keys that calls inside the block ask for."""
        asked: set[str] = set()
        _renew()
        _watching.append(asked)
        try:
            yield asked
        finally:
            _watching.remove(asked)

    def candidates(self, key: str) -> Sequence[Mapping[str, Any]]:
        """The configurations worth trying for a key, the one in force first."""
        table, place = find(key)
        in_force = table.chosen[place]
        return [asdict(each) for each in dict.fromkeys((in_force, *table.candidates[place]))]

    @contextmanager
    def force(self, key: str, fields: Mapping[str, Any]) -> Iterator[None]:
        """Run calls inside the block with one of the candidates of a key."""
        table, place = find(key)
        before, table.chosen[place] = table.chosen[place], candidate(key, fields)
        _renew()
        try:
            yield
        finally:
            table.chosen[place] = before
            _renew()
