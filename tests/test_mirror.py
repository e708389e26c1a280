"""The three packages mirror one another: same slugs, same functions, same keywords."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from attnspec.conformance.contract import contracts
from attnspec.conformance.laws import laws
from attnspec.conformance.mutants import mutants
from attnspec.fast import mechanism_modules
from attnspec.fast.kernels import kernels
from attnspec.reference import find_operation, mechanisms

ROOT = Path(__file__).parent.parent
SLUGS = list(mechanisms())
FEWEST_MUTANTS = 4


def chapter_files(folder: str) -> list[tuple[str, str]]:
    """(family, stem) of every module below a folder of families, engines and bridges aside."""
    families = {mechanism.family for mechanism in mechanisms().values()}
    return [
        (path.parent.name, path.stem)
        for path in sorted((ROOT / folder).glob("*/*.py"))
        if path.parent.name in families and path.stem != "__init__"
    ]


@pytest.mark.parametrize("folder", ["fast", "conformance/contracts", "conformance/mutants"])
def test_every_file_belongs_to_a_chapter(folder: str) -> None:
    """Its name is a chapter's slug, or begins with one: ``snapkv``, ``snapkv_selection``."""
    for family, stem in chapter_files(folder):
        owners = [
            slug
            for slug, mechanism in mechanisms().items()
            if mechanism.family == family and (stem == slug or stem.startswith(f"{slug}_"))
        ]
        assert owners, f"{folder}/{family}/{stem}.py has no chapter in reference/{family}"


def reference_modules(slug: str) -> list[ModuleType]:
    """The module of a chapter and those beside it that go on from it."""
    mechanism = mechanisms()[slug]
    folder = ROOT / "reference" / mechanism.family
    stems = [path.stem for path in folder.glob(f"{slug}*.py")]
    stems = [stem for stem in stems if stem == slug or stem.startswith(f"{slug}_")]
    package = mechanism.module.__name__.rpartition(".")[0]
    return [importlib.import_module(f"{package}.{stem}") for stem in stems]


def public_functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """Public functions a module defines, its checks of arguments aside."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith(("_", "check_"))
        and value.__module__ == module.__name__
    }


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter but a trailing ``backend=None``."""
    found = list(inspect.signature(function).parameters.values())
    if found and found[-1].name == "backend":
        assert found.pop().default is None
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("stem", sorted(mechanism_modules()))
def test_fast_signatures_are_the_references(stem: str) -> None:
    """A function that both have is called the same way; a chapter's own module adds none.

    The modules beside it may hold what its operations share.
    """
    slug = max((s for s in SLUGS if stem == s or stem.startswith(f"{s}_")), key=len)
    expected = {}
    for module in reference_modules(slug):
        expected |= public_functions(module)
    fast = public_functions(importlib.import_module(mechanism_modules()[stem]))
    unknown = set(fast) - set(expected)
    assert stem != slug or not unknown, "the reference does not have these"
    for name in set(fast) - unknown:
        assert parameters(fast[name]) == parameters(expected[name]), name


@pytest.mark.parametrize("slug", SLUGS)
def test_every_operation_has_a_contract(slug: str) -> None:
    """Or the contracts' module says in `WITHOUT_CONTRACT` why it needs none."""
    mechanism = mechanisms()[slug]
    without: dict[str, str] = {}
    for _, stem in chapter_files("conformance/contracts"):
        if stem == slug or stem.startswith(f"{slug}_"):
            name = f"attnspec.conformance.contracts.{mechanism.family}.{stem}"
            without |= getattr(importlib.import_module(name), "WITHOUT_CONTRACT", {})
    missing = [
        operation.name
        for operation in mechanism.operations
        if operation.qualified_name not in contracts() and not without.get(operation.name)
    ]
    assert not missing


@pytest.mark.parametrize("slug", SLUGS)
def test_every_mechanism_has_mutants(slug: str) -> None:
    own = [mutant for mutant in mutants() if mutant.operation.startswith(f"{slug}.")]
    assert len(own) >= FEWEST_MUTANTS


def test_contracts_and_mutants_name_what_exists() -> None:
    for operation in contracts():
        find_operation(operation)
    for mutant in mutants():
        assert mutant.operation in contracts(), mutant.name
        assert mutant.law in laws(), mutant.name
    names = [mutant.name for mutant in mutants()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("slug", SLUGS)
def test_contracts_fit_their_operations(slug: str) -> None:
    """A contract's arrays and parameters are arguments of the operation it is about."""
    for operation in mechanisms()[slug].operations:
        contract = contracts().get(operation.qualified_name)
        if contract is not None:
            names = {array.name for array in contract.arrays}
            assert names <= set(operation.signature.parameters), operation.name
            gradients = {f"d{name}" for name in operation.differentiable}
            assert set(contract.cancelling) <= gradients, operation.name


def test_every_operation_has_a_kernel_that_claims_its_gradient() -> None:
    """Tasks of text have none."""
    text = {"first_integer", "place_answer", "presence", "score_lines"}
    offered = {kernel.operation: kernel for kernel in kernels()}
    assert set(contracts()) - set(offered) == {f"giraffe.{name}" for name in text}
    for name, kernel in offered.items():
        assert kernel.gradient or not contracts()[name].differentiable, name
