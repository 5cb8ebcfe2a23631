# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: its deformable detectors and segmenters on this package's kernels, by one line.

::

    from cupy_msda.integrations.transformers import patch

    patch()  # every family; patch(model): that model alone

Three things in transformers compute the operator: a layer without parameters and two functions. Around each stands
an attention module with projections. Where its arguments are known, the module's forward is replaced and runs the
fused operator; elsewhere the layer or function alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cupy_msda.integrations.patching import Patch, Replacement, apply, is_ours, standing_for
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused

# The newest version whose forwards were compared with ours. In a newer one an argument can have another meaning
# under its old name, a mask above all: there only the layers and functions are replaced.
_NEWEST_COMPARED = (5, 24)

_CORE = "ms_deformable_attn_core"  # where D-FINE's modules hold their function
_INTERPOLATIONS = {"default": "bilinear", "discrete": "nearest"}


def patch(target: ModuleType | nn.Module | None = None, *, strict: bool = True) -> Patch:
    """Replace the multi-scale deformable attention of transformers by this package's.

    Parameters and `state_dict` keys stay as they are. Forward hooks on the inner layer
    `MultiScaleDeformableAttention` do not run where the module around it is replaced.

    Parameters
    ----------
    target : module, torch.nn.Module or None
        None: the classes and functions of all families of the installed transformers, which are
        imported; models that exist already run them, too. A module, such as
        `transformers.models.rt_detr`: its classes and functions. A model: that object alone. Copies
        and pickles of it are patched, too, and `undo` does not reach them; torch.nn.DataParallel
        needs the classes patched. What another package has put in the place of a forward, as
        accelerate's hooks do, stays.
    strict : bool
        Whether to raise where nothing is found.

    Returns
    -------
    Patch
        What was replaced. Its `undo`, or the end of its ``with`` block, puts everything back.

    Raises
    ------
    ModuleNotFoundError
        `strict`, no `target`, and transformers is not installed.
    LookupError
        `strict`, and nothing is found: so for a Mask2Former, OneFormer or RT-DETRv2 of a version of
        transformers in which only the functions of their modules can be replaced. Patch these.
    TypeError
        `target` is something else.
    """
    if isinstance(target, nn.Module):
        return apply(_in_model(target), f"the model {type(target).__name__}", strict)
    if isinstance(target, ModuleType):
        modules = _modules(target.__name__) or [target]
        return apply(_in_modules(modules), target.__name__, strict)
    if target is not None:
        raise TypeError(
            f"target must be None, a module or a torch module, got {type(target).__name__}"
        )
    if strict and find_spec("transformers") is None:
        raise ModuleNotFoundError("transformers must be installed, found none")
    return apply(_in_modules(_modules("transformers")), "transformers", strict)


# --- what stands in the place of the layer and the functions --------------------------------------------


