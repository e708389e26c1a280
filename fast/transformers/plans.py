"""How a mechanism is called from a model: the plan behind a registered name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnspec.fast import mechanism_modules
from attnspec.fast.backend import check_integer
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import flash

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Plan:
    """A mechanism with its options, as a model's layers call it.

    ``call(q, k, v, causal=, padding=, mask=, scale=)`` returns the output (batch, heads, q_tokens,
    dv). `padding` bool (batch, k_tokens) hides keys and goes with `causal`; `mask` bool, broadcast
    to the scores, says all by itself. `takes_mask` is False where only padding can be had, and
    `takes_padding` where not even that; `always_causal` says that there is no other order.
    """

    mechanism: str
    call: Call
    takes_mask: bool = True
    takes_padding: bool = True
    always_causal: bool = False


def make_plan(mechanism: str, options: Mapping[str, Any]) -> Plan:
    """The plan of `mechanism`, "slug" or "slug.operation"; ValueError says which are known."""
    if mechanism == "attention":
        _check_options(options, ())
        return Plan(mechanism, _dense)
    if mechanism == "streaming_llm":
        return _streaming(options)
    return _plain(mechanism, options)


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    padding: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Exact attention: the decode engine for a decoder's few queries, else the flash engine."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if mask is None and not trains and q.shape[2] <= MOST_DECODED:
        bias = None
        if padding is not None:
            hidden = torch.zeros(padding.shape, dtype=torch.float32, device=q.device)
            hidden = hidden.masked_fill(~padding, -torch.inf)
            bias = hidden[:, None].expand(-1, k.shape[1], -1)
        return decode(q, k, v, causal=causal, bias=bias, scale=scale)[0]
    return flash(q, k, v, causal=causal, key_mask=padding, mask=mask, scale=scale)[0]


def _streaming(options: Mapping[str, Any]) -> Plan:
    """Sinks and a window, `window` counting the query's own key (K8)."""
    _check_options(options, ("sinks", "window"))
    sinks, window = options.get("sinks", 4), options.get("window", 1024)
    check_integer("sinks", sinks, least=0)
    check_integer("window", window, least=1)

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        padding: Tensor | None,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        if padding is None:
            return flash(q, k, v, causal=True, window=window, sinks=sinks, scale=scale)[0]
        # Padding in front moves the sinks: they are the first real keys of each sequence.
        keys = torch.arange(k.shape[2], device=q.device)
        places = keys[-q.shape[2] :, None]
        first = padding.long().argmax(-1)[:, None, None]
        near = (keys > places - window) | (keys - first < sinks)
        seen = (keys <= places) & near & padding[:, None]
        return flash(q, k, v, mask=seen[:, None], scale=scale)[0]

    return Plan("streaming_llm", call, takes_mask=False, always_causal=True)


def _plain(mechanism: str, options: Mapping[str, Any]) -> Plan:
    """Any operation of q, k, v, `causal` and parameters that `options` can carry."""
    slug, dot, name = mechanism.partition(".")
    if slug not in mechanism_modules():
        known = ", ".join(sorted(s for s in mechanism_modules() if _operations(s, {})))
        raise ValueError(f"mechanism: got {mechanism!r}, expected one of: {known}")
    operations = _operations(slug, options)
    if not dot:
        fitting = [n for n, o in operations.items() if options.keys() <= _parameters(o).keys()]
        fitting = fitting or list(operations)
        name = fitting[0] if len(fitting) == 1 else ""
    if name not in operations:
        known = ", ".join(f"{slug}.{operation}" for operation in operations) or "another mechanism"
        raise ValueError(
            f"mechanism: got {mechanism!r}, expected an operation of queries, keys and values "
            f"alone but for its options: {known}{_missing(slug, options)}"
        )
    operation = operations[name]
    names = _parameters(operation).keys()
    ours = {"causal", "mask", "key_mask", "scale"}
    _check_options(options, sorted(names - ours - {"q", "k", "v"}))

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        padding: Tensor | None,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        given: dict[str, Any] = {"causal": causal, **options}
        if "scale" in names:
            given["scale"] = scale
        elif scale is not None and scale != q.shape[-1] ** -0.5:
            raise ValueError(f"scaling: got {scale}, expected 1/sqrt(d): {mechanism} has no scale")
        if padding is not None:
            by_key = "key_mask" in names
            given["key_mask" if by_key else "mask"] = padding if by_key else padding[:, None, None]
        if mask is not None:
            given["mask"] = mask
        result = operation(q, k, v, **given)
        return result[0] if isinstance(result, tuple) else result

    return Plan(
        mechanism,
        call,
        takes_mask="mask" in names,
        takes_padding=bool(names & {"mask", "key_mask"}),
    )


def _operations(slug: str, options: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """Operations of a mechanism that take q, k, v and `causal`, and else need `options` alone."""
    found = _attentions(slug)
    return {name: found[name] for name in found if not _needs(found[name]) - options.keys()}


def _missing(slug: str, options: Mapping[str, Any]) -> str:
    """Which options would make other operations fit, in words."""
    lacks = {name: _needs(o) - options.keys() for name, o in _attentions(slug).items()}
    said = (f"{slug}.{name} with {', '.join(sorted(some))}" for name, some in lacks.items() if some)
    return "".join(f", or {operation}" for operation in said)


def _attentions(slug: str) -> dict[str, Callable[..., Any]]:
    """Operations of a mechanism that take q, k, v and `causal`."""
    module: ModuleType = importlib.import_module(mechanism_modules()[slug])
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and list(_parameters(function))[:3] == ["q", "k", "v"]
        and "causal" in _parameters(function)
    }


def _needs(operation: Callable[..., Any]) -> set[str]:
    """What an operation must be given besides q, k and v."""
    parameters = _parameters(operation).values()
    return {p.name for p in parameters if p.default is p.empty} - {"q", "k", "v"}


def _parameters(operation: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(operation).parameters


def _check_options(options: Mapping[str, Any], known: tuple[str, ...] | list[str]) -> None:
    for option in options:
        if option not in known:
            expected = ", ".join(known) or "none"
            raise TypeError(f"{option}: got an unknown option, expected some of: {expected}")
