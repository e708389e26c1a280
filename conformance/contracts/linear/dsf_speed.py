"""Benchmarks of `dsf`: scans against token loops, compiled or not, and softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnspec.conformance.bench.inputs import bytes_of
from attnspec.conformance.bench.model import Benchmark, Cost, Rival, Unavailable
from attnspec.conformance.bench.rivals import (
    flash_linear,
    installed,
    sdpa,
    torch_sdpa,
    with_backward,
)

LONGEST_LOOP = 8192
"""Tokens a rival's loop is given the time for."""
LONGEST_SOFTMAX = 131072
"""Tokens that exact attention is given the time for."""


def drawn(shapes: Mapping[str, tuple[int, ...]], positive: str = "") -> Any:
    """Normal numbers by name; those named in `positive` are small and above 0, and A and a float32,
    as models keep them.
    """

    def make(device: str, dtype: str) -> dict[str, Any]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        arrays = {}
        for name, shape in shapes.items():
            x = torch.randn(shape, generator=generator, device=device)
            if name in positive.split():
                x = 0.1 * x.abs()
            kept = name in ("A", "a", "D")
            arrays[name] = x if kept else x.to(getattr(torch, dtype))
        return arrays

    return make


def scan_cost(out: str, flops: Callable[[Mapping[str, Any]], float], factor: float = 1.0) -> Any:
    """Every input read once and an output as large as argument `out` written once."""

    def cost(arguments: Mapping[str, Any]) -> Cost:
        moved = bytes_of(*arguments.values()) + bytes_of(arguments[out])
        return Cost(flops(arguments) * factor, moved * factor)

    return cost


def s6_flops(arguments: Mapping[str, Any]) -> float:
    """Decay, input and read-out of each number of the state."""
    return 7.0 * float(arguments["u"].numel()) * float(arguments["A"].shape[1])


def matrix_flops(k: str, v: str) -> Callable[[Mapping[str, Any]], float]:
    """Two products with the state a token, and blocks of 64."""

    def flops(arguments: Mapping[str, Any]) -> float:
        d, dv = arguments[k].shape[-1], arguments[v].shape[-1]
        tokens = arguments[k].numel() / d
        return 2.0 * tokens * (2 * d * dv + 64 * (d + dv))

    return flops


