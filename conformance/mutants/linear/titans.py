"""Wrong kernels of Titans' chunk forms: coefficients off by one, states lost, chunks misread."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.linear import titans_chunks as chunks
from attnspec.reference.linear import titans_gradients as gradients
from attnspec.reference.linear import titans_memory as memory

LINEAR = right("titans.titans_chunk_linear")
MLP = right("titans.titans_chunk_mlp")
BACKWARD = gradients.titans_chunk_linear_backward
TILES = {"blocks": (8, 32)}
MLP_BACKWARD = gradients.titans_chunk_mlp_backward
# Names that mutants replace while they run are kept here as they are.
reading, end_chunk, read_chunk = chunks.reading, chunks.end_chunk, chunks.read_chunk
inner_backward, chunk_backward = gradients._inner_backward, gradients._chunk_backward


def divided(of: Any, read: str, group: int) -> Any:
    """Coefficients relative to what is left of the first weights, and back."""
    reads = reading(of, read, group)
    with np.errstate(all="ignore"):
        return reads._replace(G=reads.beta * (reads.G / reads.beta))


def end_of_chunk(of: Any, read: str, group: int) -> Any:
    """Every token reads the weights behind the chunk."""
    last = [np.repeat(x[..., -1:], x.shape[-1], axis=-1) for x in of[:3]]
    square = [np.repeat(x[..., -1:, :], x.shape[-2], axis=-2) for x in of[3:]]
    return reading(type(of)(*last, *square), read, group)


def always_behind(of: Any, read: str, group: int) -> Any:
    return reading(of, "inclusive", group)


def half_coefficients(of: Any, read: str, group: int) -> Any:
    reads = reading(of, read, group)
    return reads._replace(G=round_to(reads.G, "float16").astype(reads.G.dtype))


def no_momentum_read(of: Any, read: str, group: int) -> Any:
    """The momentum that entered the chunk has not gone into the weights."""
    reads = reading(of, read, group)
    return reads._replace(f=0 * reads.f)


def group_of_first(of: Any, read: str, group: int) -> Any:
    """Only the first head of a group reads by its own token's coefficients."""
    reads = reading(of, read, group)
    C = of.beta.shape[-1]
    rows = np.arange(group * C)
    rows[C:] = C - 1
    return type(reads)(*(x[..., rows, :] for x in reads))


def forgetting_momentum(*args: Any) -> Any:
    W, S = end_chunk(*args)
    return W, tuple(0 * s for s in S)


def momentum_kept(W: Any, S: Any, H: Any, Delta: Any, of: Any) -> Any:
    """The momentum of earlier chunks does not decay."""
    new_W, new_S = end_chunk(W, S, H, Delta, of)
    rest = 1 - of.m[..., -1, None, None]
    return new_W, tuple(new + rest * s for new, s in zip(new_S, S, strict=True))


def stored_twice(size: int) -> Any:
    def wrong(W: Any, S: Any, H: Any, Delta: Any, of: Any) -> Any:
        W, S = end_chunk(W, S, H, Delta, of)
        short = of.beta.shape[-1] < size
        return end_chunk(W, S, H, Delta, of) if short else (W, S)

    return wrong


def half_the_loss(arguments: dict[str, Any]) -> None:
    """The factor 2 of the squared error is left out."""
    if arguments["loss_scale"] == 2.0:
        arguments["loss_scale"] = 1.0


def mean_loss(arguments: dict[str, Any]) -> None:
    v = arguments["v"]
    if isinstance(v, np.ndarray) and v.ndim and v.shape[-1] and arguments["loss_scale"] == 2.0:
        arguments["loss_scale"] = 2.0 / v.shape[-1]


def running_weights(arguments: dict[str, Any]) -> None:
    """The gradient is taken at the weights of the token before."""
    if type(arguments["b"]) is int and arguments["b"] > 1:
        arguments["b"] = 1


def frozen_weights(arguments: dict[str, Any]) -> None:
    """The point of the gradient never leaves the first weights."""
    if type(arguments["b"]) is int and arguments["b"] >= 1:
        arguments["b"] = 10**6


def no_steps_at_padding(arguments: dict[str, Any]) -> None:
    """A padded token gets the step 0, and its momentum goes on."""
    valid, rates = arguments["valid"], arguments["rates"]
    if isinstance(valid, np.ndarray) and valid.dtype.kind == "b" and valid.ndim == 2:
        seen = valid[:, None]
        clean = [np.where(seen[..., None], arguments[n], 0).astype(arguments[n].dtype)
                 for n in ("k", "v", "q")]  # fmt: skip
        arguments.update(zip(("k", "v", "q"), clean, strict=True))
        arguments["rates"] = tuple(np.where(seen, x, 0).astype(x.dtype) for x in rates)
        arguments["valid"] = None


