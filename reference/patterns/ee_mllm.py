r"""EE-MLLM's composite attention: text attends to images and text, image tokens to nothing.

A vision-language model that puts hundreds of image tokens before the text spends most of its
attention on pairs of image tokens. Composite attention deletes these: only text tokens have
queries, and one softmax covers the images and the text before them. Image tokens still pass through
every layer, each on its own, by the layer's own weights, so that at each depth their keys and
values lie in the layer's space; nothing is added to the model.

Definition
----------
S tokens, Nv of images (`is_visual`) and Nt of text, stand at different positions in the text, with
which they are rotated. X are their states at a layer, with its projections :math:`W_q, W_k, W_v,
W_o`, norms and FFN.

S1. **Project.** Image tokens give keys and values, :math:`k = norm_1(X) W_k` and :math:`v =
norm_1(X) W_v`; text tokens give queries besides. Queries and keys are rotated to their positions.

S2. **Mask.** A text token sees the tokens at its own and earlier positions (K3, by position and not
by place in memory). With `image_visible` = "all" it sees all image tokens, earlier or not. Padding
hides keys. An image token sees itself alone, no other of its own image or of another.

S3. **Attend.** Text tokens attend to all they see in *one* softmax (K2, K5, K7); a row that sees
nothing is 0 (K4). Then :math:`X_t \leftarrow X_t + O W_o` and :math:`X_t \leftarrow X_t +
FFN(norm_2(X_t))`.

S4. **Align.** Image tokens, in mode `self`: the softmax over one key is 1, so that attention
returns v itself, each kv head's value for all query heads of its group: :math:`X_v \leftarrow X_v +
v W_o`, then the FFN as in S3. In mode `ffn` only the FFN; in mode `frozen` nothing, and every layer
projects the same states.

S5. **Layers.** Composite attention in some layers, plain causal attention of all tokens in the
others. What the last layer makes of its image tokens is not used.

S6. **Decode.** As with any cache, new text tokens attend to the keys and values of all tokens so
far. States of images do not depend on the text: their keys and values can be kept for other prompts
with the same positions.

S7. **Gradient.** Of attention that of dense attention with the mask of S2: image tokens get theirs
through keys and values only. A layer's is that of its states and of all its weights, to which both
kinds of token add.

S8. **Cost.** A multiply-add counts 2. An image token saves its query projection and its attention:
of S tokens with width D and FFN width F, images first,
:math:`Nt (8 D^2 + 6 D F) + Nv (6 D^2 + 6 D F) + 4 D (Nt Nv + Nt (Nt + 1) / 2)` a layer instead of
:math:`S (8 D^2 + 6 D F) + 2 D S (S + 1)`.

S2, S3 and attention's part of S7 are in `ee_mllm_attention`, a layer's part in `ee_mllm_gradient`;
S1, S4, S8 and the record of a layer in `ee_mllm_layers`.

Complexity
----------
:math:`Nt (Nv + Nt / 2)` pairs of tokens instead of :math:`(Nv + Nt)^2 / 2`; the FFN of the image
tokens remains, and dominates.

Paper and code
--------------
There is no public code, and the paper's abstract fixes only that image tokens do not attend to one
another, and that each layer's own weights align them. The rest is ours and not verified:

- mode `self` as the default of S4, with the other two as options; where the norms are (before
  attention and before the FFN, as in Llama); which layers the training-free variant makes
  composite;
- `image_visible` = "causal", the order of LLaVA, in which text before an image does not see it.

A summary of the paper lets image tokens attend to text: with text as the only query, and the
question behind the image, that cannot be, and we do not follow it. Another has 24 % fewer
operations; by S8 a model of 7 billion weights (D = 4096, F = 11008, 32 layers) saves 8 % with 576
image and 100 text tokens, and 13 % with 2880, because the FFN remains. The paper reports a prefill
of 79 ms where LLaVA takes 277 (one H800); we have not measured that.

Mode `self` is causal attention with the mask :math:`j \le i` and (i is text or i = j).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_choice, check_integer, check_size
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns.ee_mllm_attention import (
    VISIBILITIES,
    composite_attention,
    composite_attention_backward,
    composite_mask,
)
from attnspec.reference.patterns.ee_mllm_gradient import (
    aligner_update_backward,
    layer_step_backward,
)
from attnspec.reference.patterns.ee_mllm_layers import (
    MODES,
    Layer,
    aligner_update,
    check_layer,
    feed_forward,
    flops,
    join_heads,
    project,
)
from attnspec.reference.spec import HEADS, PHASES, Coverage, Mechanism, Operation, Paper


def layer_step(
    Xt: np.ndarray,
    Xv: np.ndarray,
    layer: Layer,
    pos_t: np.ndarray,
    pos_v: np.ndarray,
    mode: str = "self",
    *,
    image_visible: str = "causal",
) -> tuple[np.ndarray, np.ndarray]:
    """S1-S4: the states of text (..., Nt, D) and of images (..., Nv, D) after a layer.

    `pos_t` int (Nt,) and `pos_v` int (Nv,), all different. The images' keys and values are made of
    the states that come in.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1, None)
    >>> Xt, Xv = layer_step(eye, eye[:1], layer, np.array([0, 2]), np.array([1]))
    >>> Xt.shape, Xv.round(3)
    ((2, 2), array([[2.414, 0.   ]]))
    """
    _check_states(Xt, Xv, layer, pos_t, pos_v)
    _check_options(mode, image_visible)
    qt, kt, vt = project(Xt, layer, pos_t)
    _, kv, vv = project(Xv, layer, pos_v)
    images, text = Xv.shape[-2], Xt.shape[-2]
    Ot, _ = composite_attention(
        qt,
        np.concatenate([kv, kt], axis=-2),
        np.concatenate([vv, vt], axis=-2),
        np.arange(images + text) < images,
        np.concatenate([pos_v, pos_t]),
        image_visible,
    )
    Xt = feed_forward(Xt + join_heads(Ot) @ layer.Wo, layer)
    return Xt, aligner_update(Xv, layer, mode)


def run_layers(
    Xt: np.ndarray,
    Xv: np.ndarray,
    stack: Sequence[Layer],
    pos_t: np.ndarray,
    pos_v: np.ndarray,
    layers: Collection[int] | None = None,
    mode: str = "self",
    *,
    image_visible: str = "causal",
) -> tuple[np.ndarray, np.ndarray]:
    """S5: the states after all layers of a `stack`; those numbered in `layers` are composite.

    The others are plain causal attention of all tokens; by default none are.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1, None)
    >>> run_layers(eye, eye[:1], [layer] * 2, np.array([0, 2]), np.array([1]), [])[1].round(3)
    array([[3.828, 0.   ]])
    """
    chosen = range(len(stack)) if layers is None else layers
    for number in chosen:
        check_integer("layers", number, least=0)
        if number >= len(stack):
            raise ValueError(f"layers: got {number}, expected numbers below {len(stack)}")
    _check_options(mode, image_visible)
    for layer in stack:
        _check_states(Xt, Xv, layer, pos_t, pos_v)
    for number, layer in enumerate(stack):
        if number in chosen:
            Xt, Xv = layer_step(Xt, Xv, layer, pos_t, pos_v, mode, image_visible=image_visible)
        else:
            Xt, Xv = dense_step(Xt, Xv, layer, pos_t, pos_v)
    return Xt, Xv


def dense_step(
    Xt: np.ndarray, Xv: np.ndarray, layer: Layer, pos_t: np.ndarray, pos_v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S5: the same as `layer_step` for a layer in which all tokens attend causally to all.

    >>> eye, one = np.eye(2), np.ones(2)
    >>> layer = Layer(one, eye, eye, eye, eye, one, (0 * eye, eye, eye), 1, 1, None)
    >>> dense_step(eye, eye[:1], layer, np.array([0, 2]), np.array([1]))[1].round(3)
    array([[2.414, 0.   ]])
    """
    _check_states(Xt, Xv, layer, pos_t, pos_v)
    pos = np.concatenate([pos_v, pos_t])
    X = np.concatenate([Xv, Xt], axis=-2)
    q, k, v = project(X, layer, pos)
    out, _ = attend(q, k, v, mask=composite_mask(np.zeros(len(pos), bool), pos))
    X = feed_forward(X + join_heads(out) @ layer.Wo, layer)
    return X[..., Xv.shape[-2] :, :], X[..., : Xv.shape[-2], :]


