"""A stranger at the command line: every wrong turn is one clear sentence, never a traceback."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from attnspec.conformance import __main__ as command
from attnspec.conformance import registry, terminal
from attnspec.conformance.__main__ import app

Run = Callable[..., Result]

WRONG = """
from attnspec.conformance import Kernel


def temper(scores, tau=1.0):
    return scores / (tau[None, None] if hasattr(tau, "shape") else tau)


KERNEL = Kernel("mine", "tempscale.temper", temper)
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in an empty folder, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runner = CliRunner()

    def invoke(*words: str) -> Result:
        for name in ("mine", "kernel"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        result = runner.invoke(app, list(words))
        assert result.exception is None or isinstance(result.exception, SystemExit), words
        return result

    return invoke


@pytest.fixture
def wrong(run: Run) -> Path:
    """A counterexample of a wrong kernel, written by the suite."""
    Path("mine.py").write_text(WRONG)
    failed = run("conform", "--kernel", "mine:KERNEL", "--law", "agreement", "--law", "heads")
    assert failed.exit_code == 1, failed.output
    hint = " ".join(failed.output.replace("│", " ").split())
    (path,) = Path("build/counterexamples").glob("mine-agreement-*.json")
    assert f"attnspec replay {path} --kernel mine:KERNEL" in hint
    return path


def test_from_a_template_to_a_certificate(run: Run, wrong: Path) -> None:
    assert run("new-kernel", "tempscale.temper", "-o", "kernel.py").exit_code == 0
    passed = run("conform", "--kernel", "kernel:KERNEL", "--profile", "smoke", "--cases", "other")
    assert passed.exit_code == 0, passed.output
    assert run("replay", str(wrong), "--kernel", "mine:KERNEL").exit_code == 1
    Path("mine.py").write_text(
        WRONG.replace("def temper", "def other").replace(
            "KERNEL =", "from attnspec.reference.scores.tempscale import temper\n\nKERNEL ="
        )
    )
    replayed = run("replay", str(wrong), "--kernel", "mine:KERNEL")
    assert replayed.exit_code == 0
    assert "passes now" in replayed.output


def test_a_bare_function_is_replayed(run: Run) -> None:
    Path("mine.py").write_text(WRONG)
    function = ("--kernel", "mine:temper", "--array", "numpy")
    named = ("--operation", "tempscale.temper", "--law", "agreement")
    failed = run("conform", *function, *named)
    hint = " ".join(failed.output.replace("│", " ").split())
    (path,) = Path("build/counterexamples").glob("temper-agreement-*.json")
    assert f"attnspec replay {path} --kernel mine:temper --array numpy" in hint
    assert run("replay", str(path), *function).exit_code == 1


def test_one_bug_that_breaks_many_laws_fills_one_screen(run: Run) -> None:
    Path("mine.py").write_text(WRONG)
    failed = run("conform", "--kernel", "mine:KERNEL", "--profile", "smoke")
    assert failed.output.count("promise  ") == 3
    assert failed.output.count(".json\n") >= 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("conform --kernel mine:KERNEL --law nothing", "--law: got 'nothing'"),
        ("conform --kernel mine:KERNEL --dtype float8", "--dtype: got 'float8'"),
        ("conform --kernel mine:KERNEL --dtype float64", "no kernel is left"),
        ("conform --kernel mine:KERNEL --profile slow", "--profile: got 'slow'"),
        ("conform --kernel mine:KERNEL snapkv", "select: got 'snapkv'"),
        ("conform --kernel mine:temper", "--operation: got nothing"),
        ("conform --kernel mine:temper --operation tempscale.temper", "--array: got nothing"),
        ("conform --kernel mine", "expected 'package.module:attribute'"),
        ("conform --kernel mine:other", "has no 'other'"),
        ("conform --kernel theirs:KERNEL", "cannot import 'theirs'"),
        ("new-kernel tempscale", "operation: got 'tempscale'"),
        ("new-kernel tempscale.temper -o mine.py", "path: got mine.py"),
        ("new-kernel tempscale.temper -o mine.py/kernel.py", "mine.py"),
        ("replay mine.py --kernel mine:KERNEL", "expected a counterexample"),
    ],
)
def test_wrong_usage_is_one_sentence(run: Run, words: str, message: str) -> None:
    Path("mine.py").write_text(WRONG)
    result = run(*words.split())
    assert result.exit_code == 2
    assert result.output.startswith("attnspec: ")
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["case"]["sizes"].pop("keys"), "sizes: got batch, group, kv_heads, que"),
        (lambda data: data["case"]["parameters"].update(temperature=1), "got temperature"),
        (lambda data: data["case"].update(options=["mask"]), "options: got mask"),
        (lambda data: data["case"].update(operation="tempscale.melt"), "got 'tempscale.melt'"),
        (lambda data: data["case"].update(values="odd"), "no arguments of tempscale.temper"),
        (lambda data: data.update(law="honesty"), "law: got 'honesty'"),
        (lambda data: data.pop("case"), "expected a counterexample"),
    ],
)
def test_a_case_that_no_longer_fits_says_so(
    run: Run, wrong: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    data = json.loads(wrong.read_text())
    change(data)
    wrong.write_text(json.dumps(data))
    calls = [("replay", str(wrong), "--kernel", "mine:KERNEL")]
    if data.get("case", {}).get("operation") != "tempscale.melt":
        calls.append(("conform", "--kernel", "mine:KERNEL", "--law", "agreement"))
    for words in calls:
        result = run(*words)
        assert result.exit_code == 2, words
        assert result.output.startswith(f"attnspec: {wrong}: ")
        assert message in result.output


def unavailable() -> list[Any]:
    raise registry.Unavailable('torch is not installed: pip install "attnspec[fast]"')


def test_without_the_fast_extra(run: Run, wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spec can be listed and one's own kernel certified; else the message says what to do."""
    monkeypatch.setattr(registry, "registered_kernels", unavailable)
    listed = run("list")
    assert listed.exit_code == 0
    assert "tempscale" in listed.output
    assert run("replay", str(wrong), "--kernel", "mine:KERNEL").exit_code == 1
    for words in (["conform"], ["bench", "--device", "cpu"], ["replay", str(wrong)]):
        result = run(*words)
        assert result.exit_code == 2
        assert 'pip install "attnspec[fast]"' in result.output


@pytest.mark.parametrize(
    ("package", "body", "sentence"),
    [
        (
            "hypothesis",
            "import runpy; runpy.run_module('attnspec.conformance', run_name='__main__')",
            'attnspec: hypothesis is not installed; pip install "attnspec[conformance]"',
        ),
        (
            "hypothesis",
            "from attnspec.conformance import Kernel",
            'ImportError: hypothesis is not installed: pip install "attnspec[conformance]"',
        ),
        (
            "torch",
            "from attnspec import fast; fast.attention",
            'ImportError: torch is not installed: pip install "attnspec[fast]"',
        ),
        (
            "torch",
            "from attnspec.conformance import registry; registry.registered_kernels()",
            "attnspec.conformance.registry.Unavailable: entry point 'fast' "
            '(attnspec.fast.kernels:kernels): torch is not installed: pip install "attnspec[fast]"',
        ),
    ],
)
def test_a_missing_extra_is_named(package: str, body: str, sentence: str) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; {body}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == sentence


def test_mutants_in_several_processes(run: Run, tmp_path: Path) -> None:
    chosen = ["tempscale.temper", "--json"]
    assert run("mutants", *chosen, "alone.json").exit_code == 0
    assert run("mutants", *chosen, "two.json", "--jobs", "2").exit_code == 0
    alone, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("alone", "two"))
    assert alone == two
    assert alone["mutants"]


def test_an_interrupted_table_keeps_its_rows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = command.kill_all

    def interrupted(chosen: Any, *options: Any) -> Any:
        yield from whole(chosen[:1], *options)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "kill_all", interrupted)
    result = run("mutants", "tempscale.temper", "--json", "kills.json")
    assert result.exit_code == 1
    assert "interrupted after 1 of" in result.output
    assert len(json.loads((tmp_path / "kills.json").read_text())["mutants"]) == 1


def test_progress_in_a_log_is_a_line_now_and_then(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run("mutants", "tempscale.temper")
    assert not quiet.stderr
    monkeypatch.setattr(terminal, "LINE_EVERY", 0.0)
    first, *_ = run("mutants", "tempscale.temper").stderr.splitlines()
    assert re.fullmatch(r"1 of \d+: .+", first)
