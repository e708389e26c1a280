"""The page of one mechanism, derived from its chapter and from what was measured."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from attnspec.conformance import Kernel
from attnspec.conformance.contract import contracts
from attnspec.conformance.laws import laws_for
from attnspec.reference import Mechanism, Operation
from attnspec.reference.spec import HEADS, PADDINGS, PATTERNS, PHASES
from pages import docstrings, evidence, flex, rest, studies

ROOT = Path(__file__).parent.parent.parent


def chapter(mechanism: Mechanism, picture: str = "", caption: str = "") -> str:
    """The whole page; `picture` is the stem of the drawings beside the page, if there are any."""
    text = docstrings.read(mechanism.module)
    slug = mechanism.slug
    return rest.page(
        rest.label(f"chapter-{slug}"),
        rest.heading(mechanism.title, rest.TITLE),
        f".. rst-class:: lead\n\n{rest.escape(mechanism.idea)}",
        _source_line(mechanism),
        rest.picture(picture, caption, docstrings.link(caption, slug)) if picture else "",
        docstrings.link(text.lead, slug),
        *_definitions(mechanism),
        *_section("Complexity", text.sections.get("Complexity", ""), slug),
        *_notes(mechanism),
        rest.heading("Step by step"),
        "Each operation is one function of the reference: the unit that a kernel claims and that a "
        "contract judges.",
        *(_operation(operation) for operation in mechanism.operations),
        *_helpers(mechanism),
        rest.heading("Fast path"),
        fast_path(mechanism),
        rest.heading("Contract"),
        contract(mechanism),
        rest.heading("Certificate"),
        evidence.certificates(mechanism),
        rest.heading("Kill matrix"),
        evidence.kill_matrix(mechanism),
        rest.heading("Speed"),
        evidence.benchmarks(mechanism),
        *_section("Studies", studies.links(slug), slug),
    )


def _source_line(mechanism: Mechanism) -> str:
    paper = mechanism.paper
    parts = [f":cite:t:`{mechanism.slug}`"]
    if paper.arxiv:
        parts.append(f"`arXiv:{paper.arxiv} <https://arxiv.org/abs/{paper.arxiv}>`__")
    if paper.code:
        parts.append(f"`{paper.code} <https://github.com/{paper.code}>`__")
    return f"{rest.escape(paper.title)}. {' · '.join(parts)}"


def _section(name: str, body: str, slug: str) -> list[str]:
    return [rest.heading(name), docstrings.link(body, slug)] if body else []


def _definitions(mechanism: Mechanism) -> list[str]:
    blocks = [rest.heading("Definition")]
    for module in docstrings.modules(mechanism):
        text = docstrings.read(module)
        body = text.sections.get("Definition")
        if not body:
            continue
        if module is not mechanism.module:
            blocks += [rest.heading(_continued(text.title), rest.SUBSECTION)]
            blocks += [docstrings.link(text.lead, mechanism.slug)]
        blocks.append(docstrings.definition(body, mechanism.slug))
    return blocks


def _notes(mechanism: Mechanism) -> list[str]:
    texts = [docstrings.read(module) for module in docstrings.modules(mechanism)]
    bodies = [t.sections["Paper and code"] for t in texts if "Paper and code" in t.sections]
    return _section("Paper and code", "\n\n".join(bodies), mechanism.slug)


def _continued(title: str) -> str:
    """The part of a continuing module's title that says what it is about."""
    topic = title.partition(": ")[2] or title
    topic = topic.rstrip(".")
    return topic[:1].upper() + topic[1:]


def _operation(operation: Operation) -> str:
    function = operation.function
    facts = []
    if operation.gradient is not None:
        names = rest.codes(operation.differentiable)
        facts = [f"Differentiable in {names}; the gradient is ``{operation.gradient.__name__}``."]
    return rest.page(
        rest.heading(operation.name, rest.SUBSECTION),
        rest.directive("autofunction", f"{function.__module__}.{function.__name__}"),
        *facts,
        _source(function),
    )


def _source(function: Any) -> str:
    text, first = docstrings.without_docstring(function)
    path = Path(inspect.getsourcefile(function) or "").relative_to(ROOT)
    return rest.directive("code-block", "python", text, caption=f"{path}, line {first}")


def _helpers(mechanism: Mechanism) -> list[str]:
    """The public names of the chapter's modules that are not operations."""
    operations = {operation.function for operation in mechanism.operations}
    blocks: list[str] = []
    for module in docstrings.modules(mechanism):
        own = [value for value in public(module) if value not in operations]
        blocks.append(rest.directive("py:module", module.__name__))
        for value in own:
            blocks.append(_autodoc(value))
            body = _source(value)
            blocks.append(rest.directive("dropdown", f"Source of {value.__name__}", body))
    return [rest.heading("Beside the operations"), *blocks]


def public(module: ModuleType) -> list[Any]:
    """Public functions and classes defined in `module`, in the order of their source.

    Checks of arguments are left out: every chapter has them and none explains anything.
    """
    found = [
        value
        for name, value in vars(module).items()
        if not name.startswith(("_", "check_"))
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]
    return sorted(found, key=lambda value: inspect.getsourcelines(value)[1])


