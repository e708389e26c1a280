"""What was measured: certificates, the kill matrix and benchmarks, read from checked-in files.

A file that is absent is said to be absent. Certificates are written by ``attnspec conform --json``,
the kill matrix by ``attnspec mutants --json``, benchmarks by ``attnspec bench --json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnspec.conformance.mutants import mutants
from attnspec.reference import Mechanism
from pages import rest

DOCS = Path(__file__).parent.parent
VERDICTS = {"pass": "✓", "fail": "✗", "known": "known", "crash": "crash"}


def load(path: Path) -> Any:
    """The content of a JSON file; ValueError names the file if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got text that is not JSON ({error})") from None


def certificate_files(slug: str, folder: Path = DOCS / "certificates") -> list[Path]:
    """``<slug>.json`` and ``<slug>.<machine>.json``."""
    return sorted({*folder.glob(f"{slug}.json"), *folder.glob(f"{slug}.*.json")})


def certificates(mechanism: Mechanism, folder: Path = DOCS / "certificates") -> str:
    """The section's body: for each certificate a line on the run and a table of kernels."""
    blocks = []
    for path in certificate_files(mechanism.slug, folder):
        blocks += _certificate(load(path), mechanism.slug)
    if not blocks:
        return (
            "Not certified yet: no run of the suite on this mechanism's kernels is checked in. "
            f"``attnspec conform {mechanism.slug}`` makes one."
        )
    return rest.page(*blocks)


def _certificate(record: dict[str, Any], slug: str) -> list[str]:
    results = [r for r in record.get("results", []) if r["operation"].startswith(f"{slug}.")]
    environment = record.get("environment", {})
    where = ", ".join(f"{key} {value}" for key, value in environment.items())
    failed = sum(r["verdict"] not in ("pass", "known") for r in results)
    incomplete = record.get("interrupted") or not results
    state = "Incomplete" if incomplete else ("Failed" if failed else "Passed")
    cases = sum(r.get("cases", 0) for r in results)
    line = (
        f"**{state}**, profile ``{record.get('profile', '?')}``: {len(results)} laws checked on "
        f"{cases} cases, {failed} broken.\n{rest.escape(where)}.{_taken(record)}"
    )
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["kernel"], result["operation"].partition(".")[2], result["dtype"])
        groups.setdefault(key, []).append(result)
    rows = [_certificate_row(key, group) for key, group in groups.items()]
    header = ("Kernel", "Operation", "Dtype", "Laws kept", "Cases", "Budget used", "Not kept")
    return [line, rest.table(header, rows, css="figures")]


def _taken(record: dict[str, Any]) -> str:
    """At which commit the laws ran, and which kernels ran again, all or in part, at later ones."""
    commits = list(record.get("commits", {}))
    if not commits:
        return ""
    said = f" Laws ran at commit {commits[0]}"
    for commit in commits[1:]:
        by_dtype: dict[str, list[str]] = {}
        for kernel in record["commits"][commit]:
            operation, dtype = kernel.split()
            by_dtype.setdefault(dtype, []).append(operation)
        names = (f"in {dtype} those of {', '.join(x)}" for dtype, x in by_dtype.items())
        said += f"; some again at {commit}, {', '.join(names)}"
    return rest.escape(f"{said}.")


def _certificate_row(key: tuple[str, str, str], results: list[dict[str, Any]]) -> list[str]:
    kernel, operation, dtype = key
    broken = [r for r in results if r["verdict"] != "pass"]
    shares = [share for r in results for share in r.get("budget_used", {}).values()]
    return [
        kernel,
        rest.code(operation),
        dtype,
        f"{len(results) - len(broken)} of {len(results)}",
        str(sum(r.get("cases", 0) for r in results)),
        f"{max(shares):.2f}" if shares else "",
        ", ".join(f"{r['law']} ({VERDICTS.get(r['verdict'], r['verdict'])})" for r in broken),
    ]


def verdict(slug: str, device: str) -> str:
    """One word on the certificate of a device, for the status page; empty if there is none."""
    words = []
    for path in certificate_files(slug):
        for result in load(path).get("results", []):
            backend = "cuda" if "triton" in result["kernel"] else "cpu"
            if result["operation"].startswith(f"{slug}.") and backend == device:
                words.append(result["verdict"])
    if not words:
        return ""
    return "passed" if all(word in ("pass", "known") for word in words) else "failed"