def padding_counts(arguments: dict[str, Any]) -> None:
    """Valid tokens are believed to be stored in one chunk, however many padded ones lie between."""
    if isinstance(arguments["valid"], np.ndarray) and type(arguments["b"]) is int:
        arguments["b"] = 2 * arguments["b"] if arguments["b"] >= 1 else arguments["b"]


def momentum_of_first_entry(arguments: dict[str, Any]) -> None:
    S0 = arguments["S0"]
    if isinstance(S0, np.ndarray) and S0.ndim == 4:
        arguments["S0"] = np.repeat(S0[:1], len(S0), axis=0)


def momentum_lost(arguments: dict[str, Any]) -> None:
    S0 = arguments["S0"]
    if isinstance(S0, np.ndarray):
        arguments["S0"] = 0 * S0


def interleaved(q: np.ndarray, kv_heads: int) -> np.ndarray:
    *leading, heads, C, d = q.shape
    order = np.arange(heads).reshape(-1, kv_heads).T.ravel()
    return q[..., order, :, :].reshape(*leading, kv_heads, heads // kv_heads * C, d)


def clipped(arguments: dict[str, Any]) -> None:
    v = arguments["v"]
    if isinstance(v, np.ndarray) and v.dtype.kind == "f":
        arguments["v"] = np.clip(v, -2, 2)


class Resuming:
    """Without momentum it goes on with that of the last call of the same shape."""

    def __init__(self) -> None:
        self.last: dict[Any, np.ndarray] = {}

    def __call__(self, W0: Any, S0: Any, *args: Any, **options: Any) -> Any:
        key = (np.shape(W0), getattr(W0, "dtype", None))
        y, W, S = LINEAR(W0, self.last.get(key) if S0 is None else S0, *args, **options)
        self.last[key] = S
        return y, W, S


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi).astype(x.dtype) * (x + 0.044715 * x**3)))


def two_layers_only(W: Any, S: Any, H: Any, Delta: Any, A: Any, of: Any) -> Any:
    """From the third layer on nothing is learned."""
    Delta = tuple(e if i < 2 else 0 * e for i, e in enumerate(Delta))
    return read_chunk(W, S, H, Delta, A, of)


def first_step_only(W: Any, S: Any, H: Any, Delta: Any, of: Any) -> Any:
    """Of a full tile with wide heads only the first 16 tokens are multiplied."""
    if H[0].shape[-2] > 24 and H[0].shape[-1] >= 64:
        Delta = tuple(np.where(np.arange(e.shape[-2])[:, None] < 16, e, 0 * e) for e in Delta)
    return end_chunk(W, S, H, Delta, of)


def first_rows_back(*args: Any) -> Any:
    part = chunk_backward(*args)
    size, width = part.dk.shape[-2:]
    kept = 16 if size > 24 and width >= 64 else size
    return part._replace(dk=part.dk * (np.arange(size) < kept)[:, None])


def straight_back(W: Any, k: Any, v: Any, loss_scale: float = 2.0) -> Any:
    """The inner gradient goes through the activation as if it were none."""
    H, Delta = memory.memory_grad(W, k, v, loss_scale)
    z = memory.hidden_rows(W, k)[1]
    last = Delta[-1]
    deltas = [last]
    for layer in reversed(range(len(z) - 1)):
        deltas.insert(0, deltas[0] @ np.swapaxes(W[layer + 1], -1, -2))
    return H, tuple(deltas)


def errors_are_constants(d: Any, W: Any, H: Any, z: Any, Delta: Any, loss_scale: float) -> Any:
    """The weights get no gradient through the inner gradient."""
    kept = [w.copy() for w in d.W]
    dk, dv = inner_backward(d, W, H, z, Delta, loss_scale)
    d.W[:] = kept
    return dk, dv


def no_curvature(x: np.ndarray) -> np.ndarray:
    return 0 * x


def momentum_ends(*args: Any) -> Any:
    part = chunk_backward(*args)
    return part._replace(dS=tuple(0 * s for s in part.dS))


def without(place: int) -> Any:
    def change(result: Any) -> Any:
        return tuple(0 * x if i == place else x for i, x in enumerate(result))

    return change


def no_rate(place: int) -> Any:
    def change(result: Any) -> Any:
        *others, drates = result
        return (*others, tuple(0 * x if i == place else x for i, x in enumerate(drates)))

    return change


def mutant(name: str, law: str, bug: str, call: Any, operation: str = "titans_chunk_linear",
           **rest: Any) -> Mutant:  # fmt: skip
    return Mutant(f"titans.{name}", f"titans.{operation}", law, bug, call, **rest)


