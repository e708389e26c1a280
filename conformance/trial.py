"""One kernel on one case: build the arguments, call, check what every call must keep, judge."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, place_arguments, round_arguments
from attnspec.conformance.case import Case
from attnspec.conformance.choices import close_calls, judge_selection
from attnspec.conformance.contract import Contract, Output, Ranking
from attnspec.conformance.dtypes import EPS, accumulator
from attnspec.conformance.judge import (
    HEADROOM,
    Expectation,
    compare,
    expect,
    out_dtype,
    truth_of,
)
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.violation import Violation


class Refused(Exception):
    """The kernel raised TypeError or ValueError: right outside its limits, wrong inside."""


class Cache:
    """Expectations of the last cases: mutants and dtypes ask for the same ones again."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[Any, Expectation] = OrderedDict()

    def get(self, key: Any, compute: Callable[[], Expectation]) -> Expectation:
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key]
        value = self.entries[key] = compute()
        if len(self.entries) > self.capacity:
            self.entries.popitem(last=False)
        return value


EXPECTATIONS = Cache(capacity=2000)


@dataclass
class Trial:
    """A kernel, the contract of its operation and a case; `used` collects budget use by stage."""

    kernel: Kernel
    contract: Contract
    case: Case
    used: dict[str, float] = field(default_factory=dict)

    def arguments(self, case: Case | None = None) -> dict[str, Any]:
        """The arguments of the case, rounded to the kernel's dtype and back in float64."""
        return round_arguments(self.contract.arguments(case or self.case), self.case.dtype)

    def run(self, arguments: Mapping[str, Any], layout: str | None = None) -> dict[str, np.ndarray]:
        """Outputs of the kernel on `arguments`, as float64 arrays by name.

        Raises `Refused` for a TypeError or ValueError, `Violation` for any other exception, for
        inputs changed in place (K12) and for a wrong dtype.
        """
        results = self.call(self.kernel.call, arguments, layout)
        try:
            outputs = self.contract.outputs_of(results)
        except TypeError as error:
            raise Violation(self.contract.operation, str(error)) from None
        for output in self.contract.outputs:
            self.check_type(output.name, outputs[output.name], output)
        return {name: self.kernel.arrays.get(value) for name, value in outputs.items()}

    def call(
        self,
        function: Callable[..., Any],
        arguments: Mapping[str, Any],
        layout: str | None = None,
    ) -> Any:
        """`function` called as the operation on placed copies of `arguments`."""
        kind = self.kernel.arrays
        placed = place_arguments(kind, arguments, layout or self.case.layout, self.case.dtype)
        before = {
            n: [kind.get(leaf).copy() for leaf in _arrays(kind, x)] for n, x in placed.items()
        }
        with self.guarded():
            results = self.contract.call(function, placed)
        for name, value in placed.items():
            for old, leaf in zip(before[name], _arrays(kind, value), strict=True):
                if not np.array_equal(old, kind.get(leaf), equal_nan=old.dtype.kind == "f"):
                    raise Violation(name, "the input was changed in place (K12)")
        return results

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around every call of the kernel: memory poisoned, errors told apart.

        TypeError and ValueError become `Refused`, anything else a `Violation`.
        """
        try:
            with self.kernel.arrays.poisoned():
                yield
        except (TypeError, ValueError) as error:
            raise Refused(f"{type(error).__name__}: {error}") from error
        except Exception as error:
            raise Violation(
                self.contract.operation, f"raised {type(error).__name__}: {error}"
            ) from error

    def check_type(self, name: str, value: Any, output: Output) -> None:
        """The output is an array of the kernel's library, with the declared dtype and device."""
        kind = self.kernel.arrays
        if output.plain:
            return
        if isinstance(value, list):
            for item in value:
                self.check_type(name, item, output)
            return
        if not kind.is_array(value):
            if output.kind == "value" or self.kernel.array == "torch":
                raise Violation(name, f"returned {type(value).__name__}, expected an array")
            return
        dtype, device = kind.describe(value)
        expected = out_dtype(output, self.case.dtype)
        wider = output.wide and dtype == accumulator(self.case.dtype)
        if output.kind in ("value", "copy") and dtype != expected and not wider:
            raise Violation(name, f"dtype {dtype}, expected {expected}")
        placed = bool(self.contract.arrays) and output.kind != "exact"
        if placed and device != self.kernel.device:
            raise Violation(name, f"on {device}, expected {self.kernel.device}")

    def judge(
        self,
        outputs: Mapping[str, np.ndarray],
        arguments: Mapping[str, Any],
        copied: Mapping[str, Any] | None = None,
    ) -> None:
        """Raise the worst violation of `outputs` against the reference on `arguments`.

        `copied` are the arguments that outputs of kind "copy" were taken from, if others.
        """
        contract = self.contract
        function: Callable[..., Any] = contract.spec.function
        key: Any = ("forward", self.case.key, _fingerprint(arguments))
        if contract.ranking is not None:
            selections = [o for o in contract.outputs if o.kind == "selection"]
            for output in selections:
                self.judge_selection(output.name, _chosen(output, outputs, arguments), arguments)
            bare = [output for output in selections if output.chosen is None]
            if contract.follow is not None and len(contract.outputs) > len(bare):
                chosen = _chosen(selections[0], outputs, arguments)
                follow = contract.follow
                key = (*key, chosen.tobytes())

                def function(**given: Any) -> Any:
                    return follow(given, chosen)

        expectation = EXPECTATIONS.get(
            key,
            lambda: expect(function, arguments, contract.outputs, self.case.dtype, contract.form),
        )
        if copied is not None:
            copies = truth_of(function, copied, contract.outputs)
            copies = {o.name: copies[o.name] for o in contract.outputs if o.kind == "copy"}
            expectation = replace(expectation, truth={**expectation.truth, **copies})
        judged = tuple(o for o in contract.outputs if o.kind != "selection" or o.chosen)
        if contract.hidden is not None:
            outputs = self.settle(outputs, expectation, contract.hidden, arguments)
        self.compare(judged, outputs, expectation)

    def settle(
        self,
        outputs: Mapping[str, np.ndarray],
        expectation: Expectation,
        hidden: Callable[[Mapping[str, Any]], Ranking],
        arguments: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """`outputs` with the rows of the first taken as right where the `hidden` selection is open.

        Which of two equal scores wins is nobody's fault, and the output of the row shows it.
        """
        first = next(iter(expectation.truth))
        truth, got = expectation.truth[first], outputs[first]
        if got.shape != truth.shape or np.array_equal(got, truth):
            return dict(outputs)
        close = close_calls(hidden(arguments), self.score_budget(hidden, arguments))
        return {**outputs, first: np.where(close[..., None], truth, got)}

    def compare(
        self,
        outputs: tuple[Output, ...],
        got: Mapping[str, np.ndarray],
        expectation: Expectation,
    ) -> None:
        """Raise the violation of the worst output; note how much budget each one uses."""
        judged = {o.name: compare(got[o.name], expectation, o, self.case.dtype) for o in outputs}
        most = max((used for used, _ in judged.values()), default=0.0)
        if 1.0 < most < np.inf and expectation.confirm is not None:
            confirmed = replace(expectation, measure=expectation.confirm)
            judged = {o.name: compare(got[o.name], confirmed, o, self.case.dtype) for o in outputs}
        for name, (used, _) in judged.items():
            self.used[name] = max(used, self.used.get(name, 0.0))
        violations = [pair for pair in judged.values() if pair[1] is not None]
        if violations:
            worst = max(violations, key=lambda pair: pair[0])[1]
            assert worst is not None
            raise worst

    def judge_selection(self, name: str, got: np.ndarray, arguments: Mapping[str, Any]) -> None:
        """Judge one selection by the scores of the contract's ranking."""
        make_ranking = self.contract.ranking
        assert make_ranking is not None
        ranking = make_ranking(arguments)
        exact = ranking.exact == "always" or (
            ranking.exact == "integers" and self.case.values == "ties"
        )
        strict = exact and self.kernel.ties == "lowest"
        violation = judge_selection(name, got, ranking, 0.0, strict)
        # What is right without a budget needs none.
        for confirmed in () if exact else (False, True):
            if violation is not None:
                tau = self.score_budget(make_ranking, arguments, confirmed)
                violation = judge_selection(name, got, ranking, tau, strict)
        if violation is not None:
            raise violation

    def score_budget(
        self,
        make_ranking: Callable[[Mapping[str, Any]], Ranking],
        arguments: Mapping[str, Any],
        confirmed: bool = False,
    ) -> np.ndarray:
        """How far off an honest kernel's score of each entry may be, `confirmed` by more runs."""
        scores = Output("scores", row_axes=0, dtype="float32")
        expectation = EXPECTATIONS.get(
            ("scores", self.case.key, _fingerprint(arguments)),
            lambda: expect(
                lambda **a: make_ranking(a).scores, arguments, (scores,), self.case.dtype
            ),
        )
        spread = expectation.spread
        if confirmed and expectation.confirm is not None:
            spread = expectation.confirm()
        budget = HEADROOM * spread["scores"][0]
        if make_ranking(arguments).softmax:
            # A relative error of the weights is an absolute one of the logits.
            budget = budget + HEADROOM * EPS[accumulator(self.case.dtype)]
        return budget

    def check(self, arguments: Mapping[str, Any] | None = None, layout: str | None = None) -> None:
        """Run and judge: inside its limits a kernel must answer, and rightly."""
        arguments = self.arguments() if arguments is None else arguments
        try:
            outputs = self.run(arguments, layout)
        except Refused as refusal:
            raise Violation(
                self.contract.operation, f"refused a case it claims: {refusal}"
            ) from None
        self.judge(outputs, arguments)


def _chosen(
    output: Output, outputs: Mapping[str, np.ndarray], arguments: Mapping[str, Any]
) -> np.ndarray:
    got = outputs[output.name]
    return got if output.chosen is None else output.chosen(got, arguments)


def _arrays(kind: Any, value: Any) -> list[Any]:
    return [leaf for leaf in flatten(value) if kind.is_array(leaf)]


def _fingerprint(arguments: Mapping[str, Any]) -> int:
    """Tells apart arguments that a law has changed after the case was made."""
    parts = []
    for name, value in arguments.items():
        for leaf in flatten(value):
            array = isinstance(leaf, np.ndarray)
            parts.append((name, (leaf.shape, leaf.tobytes()) if array else repr(leaf)))
    return hash(tuple(parts))