def _layer(
    self: nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Any,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The layer's forward. Sizes on the host cost less than those on the device."""
    return ms_deform_attn(
        value, value_spatial_shapes_list, None, sampling_locations, attention_weights
    )


class MultiScaleDeformableAttention(nn.Module):
    """The layer for the `kernels` package, which takes a forward from a class that has nothing else."""

    can_torch_compile = True
    has_backward = True
    forward = _layer


class LayerRepository:
    """Where `kernels` finds that layer, for models that transformers loads with ``use_kernels=True``.

    ``kernels.use_kernel_mapping({"MultiScaleDeformableAttention": {"cuda": LayerRepository()}})``
    replaces the layer alone: where `patch` replaces the module around it, less is computed.
    """

    layer_name = "MultiScaleDeformableAttention"

    def load(self) -> type[nn.Module]:
        """Return the class."""
        return MultiScaleDeformableAttention


def _function(
    value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Mask2Former's function."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def _function_v2(
    value: Tensor,
    value_spatial_shapes: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """RT-DETRv2's function: locations (N, Lq, M, K, 2) and weights (N, Lq, M, K), K points of all levels together."""
    if method == "discrete":  # no gradient there, not one of zeros
        sampling_locations = sampling_locations.detach()
    return ms_deform_attn(
        *(value, value_spatial_shapes, None, sampling_locations, attention_weights),
        num_points=num_points_list,
        interpolation=_INTERPOLATIONS[method],
    )


# --- what stands in the place of the modules around them ------------------------------------------------


def _deformable_detr(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    encoder_hidden_states: Tensor,
    reference_points: Tensor,
    spatial_shapes_list: Any,
    position_embeddings: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The module's forward: its output, and the attention weights, which models return on request."""
    queries = _embedded(hidden_states, position_embeddings)
    value = module.value_proj(encoder_hidden_states).unflatten(-1, (module.n_heads, -1))
    points = (module.n_heads, module.n_levels, module.n_points)
    logits = module.attention_weights(queries).unflatten(-1, points)
    attended = ms_deform_attn_fused(
        *(value, spatial_shapes_list, None, reference_points),
        module.sampling_offsets(queries).unflatten(-1, (*points, 2)),
        logits,
        value_mask=attention_mask,
    )
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return module.output_proj(attended), weights


def _mask2former(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    """The same where True in the mask is padding."""
    valid = None if attention_mask is None else ~attention_mask
    return _deformable_detr(module, hidden_states, valid, **given)


def _rt_detr_v2(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    encoder_hidden_states: Tensor,
    position_embeddings: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """The forward of RT-DETRv2's module, whose offsets are scaled by a buffer."""
    attended, weights = _ragged(
        module,
        _embedded(hidden_states, position_embeddings),
        module.value_proj(encoder_hidden_states),
        attention_mask,
        (module.n_points_list, module.n_points_scale, module.method),
        **given,
    )
    return module.output_proj(attended), weights


def _d_fine(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *,
    encoder_hidden_states: Tensor,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """The same without projections of value and output, and blind to position embeddings."""
    points = (module.num_points_list, module.num_points_scale, module.decoder_method)
    return _ragged(module, hidden_states, encoder_hidden_states, attention_mask, points, **given)


def _ragged(
    module: Any,
    queries: Tensor,
    value: Any,
    mask: Tensor | None,
    points: tuple[list[int], Any, str],
    *,
    reference_points: Tensor,
    spatial_shapes_list: Any,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Output and weights (N, Lq, M, K) of modules whose levels have their own numbers of points."""
    numbers, scale, method = points
    if reference_points.shape[-1] != 4:
        raise ValueError(
            "reference_points must be boxes (x, y, w, h) in this model, "
            f"got shape {tuple(reference_points.shape)}"
        )
    logits = module.attention_weights(queries).unflatten(-1, (module.n_heads, -1))
    offsets = module.sampling_offsets(queries).unflatten(-1, (module.n_heads, -1, 2))
    # The models multiply by a buffer of checkpoints that holds 1 / P, where the operator divides by P.
    factors = [
        part * number
        for part, number in zip(scale.to(offsets.dtype).split(numbers), numbers, strict=True)
    ]
    offsets = offsets * torch.cat(factors)[:, None]
    if method == "discrete":  # no gradient there, not one of zeros
        offsets, reference_points = offsets.detach(), reference_points.detach()
    attended = ms_deform_attn_fused(
        value.unflatten(-1, (module.n_heads, -1)),
        *(spatial_shapes_list, None, reference_points, offsets, logits),
        num_points=numbers,
        offset_scale=module.offset_scale,
        interpolation=_INTERPOLATIONS[method],
        value_mask=mask,
    )
    return attended, logits.softmax(-1)


def _embedded(hidden_states: Tensor, position_embeddings: Tensor | None) -> Tensor:
    """The queries."""
    return hidden_states if position_embeddings is None else hidden_states + position_embeddings


# --- where they are ---------------------------------------------------------------------------------------

# The forward of each family's module: all of transformers' families that have such attention.
_FORWARDS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            *("deformable_detr", "grounding_dino", "lw_detr", "mm_grounding_dino", "omdet_turbo"),
            *("pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4", "rf_detr", "rt_detr"),
        ),
        _deformable_detr,
    ),
    **dict.fromkeys(("mask2former", "oneformer"), _mask2former),
    **dict.fromkeys(("d_fine", "deimv2"), _d_fine),
    "rt_detr_v2": _rt_detr_v2,
}
FAMILIES = tuple(_FORWARDS)

_LAYER = "MultiScaleDeformableAttention"
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "multi_scale_deformable_attention": _function,
    "multi_scale_deformable_attention_v2": _function_v2,
}

# The arguments of a module's forward: those that ours need, and those that they do without.
_NEEDED = {
    *("hidden_states", "attention_mask"),
    *("encoder_hidden_states", "reference_points", "spatial_shapes_list"),
}
_OTHERS = {
    *("self", "kwargs", "output_attentions", "encoder_attention_mask", "position_embeddings"),
    *("spatial_shapes", "level_start_index"),
}


def _modules(name: str) -> list[ModuleType]:
    """The families' modules in a package, which need not be loaded; an older transformers lacks some."""
    packages = {family: f"transformers.models.{family}" for family in FAMILIES}
    return [
        import_module(f"{package}.modeling_{family}")
        for family, package in packages.items()
        if f"{package}.modeling_{family}.".startswith(f"{name}.")
        and find_spec("transformers")
        and find_spec(package)
    ]


def _in_modules(modules: list[ModuleType]) -> Iterator[Replacement]:
    """What modules define: layers, and the modules around them or else the functions that these call."""
    for module in modules:
        forwards = [
            (member, vars(member).get("forward"))
            for member in vars(module).values()
            if isinstance(member, type) and member.__module__ == module.__name__
        ]
        for kind, forward in forwards:
            if ours := _ours(forward):
                yield Replacement(kind, "forward", standing_for(forward, _method(ours)))
        if not any(_around(forward) for _, forward in forwards):
            for name, ours in _FUNCTIONS.items():
                function = vars(module).get(name)
                if _arguments(function) == _arguments(ours):
                    yield Replacement(module, name, standing_for(function, partial(ours)))


def _in_model(model: nn.Module) -> Iterator[Replacement]:
    """The same parts of a model. Partial functions, unlike closures, can be copied and pickled with it."""
    for module in model.modules():
        ours = _ours(getattr(type(module), "forward", None))
        if ours and ("forward" not in vars(module) or is_ours(module.forward)):
            forward = standing_for(module.forward, partial(ours, module))
            yield Replacement(module, "forward", forward)
        elif _CORE in vars(module):
            core = getattr(module, _CORE)
            if _arguments(core) == _arguments(_function_v2):
                yield Replacement(module, _CORE, standing_for(core, partial(_function_v2)))


def _ours(forward: Any) -> Callable[..., Any] | None:
    """What takes the place of a class's forward, if anything does."""
    if _is_of(forward, _LAYER) and _arguments(forward) == _arguments(_layer):
        return _layer
    return _around(forward)


def _around(forward: Any) -> Callable[..., Any] | None:
    """What takes the place of the forward of a family's attention module, if its arguments are known."""
    if not _is_of(forward, "MultiscaleDeformableAttention"):
        return None
    package, _, family = forward.__module__.rpartition(".modeling_")
    if package != f"transformers.models.{family}" or not _is_compared():
        return None
    known = _NEEDED <= set(_arguments(forward)) <= _NEEDED | _OTHERS
    return _FORWARDS.get(family) if known else None


def _is_of(forward: Any, name: str) -> bool:
    """Whether it is the forward of a class whose name ends so."""
    return str(getattr(forward, "__qualname__", "")).endswith(f"{name}.forward")


def _arguments(function: Any) -> tuple[str, ...]:
    """The names of its arguments, none for what is no function."""
    return tuple(signature(function).parameters) if callable(function) else ()


def _method(ours: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a class can hold, one for each class."""

    def forward(self: nn.Module, *given: Any, **named: Any) -> Any:
        return ours(self, *given, **named)

    return forward


@cache
def _is_compared() -> bool:
    """Whether the installed transformers is no newer than what was compared."""
    major, minor = import_module("transformers").__version__.split(".")[:2]
    return (int(major), int(minor)) <= _NEWEST_COMPARED