def kill_matrix(mechanism: Mechanism, path: Path = DOCS / "certificates" / "mutants.json") -> str:
    """The section's body: every mutant, the law that claims it and those that caught it."""
    own = [m for m in mutants() if m.operation.startswith(f"{mechanism.slug}.")]
    if not own:
        return "No mutants yet: nothing shows that the suite would notice a wrong kernel."
    kills = {}
    if path.exists():
        kills = {kill["mutant"]: kill for kill in load(path).get("mutants", [])}
    rows = []
    for mutant in own:
        kill = kills.get(mutant.name)
        if kill is None:
            caught = "not run yet"
        elif kill.get("killers"):
            caught = ", ".join(kill["killers"])
        else:
            caught = "equivalent" if mutant.equivalent else "**survives**"
        operation = rest.code(mutant.operation.partition(".")[2])
        rows.append([operation, rest.escape(mutant.bug), mutant.law, caught])
    ran = [kills[m.name] for m in own if m.name in kills]
    caught_count = sum(bool(kill.get("killers")) for kill in ran)
    line = f"{len(own)} wrong kernels, " + (
        f"{len(ran)} of them run and {caught_count} caught." if ran else "none of them run yet."
    )
    return rest.page(line, rest.table(("Operation", "Bug", "Claimed by", "Caught by"), rows))


def benchmark_files(
    slug: str, folder: Path = DOCS / "benchmarks"
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Of each benchmark file, its record and the rows on the mechanism's operations."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = load(path)
        rows = [r for r in record.get("results", []) if r["operation"].startswith(f"{slug}.")]
        if rows:
            found.append((record, rows))
    return found


def benchmarks(mechanism: Mechanism, folder: Path = DOCS / "benchmarks") -> str:
    """The section's body: for each file a line on the machine and a table of kernels."""
    blocks = []
    for record, rows in benchmark_files(mechanism.slug, folder):
        where, when, environment = _provenance(record)
        versions = ", ".join(f"{name} {value}" for name, value in environment.items())
        header = (
            "Benchmark",
            "Kernel",
            "Dtype",
            "ms",
            "TFLOP/s",
            "TB/s",
            "Roofline",
            "MB",
            "Rivals",
        )
        blocks += [
            f"**{where}**, {when}. {rest.escape(versions)}.",
            rest.table(header, map(_benchmark_row, rows), css="figures"),
        ]
    if not blocks:
        return "Not measured yet."
    return rest.page(
        "Medians. A kernel is measured only after it has passed the suite's smoke profile. The "
        "roofline is the time that the operation's arithmetic or its traffic must take on this "
        "machine, by the rates measured on it; a rival's figure is its time over ours. MB is the "
        "memory that a call holds at most beyond its arguments, where it was recorded. In a graph, "
        "the call and its rivals are replays of a CUDA graph: of a short call, the rest is the "
        "host's time.",
        *blocks,
    )


def measured(record: dict[str, Any], packages: Sequence[str] = ("torch", "triton", "numba")) -> str:
    """The sentence on where and when the numbers of a study were made, and with which packages."""
    where, when, environment = _provenance(record)
    versions = [f"{name} {environment[name]}" for name in packages if name in environment]
    return f"Measured on {where}, {when}, {', '.join(versions)}."


def machine(record: dict[str, Any]) -> str:
    """Where the numbers of a benchmark or a study were made."""
    environment = record.get("environment", {})
    if gpu := environment.get("gpu"):
        return rest.escape(gpu)
    cpu = environment.get("processor") or f"{environment.get('machine', '')} CPU".strip()
    return rest.escape(f"{cpu}, {environment.get('cores', 'unknown')} cores")


def _provenance(record: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """The machine, the date and commit, and the environment of a benchmark or a study."""
    when = f"{record.get('date', 'undated')}, commit {record.get('commit') or 'unknown'}"
    return machine(record), when, record.get("environment", {})


def _benchmark_row(row: dict[str, Any]) -> list[str]:
    names = [
        f"{rest.code(row['operation'].partition('.')[2])} {rest.escape(row.get('benchmark', ''))}",
        row["kernel"],
        row.get("dtype", ""),
    ]
    if "timing" not in row:
        reason = row.get("error") or f"gate {row.get('gate', 'unknown')}"
        return [*names, "", "", "", "", "", f"not measured: {rest.escape(reason)}"]
    return [
        *names,
        f"{row['timing']['median'] * 1e3:.3g}",
        f"{row['flops_per_second'] / 1e12:.3g}",
        f"{row['bytes_per_second'] / 1e12:.3g}",
        f"{row['of_roofline']:.0%}",
        _megabytes(row),
        "; ".join(map(_rival, row.get("rivals", []))),
    ]


def _rival(entry: dict[str, Any]) -> str:
    name = rest.escape(entry["name"])
    if "timing" not in entry:
        return f"{name} unavailable"
    memory = f", {_megabytes(entry)} MB" if "peak_bytes" in entry else ""
    return f"{name} {entry['timing']['median'] * 1e3:.3g} ms ({entry['ratio']:.2f} x{memory})"


def _megabytes(entry: dict[str, Any]) -> str:
    return f"{entry['peak_bytes'] / 1e6:.3g}" if "peak_bytes" in entry else ""
