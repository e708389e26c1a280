"""Mask and score functions refuse what does not fit, by the name of the argument."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from attnspec.fast import mechanism_modules

TEN, HALF = torch.arange(10), torch.ones(3, dtype=torch.float16)
R, TRUE = torch.zeros(1, 2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
MODULES = [stem for stem in mechanism_modules() if stem.endswith("_flex")]
PACKED = "attention_flex.packed_mask_mod"
SHARPENED = "softplus_attention_flex.reweighted_score_mod"

REFUSED: list[tuple[str, tuple[Any, ...], str]] = [
    ("attention_flex.mask_mod", (-1, 3), "q_tokens: got -1, expected an integer >= 0"),
    ("attention_flex.mask_mod", (3, 2.5), r"k_tokens: got 2\.5, expected an integer"),
    ("attention_flex.mask_mod", (3, 3, 1), "causal: got 1, expected True or False"),
    ("attention_flex.mask_mod", (3, 4, True, TRUE), r"key_mask: got 3, expected 4"),
    ("attention_flex.mask_mod", (3, 3, True, HALF), r"key_mask: got shape \(3,\)"),
    (PACKED, (TEN.float(), TEN), "q_offsets: got dtype torch.float32"),
    (PACKED, (TEN, TEN[:3]), "k_offsets: got 3, expected 10"),
    (PACKED, (TEN, TEN[:1]), "k_offsets: got 1 offsets, expected at least 2"),
    (PACKED, (TEN, TEN.flip(0)), r"k_offsets: got \[9, .*expected offsets that increase"),
    (PACKED, (TEN, TEN + 1), r"k_offsets: got \[1, .*expected offsets that increase"),
    ("streaming_llm_flex.mask_mod", (-1,), "S: got -1, expected an integer >= 0"),
    ("streaming_llm_flex.mask_mod", (1, 2.0), r"R: got 2\.0, expected an integer >= 0"),
    ("streaming_llm_flex.mask_mod", (1, 2, 0), "chunk: got 0, expected an integer >= 1"),
    ("streaming_llm_flex.mask_mod", (1, 2, [3, 0]), "chunk: got 0, expected an integer >= 1"),
    ("streaming_llm_flex.mask_mod", (1, 2, []), r"chunk: got \[\], expected at least one"),
    ("streaming_llm_flex.score_mod", (0.5,), "alibi_slopes: got float, expected torch.Tensor"),
    ("streaming_llm_flex.score_mod", (-HALF,), "alibi_slopes: got a slope that is not posi"),
    ("tempscale_flex.score_mod", (0,), "tau: got 0, expected a finite number > 0"),
    ("tempscale_flex.score_mod", (R,), r"tau: got shape \(1, 2, 3, 4\), expected \(heads\)"),
    ("tempscale_flex.score_mod", (HALF * torch.inf,), r"tau: got \[inf, .*> 0"),
    ("tempscale_flex.score_mod", (1.0, R[None]), r"bias: got shape \(1, 1, 2, 3, 4\)"),
    ("tempscale_flex.score_mod", (1.0, TRUE), "bias: got dtype torch.bool"),
    ("music_transformer_flex.score_mod", (TRUE,), r"R: got shape \(2, 3\), expected \(batch"),
    ("music_transformer_flex.score_mod", (R, False), "R: got 4 columns, expected 2 M - 1"),
    ("music_transformer_flex.score_mod", (R[..., :0],), "R: got 0 columns, expected at least"),
    ("music_transformer_flex.mask_mod", (0,), "b: got 0, expected an integer >= 1"),
    ("rcmha_flex.score_mod", (R, R[..., 0], 1.0), r"uk: got shape \(1, 2, 3\), expected"),
    ("rcmha_flex.score_mod", (R, R[:, :, 0, :1], 1.0), r"uk: .* of at least 3 tokens"),
    ("rcmha_flex.score_mod", (R, R[:, :, 0].double(), 1.0), "uk: got dtype torch.float64"),
    ("rcmha_flex.score_mod", (R[:, :, :2], R[:, :, 0, :2], None), "scale: got None"),
    ("rcmha_flex.mask_mod", (-2,), "M: got -2, expected an integer >= 0"),
    ("based_flex.mask_mod", (3, 3, -1), "left: got -1, expected an integer >= 0"),
    ("titans_flex.mac_mask_mod", (3, 0, 1), "C: got 0, expected an integer >= 1"),
    ("titans_flex.mac_mask_mod", (3, 1, 1, None), "tokenwise: got None, expected True or"),
    ("titans_flex.mag_mask_mod", (0, 1), "w: got 0, expected an integer >= 1"),
    ("titans_flex.mag_mask_mod", (1, -1), "N_p: got -1, expected an integer >= 0"),
    ("titans_flex.mal_mask_mod", (True,), "w: got True, expected an integer >= 1"),
    ("synaptic_resonance_flex.mask_mod", (0,), "window: got 0, expected an integer >= 1"),
    ("synaptic_resonance_flex.mask_mod", (1, TEN), r"valid: got shape \(10,\), expected"),
    ("entropy_abf_flex.mask_mod", (HALF, TEN), "pq: got dtype torch.float16, expected one"),
    ("entropy_abf_flex.mask_mod", (TEN, R), r"pk: got shape .*, expected \(S\)"),
    ("entropy_abf_flex.mask_mod", (TEN, TEN, True, TRUE), "key_mask: got 3, expected 10"),
    ("entropy_abf_flex.score_mod", (TEN,), "lam: got dtype torch.int64, expected one of"),
    ("softplus_attention_flex.score_mod", (TRUE, 8), "n: got dtype torch.bool, expected"),
    ("softplus_attention_flex.score_mod", (TEN, 0), "d: got 0, expected an integer >= 1"),
    (SHARPENED, (TEN[:3], 8, TRUE), r"lse: got shape \(2, 3\), expected \(batch, heads"),
    (SHARPENED, (TEN, 8, R[0]), r"lse: got 4, expected 10 \(q_tokens, as in n\)"),
    (SHARPENED, (TEN[None, :4].expand(2, 4), 8, R[0, :1]), "lse: got 1, expected 2"),
    (SHARPENED, (TEN[:4], 8, R[0], 0.5), r"p: got 0\.5, expected a finite number >= 1"),
    (SHARPENED, (TEN[:4], 8, R[0], 15, -1e-8), "eps: got -1e-08, expected a finite number >= 0"),
    (SHARPENED, (TEN[:4], 8, R[0], 15, 0.0, 0), "warm: got 0, expected an integer >= 1"),
    ("ee_mllm_flex.mask_mod", (TRUE, TEN), r"is_visual: got shape \(2, 3\), expected \(S\)"),
    ("ee_mllm_flex.mask_mod", (TRUE[0], TEN[:3], "none"), "image_visible: got 'none', expected"),
    ("moh_flex.mask_mod", (TRUE,), r"active: got shape \(2, 3\), expected \(batch, q_tokens"),
    ("seer_attention_flex.mask_mod", (R, 4), "M: got dtype torch.float32, expected one of"),
    ("seer_attention_flex.mask_mod", (R > 0, 4), "M: got 4, expected 3"),
    ("lean_attention_flex.mask_mod", (3, TEN - 1), r"lengths: got \[-1, .*expected lengths"),
    ("lean_attention_flex.mask_mod", (-3, TEN), "Tq: got -3, expected an integer >= 0"),
]


def functions(stem: str) -> dict[str, Any]:
    module = importlib.import_module(mechanism_modules()[stem])
    members = inspect.getmembers(module, inspect.isfunction)
    return {n: f for n, f in members if f.__module__ == module.__name__ and n[0] != "_"}


@pytest.mark.parametrize(("function", "given", "message"), REFUSED)
def test_refusals(function: str, given: tuple[Any, ...], message: str) -> None:
    stem, _, name = function.partition(".")
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        functions(stem)[name](*given)


@pytest.mark.parametrize("stem", MODULES)
def test_modules_hold_mask_and_score_functions(stem: str) -> None:
    """Named so, which is what the documentation lists them by."""
    found = functions(stem)
    assert found
    assert all(name.endswith(("mask_mod", "score_mod")) for name in found)
    assert all(f.__doc__ for f in found.values())
