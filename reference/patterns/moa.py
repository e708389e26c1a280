r"""MoA: every head has a window of its own, whose length grows with the text at a rate of its own.

Most heads of a trained model look at what is near, and a few look far; one window for all of them
is too short for the latter or wasteful for the former. MoA gives each head an *elastic rule*, a
span that is a linear function of the length, measures on a little data what it costs the loss to
hide an entry of the attention, and lets an integer program choose the rules: lowest predicted loss
at a bounded mean density. The model is not trained; at run time a head reads the first tokens of
the text and its window, and its cache is as long as that.

Definition
----------
One rule, and so one s and one c, belongs to each kv head; its group of query heads shares them
(K7). T is the number of tokens, t a query's position and u a key's.

S1. **Span.** A rule :math:`(\alpha, \beta)` gives a head the span
:math:`S = \mathrm{int}(\alpha + \beta N)` at length N = prompt + new tokens at most. N is fixed
when the prompt is read: a span does not grow while tokens are decoded.

S2. **Sizes.** The head's cache has :math:`C = \lceil \max(\min(S, N), minimum) / split \rceil
split` slots; s = min(C, sink) of them are static, c = C - s circular. The sinks lie inside C, not
beside it.

S3. **Token mask.** Token t sees u <= t if u < s or t - u < c: the first s tokens, and the last c,
its own included (K8).

S4. **Block mask.** With blocks of b tokens, I that of the query and J that of the key, token t sees
u <= t if J < s / b or J > I - c / b. The c / b local blocks include the diagonal one, so that a
token sees between c - b + 1 and c local tokens.

S5. **Attend.** Softmax attention (K2) under S3 or S4, with its lse (K5).

S6. **Gradient.** That of dense attention on the pairs seen, through the output and through lse.

S7. **Circular cache.** The slots of the kv heads lie end to end, those of head h from
:math:`\sum_{h' < h} C_{h'}` on. The token that comes after i others goes to the head's slot i if
i < s, and to s + (i - s) mod c if not.

S8. **Writing.** Tokens are written in order; of many at once, a slot keeps the last. Tokens that a
mask marks as padding are neither stored nor counted. After n tokens min(n, C) slots are valid; they
hold the tokens 0 .. s-1 and n-c .. n-1, keys rotated, if at all, to positions in the text.

S9. **Decode.** The new token is written first; its query then attends to all valid slots, whose
order does not matter. That is a row of S3.

S10 and S11, how much an entry matters, are in `moa_influence`; S12 and S13, rules and what they
cost, in `moa_rules`; S14 and S15, the choice, in `moa_search`. `moa_masks` holds S1 to S4 and
`moa_cache` S7 to S9.

Complexity
----------
A head takes :math:`O(T C d)` time in prefill, and C slots of memory and O(C d) time a token in
decoding; the mean of C is what the plan bounds.

Paper and code
--------------
- The paper draws windows of tokens; the code's prefill works in blocks (S4), its decoding with
  tokens (S3). The two differ at the edge of the window, so that decoding goes on from a prefill in
  blocks with slightly other rows. Here tokens are the default and blocks an option.
- At run time the sinks are part of the span; the layouts of the search (S13) count one sink block
  beside it, and the density that the paper reports follows neither exactly. All stay as coded.
- The code repeats kv heads until each query head has its own. When it reduces the influence of a
  group to one number it takes heads h, h + kv_heads, ... together, while its attention gives kv
  head h the heads h group, h group + 1, ... (K7). Both are in `group_influence`; K7 is the default.
- The code turns the solver's 0.999 into rule 0 by cutting it; we round, and check the plan again.
  That a plan found twice is listed once is ours.
- Padding of a batch in prefill, a prefill on top of a cache, and prompts of less than a block are
  gaps that the authors state; the last is no special case here.
- Defaults: sink 64, minimum 128, split and block 64, up to 1024 new tokens; profiles of 2048, 4096
  and 8192 tokens, a density bound at 16384 besides, and a last choice among plans at 12288.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_attention_inputs, check_choice, check_size
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns.moa_cache import (
    cache_update,
    circular_slots,
    decode,
    decode_step,
)
from attnspec.reference.patterns.moa_influence import (
    block_influence,
    block_sum,
    group_influence,
    influence,
)
from attnspec.reference.patterns.moa_masks import (
    Sizes,
    cache_sizes,
    check_plan,
    moa_block_mask,
    moa_token_mask,
    span,
)
from attnspec.reference.patterns.moa_rules import density, layout, predicted_loss, rule_space
from attnspec.reference.patterns.moa_search import pareto, search, solve
from attnspec.reference.spec import PHASES, Coverage, Mechanism, Operation, Paper

GRANULARITIES = ("token", "block")


def moa_attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: Sizes,
    c: Sizes,
    *,
    granularity: str = "token",
    block: int = 64,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S3-S5: output (..., heads, T, dv) and lse (..., heads, T).

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv); `s` and `c` are a
    head's static and local tokens, one integer a kv head. `granularity` is "token" (S3) or "block"
    (S4), for which they are multiples of `block`.

    >>> q, v = np.zeros((2, 3, 1)), np.arange(6.0).reshape(2, 3, 1)
    >>> moa_attend(q, q, v, s=[0, 1], c=[1, 1])[0][..., 0]
    array([[0. , 1. , 2. ],
           [3. , 3.5, 4. ]])
    """
    mask = _visible(q, k, v, s, c, granularity, block)
    return attend(q, k, v, mask=mask, scale=scale)


