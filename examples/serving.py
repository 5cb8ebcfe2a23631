# SPDX-License-Identifier: Apache-2.0
"""Serve an attention layer: compile ahead, then answer requests; on a GPU each request is the replay of a CUDA graph,
a path that has not run on one yet.

python examples/serving.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from cupy_msda import MSDeformAttn, warmup

LEVELS = [(40, 40), (20, 20), (10, 10)]  # (H, W)
S = sum(h * w for h, w in LEVELS)
N, QUERIES, CHANNELS, HEADS, POINTS = 1, 300, 256, 8, 4
Inputs = tuple[Tensor, Tensor, Tensor]  # queries, reference points, features


def server(device: str) -> Callable[[Inputs], Tensor]:
    """A function that answers a request."""
    torch.manual_seed(0)
    layer = MSDeformAttn(CHANNELS, len(LEVELS), HEADS, POINTS).to(device).eval()
    warmup(
        (N, S, HEADS, CHANNELS // HEADS),
        (N, QUERIES, HEADS, len(LEVELS), POINTS, 2),
        reference_points_shape=(N, QUERIES, len(LEVELS), 2),
        backward=False,
        device=device,
    )

    @torch.inference_mode()
    def answer(request: Inputs) -> Tensor:
        output: Tensor = layer(*request, LEVELS, None)
        return output

    return captured(answer) if device == "cuda" else answer


def captured(answer: Callable[[Inputs], Tensor]) -> Callable[[Inputs], Tensor]:
    """The same by a CUDA graph: a request is copied to where the graph reads it."""
    places = request("cuda")
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        answer(places)  # torch's own libraries start up outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = answer(places)

    def replay(given: Inputs) -> Tensor:
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return output

    return replay


def request(device: str) -> Inputs:
    """What a client sends."""
    queries = torch.randn(N, QUERIES, CHANNELS, device=device)
    points = torch.rand(N, QUERIES, len(LEVELS), 2, device=device)
    return queries, points, torch.randn(N, S, CHANNELS, device=device)


def main() -> None:
    """Answer some requests, and print how long the first and the others took."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    answer = server(device)
    times = []
    for _ in range(20):
        given = request(device)
        begin = time.perf_counter()
        output = answer(given)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    print(f"output {tuple(output.shape)} on {device}")
    print(f"first request {times[0]:.2f} ms, median of the others {median(times[1:]):.2f} ms")


if __name__ == "__main__":
    main()