def differentiated(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Callable[[], Any]:
    """Forward and backward in every argument."""
    return with_backward(lambda: function(**arguments), tuple(arguments.values()))


def _s6_loop(step: Any, a: Mapping[str, Any]) -> Any:
    import torch

    h = torch.zeros(a["u"].shape[0], *a["A"].shape, device=a["u"].device)
    outputs = []
    for t in range(a["u"].shape[1]):
        rows = (a[name][:, t] for name in ("Delta", "b", "c", "u"))
        y, h = step(h, a["A"], a["D"], *rows)
        outputs.append(y)
    return torch.stack(outputs, 1)


def _s6_step(h: Any, A: Any, D: Any, delta: Any, b: Any, c: Any, u: Any) -> Any:
    into = (delta * u)[..., None] * b[:, None]
    h = (-delta[..., None] * A).exp() * h + into
    return (h * c[:, None]).sum(-1) + D * u, h


def _qlstm_loop(step: Any, a: Mapping[str, Any]) -> Any:
    import torch

    h = torch.zeros_like(a["z"][:, 0], dtype=torch.float32)
    outputs = []
    for t in range(a["z"].shape[1]):
        y, h = step(h, *(a[name][:, t] for name in ("f", "i", "o", "z")))
        outputs.append(y)
    return torch.stack(outputs, 1)


def _qlstm_step(h: Any, f: Any, i: Any, o: Any, z: Any) -> Any:
    h = f.float().sigmoid() * h + i.sigmoid() * z
    return (o.sigmoid() * h).to(z.dtype), h


def loop(run: Any, step: Any, tokens: str, compiled: bool, backward: bool = False) -> Rival:
    """A token after the other in torch, its step compiled or not."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        if arguments[tokens].shape[1] > LONGEST_LOOP:
            raise Unavailable(f"a loop over more than {LONGEST_LOOP} tokens takes too long")
        chosen = torch.compile(step, dynamic=False) if compiled else step

        def forward() -> Any:
            return run(chosen, arguments)

        return with_backward(forward, tuple(arguments.values())) if backward else forward

    return Rival("torch loop, compiled step" if compiled else "torch loop", prepare)


def mamba(backward: bool = False) -> Rival:
    """The selective scan of mamba-ssm, if it is installed."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        scan = installed("mamba-ssm", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        u, delta, b, c = (arguments[name].mT.contiguous() for name in ("u", "Delta", "b", "c"))

        def forward() -> Any:
            return scan(u, delta, -arguments["A"], b, c, arguments["D"])

        return with_backward(forward, (u, delta, b, c)) if backward else forward

    return Rival("mamba-ssm", prepare)


def simple_gla(backward: bool = False) -> Rival:
    """flash-linear-attention's simple_gla, which takes log decays and values already multiplied."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        chunk_simple_gla = flash_linear("simple_gla", "chunk_simple_gla")
        delta = arguments["Delta"].float()
        values = (delta[..., None] * arguments["u"]).to(arguments["u"].dtype)
        gates = (-arguments["a"][:, None] * delta).transpose(1, 2).contiguous()
        c, b, v = (x.transpose(1, 2).contiguous() for x in (arguments["c"], arguments["b"], values))

        def forward() -> Any:
            return chunk_simple_gla(c, b, v, g=gates, scale=1.0)[0]

        return with_backward(forward, (c, b, v, gates)) if backward else forward

    return Rival("flash-linear-attention", prepare)


def softmax(q: str, k: str, v: str, backward: bool = False) -> tuple[Rival, ...]:
    """Exact attention over arguments of other names: FlashAttention-2, and what torch chooses."""
    rivals = (sdpa("flash", backward, causal=True), torch_sdpa(causal=True))

    def renamed(rival: Rival) -> Rival:
        def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
            if arguments[q].shape[2] > LONGEST_SOFTMAX:
                raise Unavailable(f"softmax over more than {LONGEST_SOFTMAX} tokens takes too long")
            return rival.prepare({"q": arguments[q], "k": arguments[k], "v": arguments[v]})

        return Rival(rival.name, prepare)

    return tuple(renamed(rival) for rival in rivals[: 1 if backward else 2])


def all_pairs(weights: Callable[[Mapping[str, Any]], Any], name: str = "torch, all pairs") -> Rival:
    """Weights of all pairs in plain torch, compiled."""

    def prepare(arguments: Mapping[str, Any]) -> Callable[[], Any]:
        import torch

        if next(iter(arguments.values())).shape[2] > 16384:
            raise Unavailable("the matrix of all pairs is too large")
        compiled = torch.compile(weights, dynamic=False)
        return lambda: compiled(arguments)

    return Rival(name, prepare)


def _normalised_pairs(a: Mapping[str, Any]) -> Any:
    return ((a["q"] @ a["k"].mT).tril() @ a["v"]) * (-a["n"]).exp()[..., None]


def _ssd_pairs(a: Mapping[str, Any]) -> Any:
    total = (-a["a"][:, None] * a["Delta"].float()).cumsum(-1)
    gap = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    return (gap.to(a["b"].dtype) * (a["c"] @ a["b"].mT)) @ (a["Delta"][..., None] * a["u"])


def case(
    operation: str, name: str, device: str, make: Any, cost: Any, rivals: Any, backward: bool,
    **settings: Any,
) -> Benchmark:  # fmt: skip
    return Benchmark(
        f"dsf.{operation}",
        f"{name} forward+backward" if backward else name,
        device,
        make,
        cost(3.0 if backward else 1.0),
        dtype="bfloat16" if device == "cuda" else "float32",
        call=differentiated if backward else None,
        rivals=rivals,
        settings=settings,
    )


def s6(device: str, batch: int, tokens: int, channels: int, n: int, backward: bool) -> Benchmark:
    rows = (batch, tokens)
    shapes = {"Delta": (*rows, channels), "A": (channels, n), "b": (*rows, n), "c": (*rows, n),
              "u": (*rows, channels), "D": (channels,)}  # fmt: skip
    loops = [loop(_s6_loop, _s6_step, "u", compiled, backward) for compiled in (False, True)]
    rivals = (*(loops if device == "cuda" else loops[:1]), mamba(backward))
    return case(
        "s6_scan", f"batch {batch}, {tokens} tokens, {channels} channels, n={n}", device,
        drawn(shapes, "Delta A"), lambda f: scan_cost("u", s6_flops, f), rivals, backward,
        batch=batch, tokens=tokens, channels=channels, n=n,
    )  # fmt: skip


def rnn(device: str, batch: int, tokens: int, N: int, backward: bool) -> Benchmark:
    shapes = dict.fromkeys(("f", "i", "o", "z"), (batch, tokens, N))
    loops = [loop(_qlstm_loop, _qlstm_step, "z", compiled, backward) for compiled in (False, True)]
    return case(
        "qlstm", f"batch {batch}, {tokens} tokens, N={N}", device, drawn(shapes),
        lambda f: scan_cost("z", lambda a: 30.0 * a["z"].numel(), f),
        tuple(loops if device == "cuda" else loops[:1]), backward,
        batch=batch, tokens=tokens, N=N,
    )  # fmt: skip


def ssd(device: str, heads: int, tokens: int, n: int, dv: int, backward: bool) -> Benchmark:
    rows = (1, heads, tokens)
    shapes = {"Delta": rows, "a": (heads,), "b": (*rows, n), "c": (*rows, n), "u": (*rows, dv)}
    pairs = () if backward else (all_pairs(_ssd_pairs),)
    rivals = (simple_gla(backward), *softmax("c", "b", "u", backward), *pairs)
    return case(
        "ssd_scan", f"{tokens} tokens, {heads} heads, n={n} dv={dv}", device,
        drawn(shapes, "Delta a"), lambda f: scan_cost("u", matrix_flops("b", "u"), f), rivals,
        backward, heads=heads, tokens=tokens, n=n, dv=dv,
    )  # fmt: skip


def attention(
    operation: str, device: str, heads: int, tokens: int, d: int, backward: bool
) -> Benchmark:
    rows = (1, heads, tokens)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v"), (*rows, d))
    pairs: tuple[Rival, ...] = ()
    if operation == "normalised_attention":
        shapes["n"] = rows
        pairs = () if backward else (all_pairs(_normalised_pairs),)
    return case(
        operation, f"{tokens} tokens, {heads} heads, d={d}", device, drawn(shapes),
        lambda f: scan_cost("v", matrix_flops("k", "v"), f),
        (*softmax("q", "k", "v", backward), *pairs), backward,
        heads=heads, tokens=tokens, d=d,
    )  # fmt: skip


BENCHMARKS = (
    s6("cuda", 1, 8192, 2048, 16, False),
    s6("cuda", 8, 2048, 2048, 16, True),
    s6("cuda", 1, 131072, 2048, 16, False),
    s6("cuda", 1, 1048576, 2048, 16, False),
    rnn("cuda", 8, 8192, 1024, False),
    rnn("cuda", 8, 2048, 1024, True),
    rnn("cuda", 1, 131072, 1024, False),
    rnn("cuda", 1, 1048576, 1024, False),
    ssd("cuda", 32, 16384, 128, 64, False),
    ssd("cuda", 32, 16384, 128, 64, True),
    ssd("cuda", 32, 131072, 128, 128, False),
    ssd("cuda", 32, 1048576, 128, 128, False),
    attention("normalised_attention", "cuda", 32, 16384, 128, False),
    attention("normalised_attention", "cuda", 32, 131072, 128, False),
    attention("normalised_attention", "cuda", 32, 1048576, 128, False),
    attention("normalised_attention", "cuda", 32, 16384, 128, True),
    attention("linear_attention", "cuda", 32, 16384, 128, False),
    attention("linear_attention", "cuda", 32, 131072, 128, False),
    s6("cpu", 1, 512, 256, 16, False),
    s6("cpu", 1, 512, 256, 16, True),
    rnn("cpu", 1, 1024, 256, False),
    ssd("cpu", 4, 2048, 64, 64, False),
    attention("normalised_attention", "cpu", 4, 2048, 64, False),
    attention("linear_attention", "cpu", 4, 2048, 64, False),
)
