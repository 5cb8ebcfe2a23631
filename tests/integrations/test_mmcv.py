# SPDX-License-Identifier: Apache-2.0
"""mmcv's attention is computed by ours, also where its compiled operators are missing.

mmcv needs OpenCV, which is large: this is a stand-in with the signatures and shapes of mmcv-lite 2.2.0 and
onedl-mmcv 2.3.6, in files, so that its import fails as theirs does.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from cupy_msda.integrations import mmcv
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, N, S, check, results

SHAPES = torch.tensor(SIZES)
STARTS = torch.tensor([0, 35, 41])
OPS = """
import torch
from mmcv.utils import ext_loader
from tests.integrations import stand_ins

ext_module = ext_loader.load_ext("_ext", ["ms_deform_attn_backward", "ms_deform_attn_forward"])


class MultiScaleDeformableAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights,
                im2col_step):
        ctx.im2col_step = im2col_step
        given = value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
        ctx.save_for_backward(*given)
        return ext_module.ms_deform_attn_forward(*given, im2col_step=im2col_step)

    @staticmethod
    def backward(ctx, grad_output):
        value, shapes, starts, locations, weights = ctx.saved_tensors
        gradients = [torch.zeros_like(one) for one in (value, locations, weights)]
        ext_module.ms_deform_attn_backward(
            *ctx.saved_tensors, grad_output.contiguous(), *gradients, im2col_step=ctx.im2col_step
        )
        return gradients[0], None, None, *gradients[1:], None


def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
    return stand_ins.sampled(value, value_spatial_shapes, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(stand_ins.Attention):
    def __init__(self, batch_first=False):
        super().__init__(**stand_ins.HEADS)
        self.num_heads, self.num_levels, self.num_points = self.samples
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
                reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs):
        value = query if value is None else value
        identity = kwargs.get("residual") if identity is None else identity
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        output = self.attend(query, reference_points, value, spatial_shapes, key_padding_mask)
        return self.dropout(output if self.batch_first else output.transpose(0, 1)) + identity
"""
FILES = {
    "__init__.py": "",
    "utils/__init__.py": "",
    "utils/ext_loader.py": """
import importlib
def load_ext(name, functions):
    extension = importlib.import_module("mmcv." + name)
    for function in functions:
        assert hasattr(extension, function), f"{function} miss in module {name}"
    return extension
""",
    "ops/__init__.py": "from .multi_scale_deform_attn import MultiScaleDeformableAttention\nfrom .nms import nms\n",
    "ops/nms.py": """
from ..utils import ext_loader
ext_module = ext_loader.load_ext("_ext", ["nms", "softnms"])
def nms():
    return ext_module.nms()
""",
    "ops/multi_scale_deform_attn.py": OPS,
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of mmcv without its extension; what is imported of it is forgotten."""
    for name, text in FILES.items():
        file = tmp_path / "mmcv" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "mmcv"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmcv"]:
        del sys.modules[name]


@pytest.fixture
def compiled(package, monkeypatch):
    """An extension whose operators must not run on a CPU, as theirs."""

    def ms_deform_attn_forward(*_, im2col_step):
        raise RuntimeError("not implemented on CPU")

    def ms_deform_attn_backward(*_, im2col_step):
        raise RuntimeError("not implemented on CPU")

    extension = ModuleType("mmcv._ext")
    vars(extension).update(
        ms_deform_attn_forward=ms_deform_attn_forward,
        ms_deform_attn_backward=ms_deform_attn_backward,
        nms=lambda: "theirs",
        softnms=None,
    )
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    return extension


def ops():
    return importlib.import_module("mmcv.ops.multi_scale_deform_attn")


def test_the_function_gives_the_same(compiled):
    def call():
        function = ops().multi_scale_deformable_attn_pytorch
        return results(lambda v, x, w: function(v, SHAPES, x, w), inputs)

    inputs = stand_ins.arrays()
    done = check(mmcv.patch, call)
    names = "multi_scale_deformable_attn_pytorch", "MultiScaleDeformableAttnFunction.apply"
    module = "mmcv.ops.multi_scale_deform_attn"
    assert [str(one) for one in done.replaced] == [
        *(f"{module}.{name}" for name in (*names, "MultiScaleDeformableAttention.forward")),
        "mmcv._ext.ms_deform_attn_forward",
        "mmcv._ext.ms_deform_attn_backward",
    ]