def moa_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: Sizes,
    c: Sizes,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    granularity: str = "token",
    block: int = 64,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: gradients dq, dk, dv, shaped as q, k, v.

    `dout` (..., heads, T, dv) and `dlse` (..., heads, T) are the gradients of the two outputs of
    `moa_attend`; no `dlse` means lse is not used.

    >>> one = np.ones((1, 2, 1))
    >>> moa_attend_backward(one, one, one, [0], [1], one)[2].ravel()
    array([1., 1.])
    """
    mask = _visible(q, k, v, s, c, granularity, block)
    return attend_backward(q, k, v, dout, dlse, mask=mask, scale=scale)


def _visible(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, s: Sizes, c: Sizes, granularity: str, block: int
) -> np.ndarray:
    """S3, S4: bool (heads, T, T)."""
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    check_choice("granularity", granularity, GRANULARITIES)
    T, heads, kv_heads = q.shape[-2], q.shape[-3], k.shape[-3]
    if granularity == "token":
        mask = moa_token_mask(T, *check_plan(s, c, kv_heads))
    else:
        mask = moa_block_mask(T, *check_plan(s, c, kv_heads, block), block)
    return np.repeat(mask, heads // kv_heads, axis=0)


MECHANISM = Mechanism(
    title="MoA",
    idea="Each head has a window that grows with the length at a rate of its own, chosen by an "
    "integer program from what hiding an entry costs the loss.",
    paper=Paper(
        title="Mixture of Attention Spans: Optimizing LLM Inference Efficiency with Heterogeneous "
        "Sliding-Window Lengths",
        authors=("Tianyu Fu", "Haofeng Huang", "Xuefei Ning", "Genghan Zhang", "Boju Chen",
                 "Tianqi Wu", "Hongyi Wang", "Zixiao Huang", "Shiyao Li", "Shengen Yan",
                 "Guohao Dai", "Huazhong Yang", "Yu Wang"),
        year=2025,
        arxiv="2406.14909",
        venue="COLM 2025",
        code="thu-nics/MoA",
    ),
    operations=(
        Operation(span, clauses=("S1",)),
        Operation(cache_sizes, clauses=("S1", "S2")),
        Operation(moa_token_mask, clauses=("S3",)),
        Operation(moa_block_mask, clauses=("S4",)),
        Operation(moa_attend, clauses=("S3", "S4", "S5"), gradient=moa_attend_backward,
                  differentiable=("q", "k", "v")),
        Operation(circular_slots, clauses=("S7",)),
        Operation(cache_update, clauses=("S7", "S8")),
        Operation(decode, clauses=("S9",)),
        Operation(decode_step, clauses=("S7", "S8", "S9")),
        Operation(influence, clauses=("S10",)),
        Operation(block_sum, clauses=("S11",)),
        Operation(block_influence, clauses=("S10", "S11")),
        Operation(group_influence, clauses=("S11",)),
        Operation(rule_space, clauses=("S12",)),
        Operation(layout, clauses=("S13",)),
        Operation(predicted_loss, clauses=("S13",)),
        Operation(density, clauses=("S13",)),
        Operation(solve, clauses=("S14",)),
        Operation(search, clauses=("S14", "S15")),
        Operation(pareto, clauses=("S15",)),
    ),
    headline="moa_attend",
    coverage=Coverage(patterns=("causal self",), phases=PHASES, gradient=True),
)  # fmt: skip
