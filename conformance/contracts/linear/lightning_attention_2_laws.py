"""Laws of Lightning Attention-2 alone: what a block and an empty past may not change."""

from __future__ import annotations

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_anywhere, draw_case
from attnspec.conformance.trial import Trial


def _plain(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=(), cross=True)


def check_blocks(trial: Trial) -> None:
    """Blocks of one row, of a few, of all rows and of more rows than there are."""
    arguments = trial.arguments()
    rows = max(trial.case.sizes.get(axis, 0) for axis in ("tokens", "queries", "keys"))
    for block in (1, 3, 16, 32, 64, max(rows, 1), rows + 5):
        if trial.kernel.supports("block", block):
            changed = {**arguments, "block": block}
            trial.judge(trial.run(changed), changed)


def check_shift(trial: Trial) -> None:
    """Tokens without a value come first: the decay is relative, so nothing else changes."""
    arguments = trial.arguments()
    shifted = dict(arguments)
    rng = trial.case.generator("shift")
    silent = int(rng.choice([1, 13, 300]))
    for name in ("q", "k", "v"):
        x = arguments[name]
        past = rng.standard_normal((*x.shape[:-2], silent, x.shape[-1]))
        past = np.zeros_like(past) if name == "v" else past.astype(np.float16).astype(np.float64)
        shifted[name] = np.concatenate([past, x], axis=-2)
    outputs = trial.run(shifted)
    trial.judge({**outputs, "o": outputs["o"][..., silent:, :]}, arguments)


def _is_blockwise(contract: Contract, kernel: Kernel) -> bool:
    slug, _, name = contract.operation.partition(".")
    whole = ("attend", "attend_packed", "attend_padded")
    return slug == "lightning_attention_2" and name in whole


LAWS = (
    Law(
        "block-size",
        "How many rows a block has changes nothing.",
        ("K9",),
        draw_anywhere,
        check_blocks,
        applies=_is_blockwise,
        examples=0.3,
    ),
    Law(
        "shift",
        "Tokens without a value in front of all others change nothing.",
        ("K13",),
        _plain,
        check_shift,
        applies=lambda contract, kernel: contract.operation == "lightning_attention_2.attend",
        examples=0.3,
    ),
)
