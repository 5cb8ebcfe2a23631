# SPDX-License-Identifier: Apache-2.0
"""D-FINE, DEIM, RT-DETR and RT-DETRv2 where other packages hold a copy of them, and in their own repositories.

::

    from cupy_msda.integrations.ports import patch

    patch()  # every installed package of `TARGETS`
    patch(src.zoo.dfine.utils)  # the module of a repository that defines deformable_attention_core_func_v2
    patch(model)  # one model

Replaced is the function that samples, and D-FINE's module around it. Other modules bind the function when
they are built: patch before that, or patch the model. They compute their locations themselves, from points,
boxes or, in getitune, boxes with four half-widths. Where "discrete" sampling reads levels that are not square,
it limits both coordinates to H - 1: those calls remain theirs, as do arguments that are not known here.

Written for dfine-seg 0.6.2, pydfine 0.2.1, lightly-train 0.18.0, getitune 0.4.0 and libreyolo 1.6.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from cupy_msda.integrations.forms import attend_boxes, detr_forward, plain, ragged, transposed
from cupy_msda.integrations.packages import Target, of_model, ours_for, patch_targets
from cupy_msda.integrations.patching import Patch, Replacement, apply, standing_for

_CORES = {"deformable_attention_core_func": plain, "deformable_attention_core_func_v2": ragged}
_CORE, _CORE_V2 = _CORES
_MODULE = "MSDeformableAttention.forward"


def _box_forward(original: Callable[..., Tensor]) -> Callable[..., Any]:
    """`forward` of D-FINE's module, whose value is projected outside, with offsets and logits in one call.

    Other calls than those of its decoders, with one box for all levels, are theirs, and so is "discrete" sampling.
    """

    def forward(
        self: Any, query: Tensor, reference_points: Tensor, value: Any, value_spatial_shapes: Any
    ) -> Any:
        given = query, reference_points, value, value_spatial_shapes
        is_default = getattr(self, "method", "default") == "default"
        if not is_default or reference_points.shape[2:] != (1, 4) or len(query) == 0:
            return original(self, *given)
        return attend_boxes(self, *given)

    return forward


def _libreyolo() -> Iterator[Target]:
    """What libreyolo has of each model."""
    models = "libreyolo.models"
    for name in ("deim.ms_deform", "dfine.ms_deform", "ec.utils", "gtr.utils", "rtdetrv2.utils"):
        yield Target(f"{models}.{name}", _CORE_V2, ragged)
    yield Target(f"{models}.openvocab.ovdeim.decoder", _CORE_V2, ragged)
    for name in ("deim", "dfine", "ec", "openvocab.ovdeim"):
        yield Target(f"{models}.{name}.decoder", _MODULE, _box_forward)
    yield Target(f"{models}.rtdetr.utils", _CORE, plain)
    yield Target(f"{models}.ec.decoder", "_ms_deform_attn_core_pytorch_pose", plain)
    yield Target(f"{models}.grounding_dino.nn", "_msda", plain)
    for name, form in (
        ("deformable_detr.ms_deform_attn", plain),
        ("lwdetr.nn", transposed),
        ("rfdetr.transformer", transposed),
    ):
        yield Target(f"{models}.{name}", "MSDeformAttn.forward", detr_forward)
        yield Target(f"{models}.{name}", "ms_deform_attn_core_pytorch", form)


_LIGHTLY = "lightly_train._task_models.object_detection_components"
_GETITUNE = "getitune.backend.lightning.models"
_GETITUNE_LAYERS = f"{_GETITUNE}.common.layers.transformer_layers"
TARGETS = (
    Target("dfine_seg.model.arch.utils", _CORE_V2, ragged),
    Target("dfine_seg.model.arch.dfine_decoder", _MODULE, _box_forward),
    Target("dfine.backends.native.ops", _CORE_V2, ragged),
    Target("dfine.backends.native.dfine_decoder", _MODULE, _box_forward),
    Target(f"{_LIGHTLY}.utils", _CORE, plain),
    Target(f"{_LIGHTLY}.utils", _CORE_V2, ragged),
    Target(f"{_LIGHTLY}.dfine_decoder", _MODULE, _box_forward),
    Target(f"{_GETITUNE}.modules.transformer", _CORE, plain),
    Target(_GETITUNE_LAYERS, "MSDeformableAttentionV2.forward", _box_forward),
    *_libreyolo(),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace the attention of these packages; arguments, result and errors as `packages.patch_targets`.

    Also a module of another package may be the target, or a model of another package's classes.
    """
    if isinstance(target, nn.Module):
        found = [*of_model(TARGETS, target), *_bound_cores(target)]
        return apply(found, f"the model {type(target).__name__}", strict)
    targets = TARGETS
    if isinstance(target, ModuleType) and not any(
        f"{each.module}.".startswith(f"{target.__name__}.") for each in TARGETS
    ):
        targets = tuple(Target(target.__name__, name, form) for name, form in _CORES.items())
    return patch_targets(targets, target, strict=strict)


def _bound_cores(model: nn.Module) -> Iterator[Replacement]:
    """A replacement of the function that each module has bound when it was built."""
    for module in model.modules():
        bound = vars(module).get("ms_deformable_attn_core")
        core: Any = bound.func if isinstance(bound, partial) else bound
        form = _CORES.get(getattr(core, "__name__", ""))
        if form is None:
            continue
        ours = ours_for(core, form)
        if isinstance(bound, partial):
            ours = standing_for(bound, partial(ours, *bound.args, **bound.keywords))
        yield Replacement(module, "ms_deformable_attn_core", ours)