MUTANTS = (
    mutant("divided", "agreement", "coefficients are divided by what is left, which may be 0",
           replacing(LINEAR, reading=divided)),
    mutant("half-coefficients", "precision", "coefficients are kept in float16",
           replacing(LINEAR, reading=half_coefficients)),
    mutant("first-step", "precision", "of a full tile of 64 channels 16 tokens are stored",
           replacing(LINEAR, end_chunk=first_step_only), settings=TILES),
    mutant("first-rows-back", "wide-gradient", "of such a tile 16 keys have a gradient", LINEAR,
           backward=replacing(BACKWARD, _chunk_backward=first_rows_back), settings=TILES),
    mutant("half-the-loss", "agreement", "the factor 2 of the gradient is missing",
           altering(LINEAR, half_the_loss)),
    mutant("mean-loss", "agreement", "the loss is a mean over the channels",
           altering(LINEAR, mean_loss)),
    mutant("momentum-reset", "hand-over", "momentum starts anew in every chunk",
           replacing(LINEAR, end_chunk=forgetting_momentum)),
    mutant("momentum-kept", "agreement", "momentum is carried over undecayed",
           replacing(LINEAR, end_chunk=momentum_kept)),
    mutant("running-weights", "agreement", "gradients are taken at the running weights",
           altering(LINEAR, running_weights)),
    mutant("frozen-weights", "ragged", "gradients are taken at the first weights for ever",
           altering(LINEAR, frozen_weights)),
    mutant("leak", "prefix", "all tokens of a chunk read the weights behind it",
           replacing(LINEAR, reading=end_of_chunk)),
    mutant("stored-twice", "ragged", "a chunk that is not full is stored twice",
           replacing(LINEAR, end_chunk=stored_twice(16))),
    mutant("inclusive", "agreement", "an exclusive read is inclusive all the same",
           replacing(LINEAR, reading=always_behind)),
    mutant("no-steps", "agreement", "a padded token is one with step 0",
           altering(LINEAR, no_steps_at_padding)),
    mutant("long-padded-chunks", "agreement", "with padding a chunk is twice as long",
           altering(LINEAR, padding_counts)),
    mutant("momentum-unread", "agreement", "the momentum given is not read in the first chunk",
           replacing(LINEAR, reading=no_momentum_read)),
    mutant("momentum-lost", "agreement", "the momentum given is forgotten",
           altering(LINEAR, momentum_lost)),
    mutant("first-entry", "agreement", "every entry starts with the first one's momentum",
           altering(LINEAR, momentum_of_first_entry)),
    mutant("interleaved", "heads", "query head h reads memory h % kv_heads",
           replacing(LINEAR, fold=interleaved)),
    mutant("first-of-group", "heads", "other heads of a group read at the chunk's end",
           replacing(LINEAR, reading=group_of_first)),
    mutant("clipped", "linearity", "values are clipped", altering(LINEAR, clipped)),
    mutant("resuming", "stateless", "a call without momentum goes on with the last one's",
           Resuming()),
    mutant("constant-errors", "gradient", "weights get no gradient through the inner gradient",
           LINEAR, backward=replacing(BACKWARD, _inner_backward=errors_are_constants)),
    mutant("momentum-ends", "gradient", "the gradient of momentum stops at the chunk's start",
           LINEAR, backward=replacing(BACKWARD, _chunk_backward=momentum_ends)),
    mutant("no-dS0", "gradient", "the first momentum gets no gradient", LINEAR,
           backward=spoiling(BACKWARD, without(1))),
    mutant("no-deta", "gradient", "the momentum's rate gets no gradient", LINEAR,
           backward=spoiling(BACKWARD, no_rate(1))),
    mutant("tanh-gelu", "agreement", "GELU by its formula with tanh",
           replacing(MLP, read_chunk=replacing(chunks.read_chunk, gelu=tanh_gelu)),
           "titans_chunk_mlp"),
    mutant("straight-back", "agreement", "the inner gradient ignores the activation",
           replacing(MLP, memory_grad=straight_back), "titans_chunk_mlp"),
    mutant("two-layers", "depth", "the third layer is not read as learned",
           replacing(MLP, read_chunk=two_layers_only), "titans_chunk_mlp"),
    mutant("deep-reset", "hand-over", "momentum of a deep memory starts anew in every chunk",
           replacing(MLP, end_chunk=forgetting_momentum), "titans_chunk_mlp"),
    mutant("no-curvature", "gradient", "the activation is differentiated once only", MLP,
           "titans_chunk_mlp", backward=replacing(MLP_BACKWARD, gelu_curvature=no_curvature)),
    mutant("deep-no-theta", "gradient", "the step gets no gradient", MLP, "titans_chunk_mlp",
           backward=spoiling(MLP_BACKWARD, no_rate(0))),
)  # fmt: skip