def _check_options(mode: Any, image_visible: Any) -> None:
    """K14: how images are aligned and seen."""
    check_choice("mode", mode, MODES)
    check_choice("image_visible", image_visible, VISIBILITIES)


def _check_states(Xt: Any, Xv: Any, layer: Any, pos_t: Any, pos_v: Any) -> None:
    """K14: states, positions and the layer fit one another."""
    check_array("Xt", Xt, ("Nt", "D"))
    check_array("Xv", Xv, ("Nv", "D"))
    check_layer(layer, "Xt", Xt)
    check_layer(layer, "Xv", Xv)
    if Xv.shape[:-2] != Xt.shape[:-2]:
        raise ValueError(f"Xv: got leading axes {Xv.shape[:-2]}, expected {Xt.shape[:-2]}, as Xt")
    for name, pos, X in (("pos_t", pos_t, Xt), ("pos_v", pos_v, Xv)):
        check_array(name, pos, ("tokens",), dtype="int")
        check_size(name, pos.ndim, 1, "axes")
        check_size(name, len(pos), X.shape[-2], "tokens")
    if len(np.unique(np.concatenate([pos_v, pos_t]))) < len(pos_v) + len(pos_t):
        raise ValueError("pos_t: got a position twice, expected all different, those of images too")


MECHANISM = Mechanism(
    title="EE-MLLM composite attention",
    idea="Text attends to images and text in one softmax; image tokens attend to nothing, and pass "
    "through the layer's own projections.",
    paper=Paper(
        title="EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model",
        authors=("Feipeng Ma", "Yizhou Zhou", "Zheyu Zhang", "Shilin Yan", "Hebei Li", "Zilong He",
                 "Siying Wu", "Fengyun Rao", "Yueyi Zhang", "Xiaoyan Sun"),
        year=2024,
        arxiv="2408.11795",
    ),
    operations=(
        Operation(composite_mask, clauses=("S2",)),
        Operation(composite_attention, clauses=("S2", "S3", "S6"),
                  gradient=composite_attention_backward, differentiable=("qt", "k", "v")),
        Operation(aligner_update, clauses=("S4", "S7"),
                  gradient=aligner_update_backward, differentiable=("Xv", "layer")),
        Operation(layer_step, clauses=("S1", "S2", "S3", "S4", "S7"),
                  gradient=layer_step_backward, differentiable=("Xt", "Xv", "layer")),
        Operation(run_layers, clauses=("S5",)),
        Operation(flops, clauses=("S8",)),
    ),
    headline="layer_step",
    coverage=Coverage(
        patterns=("causal self", "causal cross"),
        phases=PHASES,
        paddings=("none", "left", "right"),
        heads=HEADS,
        gradient=True,
    ),
)  # fmt: skip
