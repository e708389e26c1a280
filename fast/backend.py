"""Which backend a call runs on, and the argument checks every fast operation shares (K14)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("numba", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*DTYPES, torch.float64)
INTEGERS = (torch.int32, torch.int64)

launches = 0
"""How many kernels this process has launched: proof for the suite that a kernel really ran."""


def count_launch() -> None:
    """Called by every engine beside its kernel launch."""
    global launches
    launches += 1


def launch_count() -> int:
    """How many kernels have been launched so far."""
    return launches


def interpreting() -> bool:
    """True if Triton kernels run in its interpreter, where CPU tensors are their natural input."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def choose_backend(backend: str | None, tensor: torch.Tensor) -> str:
    """The backend that runs a call on `tensor`: its device decides unless `backend` is forced.

    ValueError if the forced backend cannot run on the tensor's device; nothing falls back.
    """
    if backend is None:
        return "triton" if tensor.is_cuda else "numba"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of 'numba', 'triton' or None")
    if backend == "numba" and tensor.is_cuda:
        raise ValueError("backend: got 'numba' with CUDA tensors, expected CPU tensors")
    if backend == "triton" and not tensor.is_cuda and not interpreting():
        raise ValueError("backend: got 'triton' with CPU tensors, expected CUDA tensors")
    return backend


def choose_by_dtype(backend: str | None, name: str, tensor: torch.Tensor) -> str:
    """As `choose_backend`; float64, of the argument called `name`, is for the CPU alone."""
    chosen = choose_backend(backend, tensor)
    if chosen == "triton" and tensor.dtype == torch.float64:
        raise TypeError(f"{name}: got dtype torch.float64, expected float32, float16 or bfloat16")
    return chosen


def load(module: str) -> ModuleType:
    """A module of kernels, imported on first use; one sentence if what it needs is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{error.name} is not installed: pip install "attnspec[fast]"', name=error.name
        ) from error


def check_tensor(
    name: str, x: Any, axes: Sequence[str], dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    """`x` is a tensor with exactly the named axes and one of `dtypes`."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected torch.Tensor")
    if x.dim() != len(axes):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected ({', '.join(axes)})")
    if x.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {x.dtype}, expected one of {expected}")
    # Custom ops drop a tangent without a word: the derivative would be 0.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise TypeError(
            f"{name}: got a tangent of forward-mode differentiation (torch.func.jvp, jacfwd), "
            "expected none: gradients are reverse-mode only"
        )


def check_same(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`x` has the dtype and the device of `other`."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as {other_name}")
    check_device(name, x, other_name, other)


def check_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """`x` lies where `other` lies."""
    if x.device != other.device:
        raise ValueError(f"{name}: got device {x.device}, expected {other.device}, as {other_name}")


def check_size(name: str, got: int, expected: int, what: str) -> None:
    """One axis of argument `name` has the size another argument gives it."""
    if got != expected:
        raise ValueError(f"{name}: got {got}, expected {expected} ({what})")


def check_shape(name: str, x: torch.Tensor, shape: Sequence[int]) -> None:
    """`x` has this shape."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(shape)}")


def check_integer(name: str, value: Any, least: int) -> None:
    """`value` is an integer, not a bool, and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}, expected an integer >= {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected an integer >= {least}")


def check_positive(name: str, value: Any) -> None:
    """`value` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected a finite number > 0")
    if not (float(value) > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected a finite number > 0")


def check_scale(scale: Any) -> None:
    """`scale` is a finite number, or None for the default."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale: got {scale!r}, expected a finite number or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number or None")


def check_broadcast(name: str, x: torch.Tensor, shape: Sequence[int]) -> None:
    """`x` broadcasts to `shape` without adding to it."""
    padded = (1,) * (len(shape) - x.dim()) + tuple(x.shape)
    if len(padded) > len(shape) or any(
        have not in (1, want) for have, want in zip(padded, shape, strict=True)
    ):
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected one that broadcasts to {tuple(shape)}"
        )


def check_mask(
    name: str, mask: Any, other_name: str, other: torch.Tensor, shape: Sequence[int]
) -> None:
    """`mask` is bool, on the device of `other`, and broadcasts to `shape`."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, expected torch.Tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {mask.dtype}, expected bool")
    check_device(name, mask, other_name, other)
    check_broadcast(name, mask, shape)


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_bool(name: str, value: Any) -> None:
    """`value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected True or False")


def check_attention_inputs(q: Any, k: Any, v: Any, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    """q, k and v fit one another: (batch, heads, tokens, d), kv heads dividing the heads."""
    check_tensor("q", q, ("batch", "heads", "q_tokens", "d"), dtypes)
    check_tensor("k", k, ("batch", "kv_heads", "k_tokens", "d"), dtypes)
    check_tensor("v", v, ("batch", "kv_heads", "k_tokens", "dv"), dtypes)
    check_same("k", k, "q", q)
    check_same("v", v, "q", q)
    check_size("k", k.shape[0], q.shape[0], "batch, as in q")
    check_size("k", k.shape[3], q.shape[3], "d, as in q")
    check_size("v", v.shape[0], k.shape[0], "batch, as in k")
    check_size("v", v.shape[1], k.shape[1], "kv_heads, as in k")
    check_size("v", v.shape[2], k.shape[2], "k_tokens, as in k")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"k: got {kv_heads} kv heads for {heads} query heads, expected a divisor of {heads}"
        )


def check_group(name: str, x: torch.Tensor, heads: int) -> None:
    """The kv heads of x (batch, kv_heads, ...) divide the heads."""
    if x.shape[1] < 1 or heads % x.shape[1]:
        raise ValueError(f"{name}: got {x.shape[1]} kv heads, expected a divisor of the heads")


PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def unobserved(*tensors: torch.Tensor | None) -> bool:
    """True if nothing around must see a custom op (no gradient, no tracer, no transform, no mode):
    its implementation may then be called directly, past tens of microseconds of dispatch.
    """
    return untraced(*tensors) and not wants_gradient(*tensors)


def underivable(*tensors: torch.Tensor | None) -> bool:
    """True if no gradient of `tensors` can be asked for, and `torch.compile` alone may look on."""
    if torch.compiler.is_compiling():
        return not wants_gradient(*tensors)
    return unobserved(*tensors)


def untraced(*tensors: torch.Tensor | None) -> bool:
    """True if nothing around but a gradient must see a custom op."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    return all(type(x) in PLAIN for x in tensors)


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """True if a gradient of one of `tensors` may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


FAR = 1 << 31


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of sums, lse and states of x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: torch.Tensor) -> torch.Tensor:
    """x as it is summed: float64 as it is, everything else as float32."""
    return x.to(wide_dtype(x))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b for any strides: cuBLAS refuses those of 2^31 and more, so such operands are copied."""
    a, b = (x.contiguous() if any(s >= FAR for s in x.stride()) else x for x in (a, b))
    return a @ b