def fast_path(mechanism: Mechanism) -> str:
    """The kernels that claim the mechanism's operations, and their Python surface."""
    path = ROOT / "fast" / mechanism.family / f"{mechanism.slug}.py"
    if not path.exists():
        return "Not written yet: the reference is the only implementation."
    name = f"attnspec.fast.{mechanism.family}.{mechanism.slug}"
    try:
        module = importlib.import_module(name)
        rows = [
            _kernel_row(kernel)
            for kernel in fast_kernels()
            if kernel.operation.startswith(f"{mechanism.slug}.")
        ]
    except ImportError as missing:
        return f"These pages were built without {missing.name}, which the fast path needs."
    operations = [getattr(module, o.name) for o in mechanism.operations if hasattr(module, o.name)]
    shown = [*operations, *(value for value in public(module) if value not in operations)]
    header = ("Operation", "Backend", "Device", "Dtypes", "Gradient", "Limits")
    return rest.page(
        rest.directive("automodule", name),
        rest.table(header, rows) if rows else "",
        *(_autodoc(value) for value in shown),
        *_layers(mechanism),
        *flex.section(mechanism),
    )


def _layers(mechanism: Mechanism) -> list[str]:
    """The layers for PyTorch models, in the module that is named for them."""
    if not (ROOT / "fast" / mechanism.family / f"{mechanism.slug}_module.py").exists():
        return []
    name = f"attnspec.fast.{mechanism.family}.{mechanism.slug}_module"
    module = importlib.import_module(name)
    return [
        rest.heading("As a layer", rest.SUBSECTION),
        rest.directive("automodule", name),
        *(_autodoc(value) for value in public(module)),
    ]


def _autodoc(value: Any) -> str:
    name = f"{value.__module__}.{value.__name__}"
    if inspect.isclass(value):
        return rest.directive("autoclass", name, members="")
    return rest.directive("autofunction", name)


def fast_kernels() -> list[Kernel]:
    from attnspec.fast.kernels import kernels

    return list(kernels())


def _kernel_row(kernel: Kernel) -> list[str]:
    return [
        rest.code(kernel.operation.partition(".")[2]),
        kernel.backend,
        kernel.device,
        ", ".join(kernel.dtypes),
        "yes" if kernel.differentiates else "",
        "; ".join(f"{name} in {rest.escape(_values(v))}" for name, v in kernel.limits.items()),
    ]


def _values(values: Any) -> str:
    if isinstance(values, range):
        return f"[{values.start}, {values.stop - 1}]"
    return ", ".join(map(str, values)) if isinstance(values, (tuple, list)) else str(values)


def contract(mechanism: Mechanism) -> str:
    """Coverage, inputs and outputs, and the laws that speak about each operation."""
    known = contracts()
    covered = [o for o in mechanism.operations if o.qualified_name in known]
    missing = [o.name for o in mechanism.operations if o.qualified_name not in known]
    blocks = [_coverage(mechanism)]
    if missing:
        blocks.append(f"No contract, so no kernel can be certified yet: {rest.codes(missing)}.")
    if covered:
        blocks += [_signatures(covered), _laws(covered)]
    return rest.page(*blocks)


def _coverage(mechanism: Mechanism) -> str:
    coverage = mechanism.coverage
    gradient = ("yes",) if coverage.gradient else ()
    rows = []
    for name, defined, every in (
        ("Patterns", coverage.patterns, PATTERNS),
        ("Phases", coverage.phases, PHASES),
        ("Padding", coverage.paddings, PADDINGS),
        ("Heads", coverage.heads, HEADS),
        ("Gradient", gradient, ("yes",)),
    ):
        cells = (
            f":bdg-success:`{cell}`" if cell in defined else f":bdg-secondary-line:`{cell}`"
            for cell in every
        )
        rows.append([name, " ".join(cells)])
    note = (
        ""
        if mechanism.stepwise_equals_prefill
        else ("Step by step is *not* the same as all at once, by definition.")
    )
    return rest.page(
        "What the mechanism defines; a kernel must refuse the rest.",
        rest.table(("Axis", "Defined, and undefined in outline"), rows, widths="15 85"),
        note,
    )


def _signatures(operations: list[Operation]) -> str:
    rows = []
    for operation in operations:
        found = contracts()[operation.qualified_name]
        arrays = [
            f"``{a.name}`` {rest.escape(f'({a.axes})') if a.axes else ''}" for a in found.arrays
        ]
        outputs = [f"``{o.name}`` ({o.kind})" for o in found.outputs]
        rows.append([rest.code(operation.name), ", ".join(arrays), ", ".join(outputs)])
    return rest.table(("Operation", "Arrays", "Outputs"), rows, widths="18 52 30")


def _laws(operations: list[Operation]) -> str:
    names: dict[str, list[str]] = {}
    found = {}
    for operation in operations:
        kernel = Kernel(
            "reference",
            operation.qualified_name,
            operation.function,
            backward=operation.gradient,
        )
        for law in laws_for(contracts()[operation.qualified_name], kernel):
            found[law.name] = law
            names.setdefault(law.name, []).append(operation.name)
    rows = []
    for name, law in found.items():
        where = "all" if len(names[name]) == len(operations) else rest.codes(names[name])
        rules = ", ".join(map(docstrings.rule_link, law.rules))
        rows.append([name, rest.escape(law.promise), rules, where])
    return rest.table(("Law", "Promise", "Rules", "Operations"), rows, widths="14 46 12 28")
