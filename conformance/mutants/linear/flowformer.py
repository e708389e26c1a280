"""Wrong kernels of Flowformer: epsilons, counts and clamps in the wrong places, later sinks."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.linear import flowformer, flowformer_causal, flowformer_flows

ATTEND = right("flowformer.flow_attend")
BACKWARD = flowformer.flow_backward
CAUSAL = right("flowformer.flow_attend_causal")
CAUSAL_BACKWARD = flowformer_causal.flow_causal_backward
STEP = right("flowformer.flow_decode_step")
FLOWS = right("flowformer.flows")
FLOWS_CAUSAL = right("flowformer.flows_causal")
CONSERVED_CAUSAL = right("flowformer.conserved_flows_causal")
COMPETITION = right("flowformer.competition")
COMPETITION_CAUSAL = right("flowformer.competition_causal")
ALLOCATION = right("flowformer.allocation")
FEATURES = right("flowformer.flow_features")
# Names that mutants replace while they run are kept here as they are.
tokens, quotient = flowformer._tokens, flowformer.quotient


def one_factor(a: np.ndarray, b: np.ndarray, eps: float = 1e-6) -> Any:
    """eps is added to the sums only."""
    FLOWS(a, b, eps)
    into, out_of = (np.sum(x, axis=-2, keepdims=True) for x in (b, a))
    return np.sum(a * (into + eps), axis=-1), np.sum(b * (out_of + eps), axis=-1)


def eps_in_features(*args: Any) -> Any:
    """The aggregated features carry eps as well."""
    a, b, values, n, m = tokens(*args)
    return a + args[3], b + args[3], values, n, m


def over_heads(Oh: np.ndarray, clamp: Any = (-1.0, 1.0), mask: Any = None) -> np.ndarray:
    """The softmax runs over heads."""
    c = COMPETITION(Oh, clamp, mask)
    x = np.exp(flowformer_flows.clip(Oh, clamp))
    return np.where(c == 0, c, x / x.sum(axis=-2, keepdims=True) * Oh.shape[-2])


def no_count(Oh: np.ndarray, clamp: Any = (-1.0, 1.0), mask: Any = None) -> np.ndarray:
    return COMPETITION(Oh, clamp, mask) / max(Oh.shape[-1], 1)


def longest_count(Oh: np.ndarray, clamp: Any = (-1.0, 1.0), mask: Any = None) -> np.ndarray:
    """Padded sources are counted."""
    c = COMPETITION(Oh, clamp, mask)
    if mask is None:
        return c
    count = np.maximum(mask.sum(axis=-1), 1)[..., None, None]
    return (c * (Oh.shape[-1] / count)).astype(c.dtype)


def clamped_late(Oh: np.ndarray, clamp: Any = (-1.0, 1.0), mask: Any = None) -> np.ndarray:
    c = COMPETITION(Oh, None, mask)
    return flowformer_flows.clip(c, clamp)


def no_ratio(Ih: np.ndarray, n: Any, m: Any) -> np.ndarray:
    return ALLOCATION(Ih, m, m)


def padded_sinks(*args: Any) -> Any:
    """Padded queries are counted in n."""
    a, b, values, n, m = tokens(*args)
    return a, b, values, np.full_like(n, a.shape[-2]), m


def mean_of_sources(a: np.ndarray, b: np.ndarray, eps: float = 1e-6) -> Any:
    """What comes into a sink is a mean over the sources."""
    I, O = FLOWS(a, b, eps)
    return (I / max(b.shape[-2], 1)).astype(I.dtype), O


def clamped_sinks(Ih: np.ndarray, n: Any, m: Any) -> np.ndarray:
    return ALLOCATION(np.minimum(Ih, Ih.dtype.type(1)), n, m)


def unmasked(arguments: dict[str, Any]) -> None:
    """The authors' advice: values of padded keys are set to 0, and nothing else."""
    mask, v = arguments["key_mask"], arguments["v"]
    if isinstance(mask, np.ndarray) and mask.dtype == bool and mask.shape == v.shape[::2]:
        for name in ("k", "v"):
            hidden = ~mask[:, None, :, None]
            arguments[name] = np.where(hidden, np.zeros_like(arguments[name]), arguments[name])
        arguments["key_mask"] = None


def first_mask(arguments: dict[str, Any]) -> None:
    mask = arguments["key_mask"]
    if isinstance(mask, np.ndarray) and len(mask):
        arguments["key_mask"] = np.repeat(mask[:1], len(mask), axis=0)


def wrong_feature(x: np.ndarray, kind: str = "sigmoid") -> np.ndarray:
    phi = FEATURES(x, kind)
    return phi if kind == "sigmoid" else phi - phi.dtype.type(1e-6)