@pytest.mark.parametrize("way", ["apply", "extension"])
def test_the_autograd_function_gives_the_same(way, compiled):
    kind = ops().MultiScaleDeformableAttnFunction
    inputs = stand_ins.arrays()
    plain = ops().multi_scale_deformable_attn_pytorch
    expected = results(lambda v, x, w: plain(v, SHAPES, x, w), inputs)
    with mmcv.patch():
        # As a project does that has the extension's two functions in a Function of its own.
        apply = kind.apply if way == "apply" else super(torch.autograd.Function, kind).apply
        actual = results(lambda v, x, w: apply(v, SHAPES, STARTS, x, w, 64), inputs)
        stand_ins.assert_equal(actual, expected)
    with pytest.raises(RuntimeError, match="not implemented on CPU"):
        kind.apply(inputs[0], SHAPES, STARTS, *inputs[1:], 64)


def test_the_extension_fills_the_gradients_that_it_is_given(compiled):
    inputs = stand_ins.arrays()
    output = torch.ones(N, stand_ins.LQ, stand_ins.M * stand_ins.D).double()
    gradients = [torch.full_like(each, torch.nan) for each in inputs]
    with mmcv.patch():
        given = inputs[0], SHAPES, STARTS, *inputs[1:], output, *gradients
        assert compiled.ms_deform_attn_backward(*given, im2col_step=64) is None
    leaves = [each.requires_grad_() for each in inputs]
    plain = ops().multi_scale_deformable_attn_pytorch(leaves[0], SHAPES, *leaves[1:])
    stand_ins.assert_equal(gradients, torch.autograd.grad(plain.sum(), leaves))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("given", ["all", "residual", "query"])
def test_the_module_gives_the_same(batch_first, coordinates, given, compiled):
    module = ops().MultiScaleDeformableAttention(batch_first).double()
    query, references, value = stand_ins.module_inputs(coordinates)
    sequences = [query, value, torch.randn_like(query), torch.randn_like(query)]
    if given == "query":  # self-attention, which attends to the queries
        references = references[:, :1].expand(-1, S, -1, -1)
        sequences = [value]
    if not batch_first:
        sequences = [each.transpose(0, 1) for each in sequences]
    keywords = {"spatial_shapes": SHAPES, "level_start_index": STARTS}
    keywords["key_padding_mask"] = torch.rand(N, S) < 0.3

    def attend(references, query, value=None, identity=None, query_pos=None):
        names = {"residual" if given == "residual" else "identity": identity}
        torch.manual_seed(1)  # of the dropout
        return module(
            query,
            None,
            value,
            query_pos=query_pos,
            reference_points=references,
            **names,
            **keywords,
        )

    check(mmcv.patch, lambda: results(attend, [references, *sequences], *module.parameters()))


def test_one_model_alone_can_be_patched(compiled):
    kind = ops().MultiScaleDeformableAttention
    with mmcv.patch(nn.ModuleList([kind(), kind()])) as done:
        assert (
            str(done)
            == "<Patch of mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttention.forward of an object (2x)>"
        )


@pytest.mark.parametrize("fault", [None, "raise ImportError('undefined symbol: _ZN2at')"])
def test_operators_that_are_not_compiled_are_no_obstacle(fault, package):
    if fault:
        (package / "_ext.py").write_text(fault)
    with pytest.raises(ImportError):
        ops()
    for name in [name for name in sys.modules if name.startswith("mmcv.ops")]:
        del sys.modules[name]
    mmcv.patch()
    from mmcv.ops import MultiScaleDeformableAttention, nms

    module = MultiScaleDeformableAttention().double().eval()
    query, references, value = stand_ins.module_inputs(4)
    query, value = query.transpose(0, 1), value.transpose(0, 1)
    module(query, value=value, reference_points=references, spatial_shapes=SHAPES).sum().backward()
    assert module.value_proj.weight.grad.abs().sum() > 0
    cause = "undefined symbol: _ZN2at" if fault else "No module named 'mmcv._ext'"
    with pytest.raises(
        NotImplementedError, match=rf"mmcv._ext.nms must be compiled, .* \({cause}\): install"
    ):
        nms()
    assert sys.modules["mmcv._ext"].get_compiler_version() == "n/a"
    assert importlib.util.find_spec("mmcv._ext") is not None  # as mmcv itself asks


def test_a_package_that_does_not_import_is_left_alone(package):
    (package / "__init__.py").write_text("raise ImportError('libGL.so.1')")
    with pytest.raises(ImportError, match=r"libGL\.so\.1"):
        mmcv.patch()
    assert "mmcv._ext" not in sys.modules
