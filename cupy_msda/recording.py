# SPDX-License-Identifier: Apache-2.0
"""Where a model looks: the sampling locations and attention weights of its calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cupy_msda.torch import derivatives, functions, fused, operators
from cupy_msda.torch.fused_operands import composed, fused_operands
from cupy_msda.torch.operands import Operands, given_of, sampling_of


class Call(NamedTuple):
    """A call of the operator; nothing in it requires gradients."""

    name: (
        str  # of the innermost module that made it, as in `named_modules`: "" for the model itself
    )
    spatial_shapes: Any  # (H, W) of the levels, as the call got them
    sampling_locations: Tensor  # (N, Lq, M, L, P, 2); with num_points, (N, Lq, M, K, 2)
    attention_weights: Tensor  # (N, Lq, M, L, P); with num_points, (N, Lq, M, K)
    num_points: Any = None  # as the call got it
    # (N or 1, Lq, L or 1, 2 or 4); None for a call that is not fused
    reference_points: Tensor | None = None


@contextmanager
def record(model: nn.Module | None = None) -> Iterator[list[Call]]:
    """Record where the calls of `ms_deform_attn` and `ms_deform_attn_fused` look, with what weights::

        with cupy_msda.record(model) as calls:
            model(images)
        for call in calls:
            print(call.name, call.sampling_locations.shape)

    Locations and weights of fused calls are computed for the recording, by the operator's formula. The list holds
    3 * N * Lq * M * L * P numbers of each call in the memory of their device as long as it lives. Tensors of plain
    calls are the model's own, not copies: what changes them in place changes the recording.

    Recorded is what this thread calls eagerly with torch tensors, also by `MSDeformAttn`, `MSDeformAttnFunction`,
    a patch of another package or an exported program. Not seen are calls of other threads (`nn.DataParallel` has
    them) and replays of a CUDA graph; what activation checkpointing computes again may be recorded again.

    Parameters
    ----------
    model : torch.nn.Module, optional
        Only calls inside it are recorded, with the names of its modules. None: every call, with the name "".

    Yields
    ------
    list of Call
        One for each call, in their order. It stays after the block.

    Raises
    ------
    TypeError
        `model` is no module, or `torch.compile` has compiled it or a part of it.
    RuntimeError
        In the block, torch.export traces a call, or a transform of `torch.func` runs it. What torch.compile has
        compiled runs eagerly and is recorded; with ``fullgraph=True`` newer versions of torch raise their own error.
    """
    calls: list[Call] = []
    names: list[str] = []
    with ExitStack() as stack:
        if model is None:
            names.append("")
        else:
            _check_model(model)
            for name, module in model.named_modules():
                _follow(stack, module, name, names)
        stack.enter_context(_Recorder(calls, names))
        yield calls


class _Recorder(TorchFunctionMode):
    """Sees the calls of torch functions of this thread, and of ours, while it is entered."""

    def __init__(self, calls: list[Call], names: list[str]) -> None:
        """`names`: of the modules that are running, the innermost last; without any, nothing is recorded."""
        super().__init__()
        self._calls = calls
        self._names = names

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function; record where it looked, if it is one of ours."""
        kwargs = kwargs or {}
        seen = _SEEN.get(func) if self._names else None
        if seen is None:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling() or derivatives.active():
            raise RuntimeError(
                "record must see eager calls, got one that torch.compile or torch.export traces, or that a transform "
                "of torch.func or forward mode runs"
            )
        output = func(*args, **kwargs)  # first, since it checks the arguments
        with torch.no_grad():
            call = seen(*args, **kwargs)
        # The compiler of torch 2.4 tries its graph inside of modes, with tensors that hold nothing.
        if type(call.sampling_locations).__name__ != "FakeTensor":
            self._calls.append(call._replace(name=self._names[-1]))
        return output


def _plain(
    value: Any, spatial_shapes: Any, start_index: Any, locations: Any, weights: Any, **rules: Any
) -> Call:
    """A call of `ms_deform_attn`."""
    del value, start_index
    return Call("", spatial_shapes, locations.detach(), weights.detach(), rules["num_points"])


def _fused(*inputs: Any, num_points: Any, offset_scale: Any, **_: Any) -> Call:
    """A call of `ms_deform_attn_fused`."""
    points = fused.locations_and_weights(*inputs, num_points=num_points, offset_scale=offset_scale)
    return Call("", inputs[1], *points, num_points, inputs[3].detach())


def _plain_operator(*arguments: Any) -> Call:
    """A call in an exported program."""
    operands = Operands(*arguments)
    return _plain(*given_of(operands), **sampling_of(operands))


def _fused_operator(*arguments: Any) -> Call:
    """A fused call in an exported program."""
    operands = fused_operands(arguments)
    call = _plain_operator(*composed(operands))
    return call._replace(reference_points=operands.reference_points.detach())


_SEEN: dict[Any, Callable[..., Call]] = {
    functions.ms_deform_attn: _plain,
    fused.ms_deform_attn_fused: _fused,
    operators.FORWARD: _plain_operator,
    operators.FUSED_FORWARD: _fused_operator,
}


def _follow(stack: ExitStack, module: nn.Module, name: str, names: list[str]) -> None:
    """Keep the name of the module in `names` while it runs."""

    def enter(*_: Any) -> None:
        names.append(name)

    def leave(*_: Any) -> None:
        names.pop()

    before = module.register_forward_pre_hook(enter, prepend=True)
    stack.callback(before.remove)
    after = module.register_forward_hook(leave, always_call=True)
    stack.callback(after.remove)


def _check_model(model: Any) -> None:
    """Refuse what is no module, and modules that run without their hooks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            where = f"its module {name!r} is" if name else "it is"
            raise TypeError(
                f"model must run eagerly, and {where} compiled by torch.compile: record it uncompiled (`_orig_mod`)"
            )