def all_sinks(a: np.ndarray, b: np.ndarray, eps: float = 1e-6) -> Any:
    """O sums all sinks, later ones too."""
    I, _ = FLOWS_CAUSAL(a, b, eps)
    return I, FLOWS(a, b, eps)[1]


def from_zero(a: np.ndarray, b: np.ndarray, I: Any, O: Any, eps: float = 1e-6) -> Any:
    """N counts from 0, and is taken as 1 where it divides."""
    Ih, Oh = CONSERVED_CAUSAL(a, b, I, O, eps)
    N = np.arange(1, Ih.shape[-1] + 1)
    return (Ih * N / np.maximum(N - 1, 1)).astype(Ih.dtype), Oh


def renormalised(Oh: np.ndarray, clamp: Any = (-1.0, 1.0)) -> np.ndarray:
    """All tokens share one sum."""
    COMPETITION_CAUSAL(Oh, clamp)
    return COMPETITION(Oh, clamp)


def by_stages(**steps: Any) -> Any:
    """`flow_attend_causal` from the chapter's stages, with wrong ones among them."""
    causal_flows = steps.get("flows", FLOWS_CAUSAL)
    compete = steps.get("competition", COMPETITION_CAUSAL)

    def attend(q: Any, k: Any, v: Any, state: Any = None, **options: Any) -> Any:
        right_ones = CAUSAL(q, k, v, state, **options)
        if state is not None:
            return right_ones
        eps, clamp = options.get("eps", 1e-6), options.get("clamp", (-1.0, 1.0))
        kind, heads = options.get("kind", "sigmoid"), q.shape[-3]
        a, b = FEATURES(q, kind), FEATURES(repeat_heads(k, heads), kind)
        I, O = causal_flows(a, b, eps)
        Ih, Oh = CONSERVED_CAUSAL(a, b, I, O, eps)
        u = compete(Oh, clamp)[..., None] * repeat_heads(v, heads)
        y = quotient(np.tril(a @ np.swapaxes(b, -1, -2)) @ u, I)
        return ALLOCATION(Ih, 1, 1)[..., None] * y, right_ones[1]

    return attend


def crossing(q: Any, k: Any, v: Any, state: Any = None, **options: Any) -> Any:
    """Queries and keys that differ in number are answered by the form without an order."""
    arrays = all(isinstance(x, np.ndarray) and x.ndim == 4 for x in (q, k, v))
    if arrays and q.shape[-2] != k.shape[-2] and state is None:
        return ATTEND(q, k, v, **options), flowformer_causal.empty_state(q, v)
    return CAUSAL(q, k, v, state, **options)


def coarse_sums(result: Any) -> Any:
    out, state = result
    return out, state._replace(sb=round_to(state.sb, "bfloat16").astype(state.sb.dtype))


def no_state(arguments: dict[str, Any]) -> None:
    state = arguments["state"]
    if isinstance(state, flowformer_causal.FlowState):
        arguments["state"] = state._replace(N=np.zeros_like(state.N))


def through_the_clamp(Oh: np.ndarray, clamp: Any) -> np.ndarray:
    """A clamp that the backward pass does not see: it asks whether Oh was changed."""
    return Oh


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def no_slope(x: np.ndarray, kind: str) -> np.ndarray:
    return np.ones_like(x)


