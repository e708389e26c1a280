"""Tables of launch configurations: what is in force, what a file may change, what it may not."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from attnspec.fast import tuning
from attnspec.fast.engines.flash import configs as flash
from attnspec.fast.engines.flash.rules import Rules
from attnspec.fast.engines.rows.configs import CANDIDATES, RowsConfig, config, use_config

ENGINES = Path(tuning.engines.__path__[0])
TABLED = sorted(path.parent.name for path in ENGINES.glob("*/configs.py"))
KEY = "rows all"


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    tuning.reset()
    yield
    tuning.reset()


def write(path: Path, choices: Any, capability: str | None = None) -> Path:
    path.write_text(json.dumps({"capability": capability, "gpu": "a GPU", "choices": choices}))
    return path


@pytest.mark.parametrize("engine", TABLED)
def test_every_candidate_is_found_again_from_json(engine: str) -> None:
    table = tuning.table_of(engine)
    assert table.engine == engine
    for key, name in table.names.items():
        assert tuning.find(name) == (table, key)
        assert table.choose(*key) == table.candidates[key][0]
        for each in table.candidates[key]:
            assert tuning.candidate(name, json.loads(json.dumps(asdict(each)))) == each


def test_use_goes_before_the_table() -> None:
    with use_config(CANDIDATES[2]):
        with use_config(CANDIDATES[3]):
            assert config() == CANDIDATES[3]
        assert config() == CANDIDATES[2]
    assert config() == CANDIDATES[0]


def test_use_by_kernel() -> None:
    forced = flash.FlashConfig(16, 16, 1, 1)
    plain = flash.config("dq", "long", 90, 2, 64, 4096)
    with flash.use_config(forward=forced):
        assert flash.config("forward", "short", 80, 4, 64, 4) == forced
        assert flash.config("dq", "long", 90, 2, 64, 4096) == plain
    with flash.use_config(forced):
        assert flash.config("dq", "long", 90, 2, 64, 4096) == forced
    with pytest.raises(ValueError, match=r"use_config: got \['up'\], expected some of \('forward"):
        flash.use_config(up=forced).__enter__()


@pytest.mark.parametrize(
    ("options", "q_tokens", "walk"),
    [
        ({}, 2048, "long"),
        ({}, 4096, "medium"),
        ({}, 16384, "long"),
        ({"q_offsets": torch.zeros(9)}, 16384, "brief"),
        ({"q_offsets": torch.zeros(9)}, 16385, "long"),
        ({"window": 64}, 16384, "short"),
        ({"window": 64, "row_start": torch.zeros(1)}, 16384, "long"),
        ({"q_block": 64, "k_block": 128}, 16384, "short"),
        ({"q_block": 128, "k_block": 128}, 16384, "medium"),
        ({"q_block": 128, "k_block": 64}, 16384, "long"),
    ],
)
def test_the_rules_say_how_long_a_walk_is(
    options: dict[str, Any], q_tokens: int, walk: str
) -> None:
    rules = Rules(*[None] * len(Rules._fields))._replace(**options)  # type: ignore[arg-type]
    assert rules.walk(q_tokens) == walk


def test_only_a_specialised_walk_is_that() -> None:
    forced, given = flash.SPECIALISED[0], flash.config("forward", "long", 90, 2, 64, 4096)
    assert not flash.specialises("forward", 4096, 4 * 4096)
    assert flash.specialises("forward", 4096, 5 * 4096)
    assert not flash.specialises("dq", 4096, 32 * 4096)
    assert not flash.specialises("forward", 64, 64 * 9999)
    with flash.use_config(forward=forced):
        assert flash.specialises("forward", 3, 3)
        assert flash.config("forward", "specialised", 90, 2, 64, 3) == forced
        assert flash.config("forward", "long", 90, 2, 64, 4096) == given


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"causal": True, "window": 9, "sinks": 2, "sink_logit": torch.ones(1)}, True),
        ({"key_mask": torch.ones(1)}, False),
        ({"row_end": torch.ones(1)}, False),
        ({"q_offsets": torch.ones(1)}, False),
        ({"slopes": torch.ones(1)}, False),
    ],
)
def test_what_rules_are_plain(options: dict[str, Any], plain: bool) -> None:
    rules = Rules(*[None] * len(Rules._fields))._replace(**options)  # type: ignore[arg-type]
    assert rules.plain == plain


def test_a_use_that_was_sent_to_a_process_is_in_force_there() -> None:
    sent = pickle.loads(pickle.dumps(functools.partial(use_config, CANDIDATES[1])))
    with sent():
        assert config() == CANDIDATES[1]


def test_a_table_is_in_force_until_the_next(tmp_path: Path) -> None:
    plain = flash.CANDIDATES["forward", "long", 128]
    before = flash.TABLE.state()
    choices = {KEY: asdict(CANDIDATES[1]), "flash forward long 128": asdict(plain[2])}
    tuning.load(write(tmp_path / "both.json", choices))
    assert config() == CANDIDATES[1]
    assert flash.config("forward", "long", 90, 2, 128, 4096) == plain[2]
    assert flash.config("forward", "long", 80, 2, 128, 4096) == flash.SMALL_MEMORY["forward"]
    assert flash.TABLE.state() != before
    tuning.load(write(tmp_path / "rows.json", {KEY: asdict(CANDIDATES[2])}))
    assert config() == CANDIDATES[2]
    assert flash.config("forward", "long", 90, 2, 128, 4096) == plain[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected a table of attnspec tune"),
        ("[]", "expected a table of attnspec tune"),
        ('{"choices": {}}', "expected a table of attnspec tune"),
        ('{"capability": "8.0", "choices": {}}', "capability 8.0, expected None, as this device"),
        ({"cube all": {}}, "engine: got 'cube', which has no configurations"),
        ({"geometry all": {}}, "engine: got 'geometry', which has no configurations"),
        ({"rows some": {}}, "key: got 'rows some', expected one of: rows all"),
        ({KEY: {"elements": 3, "warps": 4}}, "rows all: got .* expected one of its 4 candidates"),
        ({KEY: {"elements": 1024}}, "rows all: got .* expected one of its 4 candidates"),
        ({KEY: None}, "rows all: got None, expected one of its 4 candidates"),
    ],
)
def test_a_table_that_does_not_fit_changes_nothing(
    content: Any, message: str, tmp_path: Path
) -> None:
    tuning.load(write(tmp_path / "good.json", {KEY: asdict(CANDIDATES[1])}))
    path = tmp_path / "table.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        write(path, {KEY: asdict(CANDIDATES[2]), **content})
    with pytest.raises(ValueError, match=rf"table.json: .*{message}"):
        tuning.load(path)
    assert config() == CANDIDATES[1]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.json: expected a table .*FileNotFoundError"):
        tuning.load(tmp_path / "none.json")


def test_the_tuner_sees_and_forces_what_a_call_asks_for() -> None:
    tuner = pickle.loads(pickle.dumps(tuning.Tuner()))
    with tuner.watch() as keys:
        config()
        flash.config("dq", "short", 90, 2, 256, 4096)
    config()
    assert keys == {KEY, "flash dq short 256"}
    first, second, *_ = tuner.candidates(KEY)
    assert first == asdict(CANDIDATES[0])
    before = tuning.table_of("rows").state()
    with tuner.force(KEY, second):
        assert config() == CANDIDATES[1]
        assert tuner.candidates(KEY)[0] == second
        assert tuning.table_of("rows").state() != before
    assert config() == CANDIDATES[0]
    assert tuning.table_of("rows").state() != before


@pytest.mark.parametrize("fits", [True, False])
def test_the_environment_names_a_table(fits: bool, tmp_path: Path) -> None:
    """It is read by the first call that asks, and every call fails until it fits."""
    path = write(tmp_path / "mine.json", {KEY if fits else "rows none": asdict(RowsConfig(4096))})
    script = """
from attnspec.fast.engines.rows.configs import config
for _ in range(2):
    try:
        print(config().elements)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, tuning.VARIABLE: str(path), "CUDA_VISIBLE_DEVICES": ""},
    )
    first, second = done.stdout.splitlines()
    assert first == second
    assert first == "4096" if fits else "key: got 'rows none'" in first
