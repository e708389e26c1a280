"""Registering a mechanism: its attention function and, always with it, its mask function."""

from __future__ import annotations

import importlib
from typing import Any

from attnspec.fast.transformers.layer import attention_function
from attnspec.fast.transformers.masks import mask_function
from attnspec.fast.transformers.plans import make_plan

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "attnspec": ("attention", {}),
    "attnspec_streaming": ("streaming_llm", {"sinks": 4, "window": 1024}),
}
"""What ``register()`` registers: name -> mechanism and options."""

RESERVED = ("eager", "sdpa", "flash", "flex_attention", "/", "|", ":", "@")
"""Parts of a name by which the library recognises its own implementations, or one to download."""

registered: set[str] = set()
"""Names of ours, which may be registered again with other options."""


def register(name: str | None = None, mechanism: str = "attention", **options: Any) -> list[str]:
    """Make `mechanism` with `options` an attention implementation called `name`; returns the names.

    Without a name, the `PRESETS`. ``mechanism`` is "attention" (exact; the default),
    "streaming_llm" (``sinks``, ``window``) or any mechanism with an operation of queries, keys and
    values and else of `options` alone, written "slug" or "slug.operation"; options are that
    operation's parameters. The name goes where the library takes an ``attn_implementation``; a
    model that is trained with one and read with another changes by its own
    ``set_attn_implementation``.

    TypeError or ValueError for an unknown mechanism or option or a name that the library reserves;
    ImportError if the library is not installed.
    """
    if name is None:
        if mechanism != "attention" or options:
            raise ValueError(f"name: got None, expected a name for {mechanism} with {options}")
        return [n for preset, (m, o) in PRESETS.items() for n in register(preset, m, **o)]
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected a string")
    taken = [part for part in RESERVED if part in name]
    if not name or taken:
        raise ValueError(f"name: got {name!r}, expected one without {taken or 'being empty'}")
    plan = make_plan(mechanism, options)
    library = _library()
    if name in library.AttentionInterface().valid_keys() and name not in registered:
        raise ValueError(f"name: got {name!r}, expected one that is not registered by others")
    library.AttentionInterface.register(name, attention_function(name, plan))
    library.AttentionMaskInterface.register(name, mask_function(name, plan))
    registered.add(name)
    return [name]


def _library() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            'transformers is not installed: pip install "attnspec[transformers]"', name=error.name
        ) from error
