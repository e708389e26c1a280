"""Attention of this package inside models of the transformers library.

``register()`` makes the implementations "attnspec" and "attnspec_streaming" known to the library;
``register("mine", mechanism="tempscale", tau=0.9)`` any mechanism with an operation of queries,
keys and values and else of options alone, ``register("groups", mechanism="longlora", G=2048)`` one
to train with. A model then takes the name as its ``attn_implementation``. What an implementation
cannot do raises an error and is never left out.
"""

from attnspec.fast.transformers.registry import PRESETS, register

__all__ = ["PRESETS", "register"]
