# SPDX-License-Identifier: Apache-2.0
"""The operator in plain torch, and a module around it, from which stand-ins for other packages are made.

A stand-in has the names, signatures and shapes of the package, as its test's docstring says, and none of its text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

SIZES = [(5, 7), (3, 2), (4, 4)]
N, M, D, LQ, P = 2, 3, 4, 5, 2
S = sum(h * w for h, w in SIZES)
HEADS = {"heads": M, "levels": len(SIZES), "points": P}


def sampled(
    value: Tensor,
    sizes: Any,
    locations: Tensor,
    weights: Tensor,
    num_points: Sequence[int] | None = None,
    discrete: bool = False,
) -> Tensor:
    """The operator: value (N, S, M, D), locations (N, Lq, M, K, 2) or with L and P for K, and weights beside them.

    `discrete` is RT-DETRv2's rule, which limits both coordinates to H - 1.
    """
    n, _, m, d = value.shape
    lq = locations.shape[1]
    sizes = [(int(h), int(w)) for h, w in sizes]
    locations = locations.reshape(n, lq, m, -1, 2)
    num_points = num_points or [locations.shape[3] // len(sizes)] * len(sizes)
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in sizes], dim=-1)
    points = locations.transpose(1, 2).flatten(0, 1).split(list(num_points), dim=2)  # N*M, Lq, P, 2
    samples = []
    for level, at, (h, w) in zip(maps, points, sizes, strict=True):
        if discrete:
            pixel = (at * torch.tensor([w, h]) + 0.5).long().clamp(0, h - 1)
            index = (pixel[..., 1] * w + pixel[..., 0]).flatten(1)  # N*M, Lq*P
            read = level.gather(2, index[:, None].expand(-1, d, -1)).unflatten(2, at.shape[1:3])
        else:
            read = grid_sample(level.unflatten(2, (h, w)), 2 * at - 1, align_corners=False)
        samples.append(read)  # N*M, D, Lq, P
    weights = weights.reshape(n, lq, m, -1).transpose(1, 2).flatten(0, 1)  # N*M, Lq, K
    output = (torch.cat(samples, dim=-1) * weights[:, None]).sum(-1)  # N*M, D, Lq
    return output.reshape(n, m * d, lq).transpose(1, 2)


class Attention(nn.Module):
    """The four projections of Deformable-DETR's module, and what it computes."""

    def __init__(self, heads: int, levels: int, points: int) -> None:
        super().__init__()
        c, samples = heads * D, heads * levels * points
        self.samples = heads, levels, points
        self.sampling_offsets = nn.Linear(c, 2 * samples)
        self.attention_weights = nn.Linear(c, samples)
        self.value_proj = nn.Linear(c, c)
        self.output_proj = nn.Linear(c, c)

    def attend(
        self,
        query: Tensor,
        references: Tensor,
        features: Tensor,
        sizes: Any,
        padding: Tensor | None = None,
    ) -> Tensor:
        value = self.value_proj(features)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.samples[0], -1)).softmax(-1)
        references = references[:, :, None, :, None]
        if references.shape[-1] == 2:
            scale = torch.tensor([(int(w), int(h)) for h, w in sizes])[:, None]
            locations = references + offsets / scale
        else:
            locations = references[..., :2] + offsets / self.samples[2] * references[..., 2:] * 0.5
        value = value.unflatten(-1, (self.samples[0], -1))
        return self.output_proj(sampled(value, sizes, locations, weights))


def arrays(num_points: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Value (N, S, M, D), locations (N, Lq, M, L, P, 2) and weights; or (N, Lq, M, K, 2) and (N, Lq, M, K)."""
    points = (len(SIZES), P) if num_points is None else (sum(num_points),)
    value = torch.randn(N, S, M, D, dtype=torch.float64)
    locations = torch.rand(N, LQ, M, *points, 2, dtype=torch.float64) * 1.4 - 0.2
    return value, locations, torch.rand(N, LQ, M, *points, dtype=torch.float64)


def module_inputs(coordinates: int, levels: int = len(SIZES)) -> tuple[Tensor, Tensor, Tensor]:
    """Query (N, Lq, C), reference points (N, Lq, levels, coordinates) and features (N, S, C)."""
    query = torch.randn(N, LQ, M * D, dtype=torch.float64)
    references = torch.rand(N, LQ, levels, coordinates, dtype=torch.float64)
    return query, references, torch.randn(N, S, M * D, dtype=torch.float64)


def results(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *parameters: Tensor
) -> list[Tensor | None]:
    """The output, and the gradients of the inputs and parameters."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    output = function(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    wanted = [*leaves, *parameters]
    return [output, *torch.autograd.grad((output * weight).sum(), wanted, allow_unused=True)]


def assert_equal(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """The same results, by the tolerance that torch has for float64."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype == torch.float64
            torch.testing.assert_close(ours, theirs)


def install(monkeypatch: Any, name: str, **contents: Any) -> ModuleType:
    """A module of that name, and its packages, with functions and classes that seem to be defined there."""
    module = ModuleType(name)
    for own, each in contents.items():
        each.__module__, each.__qualname__, each.__name__ = name, own, own
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    while name := name.rpartition(".")[0]:
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return module


def check(patch: Callable[[], Any], call: Callable[[], list[Tensor | None]]) -> Any:
    """Assert that a call gives the same results before, while and after the package is patched; return the patch."""
    expected = call()
    with patch() as done:
        assert done.replaced
        assert_equal(call(), expected)
    again = call()
    assert all(
        one is two or torch.equal(one, two) for one, two in zip(again, expected, strict=True)
    )
    return done
