"""Reports for machines and for later: JUnit XML and a self-contained HTML page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from attnspec.conformance.report import Report, environment


def save_junit(report: Report, path: Path) -> None:
    """One test suite for each kernel and operation, one test case for each law and dtype."""
    root = ElementTree.Element("testsuites", name="attnspec")
    for (kernel, operation), results in report.kernels().items():
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"{kernel} {operation}",
            tests=str(len(results)),
            failures=str(sum(not result.passed for result in results)),
            time=f"{sum(result.seconds for result in results):.3f}",
        )
        for result in results:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{kernel}.{operation}",
                name=f"{result.law}[{result.dtype}]",
                time=f"{result.seconds:.3f}",
            )
            if not result.passed:
                message = str(result.failure.violation) if result.failure else result.note
                broken = ElementTree.SubElement(case, "failure", message=message)
                broken.text = str(result.failure or result.note)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def save_html(report: Report, path: Path) -> None:
    """A page that needs nothing but itself: table of laws, failures, environment."""
    from jinja2 import Environment

    template = files("attnspec.conformance").joinpath("templates/report.html.j2").read_text()
    laws = list(dict.fromkeys(result.law for result in report.results))
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        page.render(
            report=report,
            summary=report.to_dict()["summary"],
            laws=laws,
            environment=environment(),
        )
    )
