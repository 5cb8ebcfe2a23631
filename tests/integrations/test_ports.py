# SPDX-License-Identifier: Apache-2.0
"""The functions of D-FINE, DEIM, RT-DETR and RT-DETRv2 are computed by ours wherever a package holds a copy of them.

The packages need torchvision, lightning or more: these are stand-ins with the signatures and shapes of dfine-seg
0.6.2, pydfine 0.2.1, lightly-train 0.18.0, getitune 0.4.0 and libreyolo 1.6.0.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn

from cupy_msda.integrations import ports
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, D, M, N, arrays, check, results

CORE, CORE_V2 = "deformable_attention_core_func", "deformable_attention_core_func_v2"
SQUARE = [(5, 5), (3, 3), (4, 4)]
GTR = "libreyolo.models.gtr.utils"
OWN: list[str] = []  # the methods of calls that their code computed


def levels(value, sizes, form):
    """Value (N, S, M, D) as a function takes it: whole, or levels (N, M, D, H*W), (N*M, D, H*W) or (N*M, D, H, W)."""
    if form == "whole":
        return value
    parts = value.permute(0, 2, 3, 1).split([h * w for h, w in sizes], dim=-1)
    if form == "levels":
        return parts
    parts = [part.flatten(0, 1) for part in parts]
    if form == "rows":
        return parts
    return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]


def whole(value, m):
    """Value (N, S, M, D) of any of these."""
    if isinstance(value, torch.Tensor):
        return value
    parts = [part.flatten(2) if part.shape[1] != m else part.flatten(0, 1) for part in value]
    return torch.cat(parts, dim=-1).unflatten(0, (-1, m)).permute(0, 3, 1, 2)


def core():
    def core(value, value_spatial_shapes, sampling_locations, attention_weights):
        value = whole(value, sampling_locations.shape[2])
        return stand_ins.sampled(value, value_spatial_shapes, sampling_locations, attention_weights)

    return core


def core_v2():
    def core(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        num_points_list,
        method="default",
        value_shape="default",
        allow_acceleration=True,
    ):
        OWN.append(method)
        assert method in ("default", "bilinear_gather", "discrete")
        points = sampling_locations, attention_weights, num_points_list
        value = whole(value, sampling_locations.shape[2])
        return stand_ins.sampled(value, value_spatial_shapes, *points, method == "discrete")

    return core


@pytest.fixture
def install(monkeypatch):
    """Installs a stand-in for a module of the table, and forgets the calls of their code."""
    OWN.clear()
    return partial(stand_ins.install, monkeypatch)


TARGETS = [(each.module, each.name) for each in ports.TARGETS]
V2 = [module for module, name in TARGETS if name == CORE_V2]
PLAIN = [
    each for each in TARGETS if each[1] in (CORE, "_msda", "_ms_deform_attn_core_pytorch_pose")
]


@pytest.mark.parametrize(("module", "name"), PLAIN)
@pytest.mark.parametrize("form", ["whole", "rows"])
def test_the_function_gives_the_same(module, name, form, install):
    place = install(module, **{name: core()})

    def call():
        function = getattr(place, name)
        return results(lambda v, x, w: function(levels(v, SIZES, form), SIZES, x, w), inputs)

    inputs = arrays()
    check(ports.patch, call)


@pytest.mark.parametrize("module", V2)
def test_every_copy_of_the_second_version_is_found(module, install):
    place = install(module, **{CORE_V2: core_v2()})
    user = install(
        "some_decoder", **{CORE_V2: getattr(place, CORE_V2)}
    )  # which has imported the name
    with ports.patch() as done:
        assert {str(one) for one in done.replaced} == {
            f"{module}.{CORE_V2}",
            f"some_decoder.{CORE_V2}",
        }
        assert getattr(user, CORE_V2) is getattr(place, CORE_V2)
        assert ports.patch(place).replaced == ()  # nothing is wrapped twice
    assert getattr(user, CORE_V2) is getattr(place, CORE_V2)


def test_a_module_that_does_not_import_is_passed_over(install, tmp_path, monkeypatch):
    """Since no model uses it here: packages have parts that need more than is installed."""
    install("libreyolo.models.dfine.ms_deform", **{CORE_V2: core_v2()})
    broken = install("libreyolo.models.deim")
    broken.__path__ = [str(tmp_path)]
    (tmp_path / "ms_deform.py").write_text("raise ImportError('no such extra')")
    with ports.patch() as done:
        assert str(done) == f"<Patch of libreyolo.models.dfine.ms_deform.{CORE_V2}>"
    monkeypatch.delitem(sys.modules, "libreyolo.models.dfine.ms_deform")
    with pytest.raises(ImportError, match="no such extra"):
        ports.patch()


@pytest.mark.parametrize("form", ["whole", "levels", "maps"])
@pytest.mark.parametrize("method", ["default", "bilinear_gather", "discrete"])
@pytest.mark.parametrize("sizes", [SIZES, SQUARE])
@pytest.mark.parametrize("points", [[2, 2, 2], [3, 0, 2]])
def test_the_second_version_gives_the_same(form, method, sizes, points, install):
    if method == "discrete" and sizes is SIZES:
        sizes = [
            (h, max(h, w)) for h, w in SIZES
        ]  # theirs reads beside a level that is narrower than high
    place = install(GTR, **{CORE_V2: core_v2()})
    _, *inputs = arrays(points)
    value = torch.randn(N, sum(h * w for h, w in sizes), M, D, dtype=torch.float64)

    def call():
        function = getattr(place, CORE_V2)
        return results(
            lambda v, x, w: function(levels(v, sizes, form), sizes, x, w, points, method=method),
            [value, *inputs],
        )

    check(ports.patch, call)
    is_theirs = method == "discrete" and sizes is not SQUARE
    assert len(OWN) == 2 + is_theirs  # before, after and, if so, meanwhile


@pytest.mark.parametrize("keywords", [{"allow_acceleration": False}, {"method": "other"}])
def test_what_is_not_known_is_theirs_to_compute(keywords, install):
    place = install("libreyolo.models.rtdetrv2.utils", **{CORE_V2: core_v2()})
    points = [2, 2, 2]
    with ports.patch():
        function = partial(getattr(place, CORE_V2), num_points_list=points, **keywords)
        value, locations, weights = arrays(points)
        if "method" in keywords:
            with pytest.raises(AssertionError):
                function(value, SIZES, locations, weights)
        else:
            function(value, SIZES, locations, weights)
    assert len(OWN) == 1


def test_an_empty_batch_is_theirs_to_compute(install):
    place = install("dfine_seg.model.arch.utils", **{CORE_V2: lambda *_, **__: "theirs"})
    value, locations, weights = (each[:0] for each in arrays([2, 2, 2]))
    with ports.patch():
        function = getattr(place, CORE_V2)
        given = levels(value, SIZES, "levels"), SIZES, locations, weights, [2, 2, 2]
        assert function(*given) == "theirs"


class Decoder(nn.Module):
    """Binds the function when it is built."""

    def __init__(self, function, **keywords):
        super().__init__()
        self.ms_deformable_attn_core = partial(function, **keywords) if keywords else function

    def forward(self, *given):
        return self.ms_deformable_attn_core(*given)


@pytest.mark.parametrize("form", ["function", "partial"])
def test_a_model_that_was_built_before_can_be_patched(form, install):
    is_partial = form == "partial"
    place = install("src.zoo.utils", **{CORE_V2: core_v2(), CORE: core()})
    function = getattr(place, CORE_V2 if is_partial else CORE)
    keywords = {"method": "default"} if is_partial else {}
    model, other = nn.Sequential(Decoder(function, **keywords)), Decoder(function, **keywords)
    points = [2, 2, 2]
    inputs = arrays(points) if is_partial else arrays()
    rest = [points] if is_partial else []

    def call():
        return results(lambda v, x, w: model[0](v, SIZES, x, w, *rest), inputs)

    done = check(lambda: ports.patch(model), call)
    assert str(done).endswith("Decoder.ms_deformable_attn_core of an object>")
    with ports.patch(model):
        assert ports.patch(model).replaced == ()
        OWN.clear()
        other(inputs[0], SIZES, *inputs[1:], *rest)
        assert len(OWN) == is_partial
    with pytest.raises(LookupError, match="the model Linear must hold"):
        ports.patch(nn.Linear(1, 1))


def test_the_module_of_a_repository_can_be_patched(install):
    """D-FINE and DEIM themselves, which nothing installs."""
    place = install("src.zoo.dfine.utils", **{CORE_V2: core_v2()})
    user = install("src.zoo.dfine.dfine_decoder", **{CORE_V2: getattr(place, CORE_V2)})
    with ports.patch(place) as done:
        assert len(done.replaced) == 2
        value, locations, weights = arrays([2, 2, 2])
        getattr(user, CORE_V2)(value, SIZES, locations, weights, [2, 2, 2])
        assert OWN == []
    with pytest.raises(LookupError, match=r"^torch\.nn must hold"):
        ports.patch(torch.nn)


class Module(nn.Module):
    """D-FINE's, and getitune's, which samples in its own forward and whose offsets are always in halves of a box."""

    def __init__(self, points, offset_scale, method="default"):
        super().__init__()
        self.num_heads, self.num_points_list, self.method = M, points, method
        scale = torch.tensor([1 / n for n in points for _ in range(n)])
        self.register_buffer("num_points_scale", scale)
        self.sampling_offsets = nn.Linear(M * D, 2 * M * sum(points))
        self.attention_weights = nn.Linear(M * D, M * sum(points))
        if offset_scale is not None:
            self.offset_scale = offset_scale

    def forward(self, query, reference_points, value, value_spatial_shapes):
        OWN.append(self.method)
        points = M, sum(self.num_points_list)
        offsets = self.sampling_offsets(query).unflatten(-1, (*points, 2))
        weights = self.attention_weights(query).unflatten(-1, points).softmax(-1)
        boxes = reference_points[:, :, None]
        scale = getattr(self, "offset_scale", 0.5) * self.num_points_scale[:, None]
        locations = boxes[..., :2] + offsets * scale * boxes[..., 2:]
        rest = self.num_points_list, self.method == "discrete"
        return stand_ins.sampled(whole(value, M), value_spatial_shapes, locations, weights, *rest)


MODULES = [each for each in TARGETS if each[1].startswith("MSDeformableAttention")]


@pytest.fixture(params=MODULES)
def box_module(request, install):
    """A copy of the class in the place of one of these, and the scale that its offsets may have."""
    module, name = request.param
    kind = type("Copy", (Module,), {"forward": Module.forward})
    install(module, **{name.partition(".")[0]: kind})
    return kind, None if module.startswith("getitune") else 0.25


def call_module(module, inputs, sizes=SIZES, form="levels"):
    return results(
        lambda q, r, v: module(q, r, levels(v.unflatten(-1, (M, D)), sizes, form), sizes),
        inputs,
        *module.parameters(),
    )


@pytest.mark.parametrize("form", ["levels", "whole"])
def test_the_module_around_it_gives_the_same(form, box_module):
    kind, scale = box_module
    module = kind([3, 1, 2], scale).double()
    module.num_points_scale[1] *= 1.5  # a checkpoint may have anything there
    inputs = stand_ins.module_inputs(4, levels=1)
    for patch in (ports.patch, lambda: ports.patch(module)):
        OWN.clear()
        check(patch, lambda: call_module(module, inputs, form=form))
        assert len(OWN) == 2


def test_discrete_sampling_and_boxes_of_points_are_theirs(box_module):
    kind, scale = box_module
    points = [2, 1, 1]
    query, references, features = stand_ins.module_inputs(4, levels=4)  # a box for each point
    with ports.patch():
        call_module(kind(points, scale).double(), [query, references, features])
        sizes = [(h, max(h, w)) for h, w in SIZES]
        features = torch.randn(N, sum(h * w for h, w in sizes), M * D, dtype=torch.float64)
        module = kind(points, scale, "discrete").double()
        call_module(module, [query, references[:, :, :1], features], sizes)
    assert OWN == ["default", "discrete"]
