"""The decode engine on a CUDA device: the shared cases, captured graphs, compilations, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnspec.fast import attention
from attnspec.fast.engines.decode import decode
from tests.decode_cases import CASES, Case, arguments, check, check_values_apart, compare, plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAUNCHING = [name for name in CASES if name not in ("no queries", "no batch")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def graph_of(call: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A captured call and the tensors that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def long_case(options: dict[str, Any]) -> Case:
    """Many splits and ragged outputs: 16-bit heads of 128."""
    torch.manual_seed(0)
    shapes = (3, 16, 1, 128), (3, 4, 5000, 128), (3, 4, 5000, 128)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    return Case(q, k, v, options)


LONG = {
    "dense": {},
    "lengths": {"lengths": torch.tensor([5000, 17, 3000])},
    **{
        f"pages of {page}": {"index": torch.randint(0, 5000 // page, (3, 4, 40)), "page": page}
        for page in (1, 16, 64)
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, dtype: torch.dtype) -> None:
    for _ in range(2):
        check(name, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_one_key_head_do_not_meet(dtype: torch.dtype) -> None:
    check_values_apart(dtype, "cuda")


@pytest.mark.parametrize("name", LAUNCHING)
def test_a_graph_serves_other_data(name: str) -> None:
    """Capture, change every tensor in place, lengths too, and replay."""
    (q, k, v, options, _), expected = arguments(name, torch.bfloat16, "cuda")
    graph, got = graph_of(lambda: decode(q, k, v, **options))
    graph.replay()
    compare(got, expected, torch.bfloat16)
    for x in (q, k, v):
        x.nan_to_num_(0.5, posinf=0.5).copy_(x.flip(0) * 0.75)
    if "lengths" in options:
        options["lengths"].copy_(options["lengths"] // 2)
    if "index" in options:
        options["index"].copy_(options["index"].flip(-1))
    if "counts" in options:
        options["counts"].copy_(options["counts"].flip(0))
    here = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in options.items()}
    for _ in range(3):
        got[0].fill_(7)
        graph.replay()
        compare(got, plain(q.cpu(), k.cpu(), v.cpu(), **here), torch.bfloat16)


def test_graphs_and_streams_do_not_disturb_one_another() -> None:
    q, k, v, _, _ = long_case({})
    expected = decode(q, k, v)
    (first, one), (second, two) = (graph_of(lambda: decode(q, k, v)) for _ in range(2))
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    eager = []
    for _ in range(20):
        for stream, run in zip(streams, (first.replay, second.replay, None), strict=True):
            with torch.cuda.stream(stream):
                eager += [run()] if run else [decode(q, k, v)]
    torch.cuda.synchronize()
    for got in (one, two, *(result for result in eager if result is not None)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", LONG)
def test_twenty_runs_give_the_same_bits(name: str) -> None:
    options = {key: x.cuda() if isinstance(x, Tensor) else x for key, x in LONG[name].items()}
    q, k, v, options, _ = long_case(options)
    first = decode(q, k, v, **options)
    here = {key: x.cpu() if isinstance(x, Tensor) else x for key, x in options.items()}
    compare(first, plain(q.cpu(), k.cpu(), v.cpu(), **here), torch.bfloat16)
    for _ in range(20):
        again = decode(q, k, v, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_fifty_lengths_compile_once() -> None:
    from attnspec.fast.engines.decode.triton_kernels import attend_kernel

    def compiled() -> int:
        return sum(len(cache[0]) for cache in attend_kernel.device_caches.values())

    q, k, v, _, _ = long_case({})
    decode(q, k, v)
    decode(q, k, v, lengths=torch.tensor([1, 2, 3], device="cuda"))
    before = compiled()
    for n in range(1, 5000, 100):
        decode(q, k[:, :, :n], v[:, :, :n])
        decode(q, k[:, :, :n].contiguous(), v[:, :, :n].contiguous())
        decode(q, k, v, lengths=torch.tensor([n, 1, 5000 - n], device="cuda"))
    assert compiled() == before


def test_a_decoding_step_compiles_once_and_agrees() -> None:
    from attnspec.fast.engines.decode.triton_kernels import attend_kernel

    torch.manual_seed(0)
    q = torch.randn(1, 8, 60, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 60, 64, device="cuda", dtype=torch.bfloat16)
    expected, _ = plain(q.cpu(), k.cpu(), v.cpu())
    state, outs, counts = attention.init_state(k, v), [], set()
    for t in range(60):
        here = slice(t, t + 1)
        out, state = attention.step(state, q[:, :, here], k[:, :, here], v[:, :, here])
        outs.append(out)
        counts.add(sum(len(cache[0]) for cache in attend_kernel.device_caches.values()))
    torch.testing.assert_close(torch.cat(outs, 2).double().cpu(), expected, atol=8e-3, rtol=8e-3)
    assert len(counts) == 1
