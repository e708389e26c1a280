"""Custom ops, and the way past them where nobody looks on.

Tracers, transforms and dispatch modes must find an engine's work behind a custom op. Where there
are none, PyTorch's dispatch would only take time, more of it than many kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import untraced, wants_gradient


class Operation:
    """A function of positional arguments as a custom op that changes none of them.

    It is called directly where no tracer, transform or mode must see the op, and by an autograd
    function if a gradient is wanted.
    """

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        self.run = run
        self.op = torch.library.custom_op(name, run, mutates_args=())
        self.function: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Tell the shapes of the results."""
        return self.op.register_fake(fake)

    def register_autograd(
        self, gradient: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Tell the gradient, as `torch.library.CustomOpDef` is told."""
        self.op.register_autograd(gradient, setup_context=setup_context)
        if setup_context is not None:
            self.function = _function(self.run, gradient, setup_context)

    def __call__(self, *arguments: Any) -> Any:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if untraced(*tensors):
            if not wants_gradient(*tensors):
                return self.run(*arguments)
            if self.function is not None:
                return self.function.apply(*arguments)
        return self.op(*arguments)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Make the decorated function the `Operation` of this name."""
    return lambda run: Operation(name, run)


def _function(
    run: Callable[..., Any], gradient: Callable[..., Any], setup: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The gradient where nobody looks on."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = run(*arguments)
            setup(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return gradient(ctx, *upstream)

    return Direct