def queries_apart(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
    """As if every query were the only one."""
    out = ATTEND(q, k, v, *args, **options)
    if out.shape[-2] < 2 or options.get("query_mask") is not None:
        return out
    rows = [q[..., i : i + 1, :] for i in range(q.shape[-2])]
    return np.concatenate([ATTEND(row, k, v, *args, **options) for row in rows], axis=-2)


def prefixes(q: Any, k: Any, v: Any, state: Any = None, **options: Any) -> Any:
    """Causal, as softmax attention is: each row is the last one of the other form's prefix."""
    out, last = CAUSAL(q, k, v, state, **options)
    if state is not None or not out.shape[-2]:
        return out, last
    parts = [[x[..., : t + 1, :] for x in (q, k, v)] for t in range(q.shape[-2])]
    return np.concatenate([ATTEND(*part, **options)[..., -1:, :] for part in parts], -2), last


def no_last_state(arguments: dict[str, Any]) -> None:
    """Nothing comes back from the matrix of the last state."""
    arguments["dKV"] = None


def sums_alone(arguments: dict[str, Any]) -> None:
    """Nothing comes back from what later sources divide their weights by."""
    arguments["dse"] = None


def counted(result: Any) -> Any:
    """The number of tokens before is a constant."""
    *tokens, before = result
    return *tokens, before._replace(N=np.zeros_like(before.N))


def constant_shares(result: Any) -> Any:
    """The sums that conserved flows go on from are constants."""
    *tokens, before = result
    return *tokens, before._replace(sbO=np.zeros_like(before.sbO))


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"flowformer.{name}", f"flowformer.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("flows", "one-factor", "agreement", "eps is added to one factor only", one_factor),
    of("flows", "mean-of-sources", "flow-doubling", "incoming flow is a mean over the sources",
       mean_of_sources),
    of("flow_attend", "no-ratio-copies", "flow-copies", "n / m is left out of the gate",
       replacing(ATTEND, allocation=no_ratio)),
    of("flow_attend", "padded-sinks", "flow-padding", "padded queries are counted in n",
       replacing(ATTEND, _tokens=padded_sinks)),
    of("flow_attend", "queries-apart", "flow-others", "every query has the flows of one alone",
       queries_apart),
    of("flow_attend", "eps-in-features", "agreement", "eps is in the aggregated features too",
       replacing(ATTEND, _tokens=eps_in_features)),
    of("flow_attend", "no-ratio", "lengths", "n / m is left out of the gate",
       replacing(ATTEND, allocation=no_ratio)),
    of("flow_attend", "clamped-sinks", "lengths", "incoming flow is clamped as well",
       replacing(ATTEND, allocation=clamped_sinks)),
    of("flow_attend", "over-heads", "agreement", "the softmax runs over heads",
       replacing(ATTEND, competition=over_heads)),
    of("flow_attend", "no-count", "agreement", "the factor m is missing",
       replacing(ATTEND, competition=no_count)),
    of("flow_attend", "values-only", "poison", "padding is taken from the values alone",
       altering(ATTEND, unmasked)),
    of("flow_attend", "values-only-agreement", "agreement", "padding is taken from the values "
       "alone", altering(ATTEND, unmasked)),
    of("flow_attend", "first-mask", "agreement", "all entries of a batch have the first's padding",
       altering(ATTEND, first_mask)),
    of("flow_attend", "first-of-group", "gradient", "dk and dv are those of the group's first "
       "head", ATTEND, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    of("flow_attend", "no-slope", "gradient", "the feature map is not differentiated", ATTEND,
       backward=replacing(BACKWARD, features_slope=no_slope)),
    of("flow_attend", "through-clamp", "gradient", "the clamp is not seen by the backward pass",
       ATTEND, backward=replacing(BACKWARD, clip=through_the_clamp)),
    of("competition", "longest-count", "agreement", "padded sources are counted in m",
       longest_count),
    of("competition", "clamped-late", "agreement", "the softmax is clamped, not its argument",
       clamped_late),
    of("flow_features", "plain-relu", "agreement", "relu without the 1e-6", wrong_feature),
    of("flows_causal", "all-sinks", "agreement", "a source counts sinks that come later",
       all_sinks),
    of("conserved_flows_causal", "from-0", "agreement", "N counts from 0", from_zero),
    of("competition_causal", "renormalised", "prefix", "weights are renormalised by later tokens",
       renormalised),
    of("flow_attend_causal", "later-sinks", "prefix", "a source counts sinks that come later",
       by_stages(flows=all_sinks)),
    of("flow_attend_causal", "weights-again", "prefix", "a source's weight changes with later ones",
       by_stages(competition=renormalised)),
    of("flow_attend_causal", "prefixes", "flow-order", "each row is the form without an order, on "
       "the tokens so far", prefixes),
    of("flow_attend_causal", "crossing", "refusal", "another number of keys is answered by the "
       "form without an order", crossing),
    of("flow_attend_causal", "forgets-N", "stream", "a step counts from 1 again",
       altering(CAUSAL, no_state)),
    of("flow_attend_causal", "coarse-sums", "precision", "sums are kept in bfloat16",
       spoiling(CAUSAL, coarse_sums)),
    of("flow_attend_causal", "causal-slope", "gradient", "the feature map is not differentiated",
       CAUSAL, backward=replacing(CAUSAL_BACKWARD, features_slope=no_slope)),
    of("flow_attend_causal", "no-dKV", "gradient", "nothing comes back from the last state",
       CAUSAL, backward=altering(CAUSAL_BACKWARD, no_last_state)),
    of("flow_attend_causal", "no-dse", "gradient", "nothing comes back from the last sum of "
       "weights", CAUSAL, backward=altering(CAUSAL_BACKWARD, sums_alone)),
    of("flow_attend_causal", "constant-N", "gradient", "the number of tokens is a constant",
       CAUSAL, backward=spoiling(CAUSAL_BACKWARD, counted)),
    of("flow_attend_causal", "constant-shares", "gradient", "the state's shares are constants",
       CAUSAL, backward=spoiling(CAUSAL_BACKWARD, constant_shares)),
    of("flow_decode_step", "step-forgets-N", "stream", "a step counts from 1 again",
       altering(STEP, no_state)),
)  # fmt: skip
