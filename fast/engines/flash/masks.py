"""Which option of the engine serves a mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def mask_options(k: Any, mask: Any) -> dict[str, Any]:
    """How the flash engine takes `mask`: one that only hides keys (batch, 1, 1, k_tokens) costs
    less as a key mask.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1:
        whole = isinstance(k, Tensor) and k.dim() == 4 and mask.shape[3] == k.shape[2]
        if whole and mask.shape[0] in (1, k.shape[0]):
            return {"key_mask": mask[:, 0, 0].expand(k.shape[0], -1)}
    return {"mask": mask}
