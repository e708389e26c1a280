"""A kernel under test: one object, whichever way it reaches the suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from attnspec.conformance.arrays import ArrayKind, array_kind
from attnspec.conformance.dtypes import DTYPES
from attnspec.reference import find_operation


@dataclass(frozen=True)
class Known:
    """A known failure: cases for which `when` is true break `law`, tracked as `issue`.

    `witness` is a saved case that must still fail (an unexpected pass is reported); `quarantine`
    keeps matching cases from being run at all, for crashes and hangs.
    """

    law: str
    issue: str
    when: Callable[[Any], bool]
    witness: str
    quarantine: bool = False


class Tuner(Protocol):
    """What chooses a kernel's configurations by key, from candidates that are plain data. A kernel
    that is sent to another process takes its tuner with it, so pickle must be able to.
    """

    def watch(self) -> AbstractContextManager[set[str]]:
        """The keys that calls inside the block ask for; all of them, even in a repeated call."""

    def candidates(self, key: str) -> Sequence[Mapping[str, Any]]:
        """The configurations worth trying, the one in force first."""

    def force(self, key: str, fields: Mapping[str, Any], /) -> AbstractContextManager[None]:
        """Run calls inside the block with one of the candidates of a key."""


@dataclass(frozen=True)
class Kernel:
    """Anything that claims to compute one operation.

    call: takes the operation's own arguments, in the array library named by `array`.
    backward: for a kernel without autograd, its own gradient function with the signature of the
        reference's; a torch kernel with ``gradient=True`` is differentiated by autograd.
    limits: axis, parameter, option or cell -> the values it supports (anything with ``in``).
        A case outside must raise TypeError or ValueError; inside, everything must pass.
    draws: axis -> the sizes cases are drawn from, where every new size costs a compilation. No
        limit: other sizes are claimed, only not tried.
    blocks: the kernel's tile sizes; ragged lengths are drawn around them.
    configs: name -> context manager that forces one tuning configuration; each is tested alone.
    tuner: what ``attnspec tune`` asks for the choices a call makes, and forces them through.
    ties: "lowest" claims rule K6 exactly, "any" lets equal scores fall either way.
    launches: a counter that rises with every real launch, so that a fallback shows.
    reads_values: False for a device kernel that would have to wait for the device to see what an
        array holds: a wrong value in an array of the right shape and dtype is then not refused.
    exact_prefix: False for a causal kernel that scales a block of tokens as a whole, so that later
        tokens change the rounding of earlier rows.
    compiled, graph: claims torch.compile(fullgraph=True) and CUDA-graph capture.
    """

    name: str
    operation: str
    call: Callable[..., Any]
    array: str = "numpy"
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    backend: str = ""
    gradient: bool = False
    backward: Callable[..., Any] | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    draws: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: tuple[int, ...] = (16, 64)
    configs: Mapping[str, Callable[[], AbstractContextManager[Any]]] = field(default_factory=dict)
    tuner: Tuner | None = None
    ties: str = "lowest"
    deterministic: bool = True
    launches: Callable[[], int] | None = None
    reads_values: bool = True
    exact_prefix: bool = True
    compiled: bool = False
    graph: bool = False
    known: tuple[Known, ...] = ()
    largest: int = 4096

    def __post_init__(self) -> None:
        if not callable(self.call):
            raise TypeError(f"call: got {type(self.call).__name__}, expected a callable")
        for name, value, choices in (
            ("array", self.array, ("numpy", "torch")),
            ("device", self.device, ("cpu", "cuda")),
            ("ties", self.ties, ("lowest", "any")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {choices}")
        unknown = set(self.dtypes) - set(DTYPES)
        if unknown or not self.dtypes:
            raise ValueError(f"dtypes: got {self.dtypes}, expected some of {DTYPES}")
        if self.array == "numpy" and "bfloat16" in self.dtypes:
            raise ValueError("dtypes: got 'bfloat16', expected dtypes NumPy has")
        find_operation(self.operation)

    @property
    def arrays(self) -> ArrayKind:
        return array_kind(self.array, self.device)

    @property
    def differentiates(self) -> bool:
        return self.gradient or self.backward is not None

    def supports(self, name: str, value: Any) -> bool:
        """Whether `limits` allows an axis, parameter, option or cell to have a value."""
        return name not in self.limits or value in self.limits[name]
