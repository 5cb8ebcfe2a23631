# SPDX-License-Identifier: Apache-2.0
"""`cupy_msda.export.onnx`: a node for TensorRT's plugin, computed here by the reference, and tables of a user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cupy_msda import MSDeformAttn, export, ms_deform_attn, ms_deform_attn_fused, reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.problem import Level
from tests.problems import flat_points, random_inputs

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    pytest.skip("torch.onnx is tried with torch 2.13 and later", allow_module_level=True)

onnx = pytest.importorskip("onnx", reason="torch.onnx.export needs onnx")
onnxscript = pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
from onnx.reference import ReferenceEvaluator  # noqa: E402 - only where it is installed
from onnx.reference.op_run import OpRun  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*axis name. .* will not be used:UserWarning"),
]

SIZES = [(5, 7), (3, 4)]
S = 47
NODE = "MultiscaleDeformableAttnPlugin_TRT"


class MultiscaleDeformableAttnPlugin_TRT(OpRun):  # noqa: N801 - the evaluator goes by the name
    """The plugin as its README describes it."""

    op_domain = "TRT"

    def _run(self, value, shapes, starts, locations, weights, plugin_version, plugin_namespace):
        assert (plugin_version, plugin_namespace) == ("2", "")
        assert shapes.dtype == starts.dtype == np.int32
        assert value.dtype == locations.dtype == weights.dtype
        assert value.dtype in (np.float32, np.float16)
        levels = [Level(int(h), int(w), int(s)) for (h, w), s in zip(shapes, starts, strict=True)]
        output = reference.forward(value, levels, locations, weights)
        return (output.reshape(*output.shape[:2], *value.shape[2:]),)


def exported(model: Any, arguments: Any = (), **options: Any) -> Any:
    """The ONNX model with nodes of the plugin, checked as far as a node of no standard goes."""
    if isinstance(model, nn.Module):
        model.eval()
    program = export.onnx(model, arguments, plugin="tensorrt", verbose=False, **options)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def run(model: Any, *tensors: torch.Tensor) -> torch.Tensor:
    """The first output of an ONNX model, with the plugin by the reference."""
    session = ReferenceEvaluator(model, new_ops=[MultiscaleDeformableAttnPlugin_TRT])
    feed = {name: tensor.numpy() for name, tensor in zip(session.input_names, tensors, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


def plugin_nodes(model: Any) -> list[Any]:
    return [node for node in model.graph.node if node.op_type == NODE]


class Function(nn.Module):
    """The function with rules of its own."""

    def __init__(self, sizes: Any = SIZES, **rules: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.rules = rules

    def forward(self, value, locations, weights, *mask):
        rules = {"value_mask": mask[0]} if mask else {}
        inputs = value, self.sizes, None, locations, weights
        return ms_deform_attn(*inputs, **rules, **self.rules)


class Layers(nn.Module):
    """Two modules in a row, which make fused calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MSDeformAttn(16, 2, 2, 3) for _ in range(2))
        for layer in self.layers:
            nn.init.normal_(layer.sampling_offsets.weight, std=0.5)
            nn.init.normal_(layer.attention_weights.weight)

    def forward(self, query, points, features, padding):
        for layer in self.layers:
            query = query + layer(query, points, features, SIZES, None, padding)
        return query


def layer_arguments(n=2, lq=6):
    generator = torch.Generator().manual_seed(n)
    return (
        torch.randn(n, lq, 16, generator=generator),
        torch.rand(n, lq, 1, 2, generator=generator),
        torch.randn(n, S, 16, generator=generator),
        torch.rand(n, S, generator=generator) < 0.2,
    )


@pytest.mark.parametrize("form", ["module", "program"])
def test_each_call_is_one_node_of_the_plugin(form):
    model, arguments = Layers().eval(), layer_arguments()
    batch = torch.export.Dim("batch")
    shapes = ({0: batch},) * 4
    if form == "module":
        found = exported(model, arguments, dynamic_shapes=shapes)
        assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    else:
        found = exported(torch.export.export(model, arguments, dynamic_shapes=shapes))
    nodes = plugin_nodes(found)
    assert len(nodes) == 2
    known = {info.name: info.type.tensor_type for info in found.graph.value_info}
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in found.graph.initializer}
    for node in nodes:
        assert node.domain == "TRT"
        attributes = {attribute.name: attribute.s for attribute in node.attribute}
        assert attributes == {"plugin_version": b"2", "plugin_namespace": b""}
        value, sizes, starts, locations, weights = node.input
        ranks = [len(known[name].shape.dim) for name in (value, locations, weights, *node.output)]
        assert ranks == [4, 6, 5, 4]
        assert constants[sizes].tolist() == [[5, 7], [3, 4]]
        assert constants[starts].tolist() == [0, 35]
        assert constants[sizes].dtype == constants[starts].dtype == np.int32
    assert {node.domain for node in found.graph.node} == {"", "TRT"}
    assert "GridSample" not in {node.op_type for node in found.graph.node}
    for given in (arguments, layer_arguments(3)):
        torch.testing.assert_close(run(found, *given), model(*given).detach())


HALF = torch.float16
DTYPES = [(torch.float32, torch.float32), (HALF, HALF), (HALF, torch.float32)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_node_computes_in_one_dtype(dtypes):
    inputs = random_inputs(SIZES, dtypes=dtypes)
    found = exported(Function(), inputs.tensors)
    output = run(found, *inputs.tensors)
    exact = inputs.to(torch.float64)
    assert output.dtype == dtypes[0]
    assert_within_budget(
        output,
        reference.forward(inputs.value, inputs.levels, *inputs.tensors[1:]),
        reference.forward(exact.value, exact.levels, *exact.tensors[1:]),
    )


def test_bfloat16_goes_through_the_node_in_float32():
    inputs = random_inputs(SIZES, dtypes=(torch.bfloat16, torch.bfloat16))
    found = exported(Function(), inputs.tensors)
    (node,) = plugin_nodes(found)
    (kind,) = {
        info.type.tensor_type.elem_type
        for info in found.graph.value_info
        if info.name in node.output
    }
    assert kind == onnx.TensorProto.FLOAT
    assert found.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_points_of_levels_and_masks_around_the_node():
    numbers = [3, 1]
    inputs = flat_points(random_inputs(SIZES), numbers)
    mask = torch.rand(inputs.value.shape[:2], generator=torch.Generator().manual_seed(2)) > 0.3
    inputs.value[~mask] = torch.inf  # as padding may be
    model = Function(num_points=numbers)
    output = run(exported(model, (*inputs.tensors, mask)), *inputs.tensors, mask)
    torch.testing.assert_close(output, model(*inputs.tensors, mask))


def test_boxes_and_points_of_levels_in_a_fused_call():
    class Boxes(nn.Module):
        def forward(self, value, references, offsets, logits):
            table = value, SIZES, None
            rules = {"num_points": [3, 1], "offset_scale": 0.25}
            return ms_deform_attn_fused(*table, references, offsets, logits, **rules)

    generator = torch.Generator().manual_seed(0)
    shapes = (2, S, 2, 8), (2, 5, 1, 4), (2, 5, 2, 4, 2), (2, 5, 2, 4)
    tensors = tuple(torch.rand(shape, generator=generator) for shape in shapes)
    output = run(exported(Boxes(), tensors), *tensors)
    torch.testing.assert_close(output, Boxes()(*tensors))


def test_the_node_is_on_the_device_of_the_model():
    """torch takes the output of a node of no standard to be on the CPU."""

    class Sum(nn.Module):
        def forward(self, value, locations, weights):
            output = ms_deform_attn(value, SIZES, None, locations, weights)
            return output + value.flatten(2).sum(1, keepdim=True)

    inputs = random_inputs(SIZES, device="meta")
    assert len(plugin_nodes(exported(Sum(), inputs.tensors))) == 1


@pytest.mark.parametrize("starts", [None, [0, 35]])
def test_a_level_table_that_is_an_input(starts):
    class Table(nn.Module):
        def forward(self, value, locations, weights, shapes):
            return ms_deform_attn(value, shapes, starts, locations, weights)

    inputs = random_inputs(SIZES)
    given = *inputs.tensors, torch.tensor(SIZES)
    output = run(exported(Table(), given), *given)
    torch.testing.assert_close(output, Table()(*given))


def test_level_sizes_that_are_those_of_an_image():
    class Map(nn.Module):
        def forward(self, image, locations, weights):
            value = image.flatten(2).transpose(1, 2)[:, :, None]
            return ms_deform_attn(value, [image.shape[2:]], None, locations, weights)

    points = torch.rand(1, 6, 1, 1, 3, 2), torch.rand(1, 6, 1, 1, 3)
    found = exported(
        Map(),
        (torch.randn(1, 8, 4, 5), *points),
        dynamic_shapes=({2: "height", 3: "width"}, None, None),
    )
    names = [size.dim_param for size in found.graph.input[0].type.tensor_type.shape.dim[2:]]
    assert names == ["height", "width"]
    image = torch.randn(1, 8, 7, 3)
    torch.testing.assert_close(run(found, image, *points), Map()(image, *points))


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "program"])
@pytest.mark.parametrize(
    ("rules", "dtype", "error", "message"),
    [
        (
            {"interpolation": "nearest"},
            torch.float32,
            ValueError,
            'interpolation must be "bilinear"',
        ),
        ({}, torch.float64, TypeError, "value must be float16, bfloat16 or float32"),
    ],
    ids=["nearest", "float64"],
)
def test_what_the_plugin_cannot_do_is_refused(form, rules, dtype, error, message):
    model = Function(**rules).eval()
    arguments = random_inputs(SIZES, dtypes=(dtype, dtype)).tensors
    if form == "program":
        model = torch.export.export(model, arguments)
    with pytest.raises(error, match=message):
        export.onnx(model, arguments, plugin="tensorrt")


def test_unknown_plugins_are_refused():
    with pytest.raises(ValueError, match=r'plugin must be None or "tensorrt", got \'openvino\''):
        export.onnx(Function(), (), plugin="openvino")


def test_the_old_exporter_is_refused():
    with pytest.raises(ValueError, match="dynamo must be True"):
        export.onnx(Function(), (), dynamo=False)


def test_a_torch_that_cannot_make_the_node_is_named(monkeypatch):
    monkeypatch.delattr(torch.onnx, "ops")
    with pytest.raises(RuntimeError, match=rf"got \"tensorrt\" and torch {torch.__version__[:4]}"):
        export.onnx(Function(), (), plugin="tensorrt")


def test_a_model_in_training_mode_is_told():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="the model is exported in training mode"):
        export.onnx(model, (torch.ones(1, 2),), verbose=False)


# --- without the plugin ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["module", "program"])
def test_standard_operators_by_default(form):
    model, arguments = Function([(2, 3)]).eval(), random_inputs([(2, 3)]).tensors
    given = model if form == "module" else torch.export.export(model, arguments)
    found = export.onnx(given, arguments, verbose=False).model_proto
    assert {node.domain for node in found.graph.node} == {""}
    assert "GridSample" not in {node.op_type for node in found.graph.node}
    torch.testing.assert_close(run(found, *arguments), model(*arguments))


def test_the_file_is_written_where_it_is_asked(tmp_path):
    inputs = random_inputs(SIZES)
    export.onnx(Function().eval(), inputs.tensors, tmp_path / "model.onnx", plugin="tensorrt")
    assert len(plugin_nodes(onnx.load(tmp_path / "model.onnx"))) == 1


# An operator as a node that a runtime of the user's has.
_THEIRS = onnxscript.values.Opset("theirs", 1)


def theirs(value, shapes, starts, sizes, level_starts, *points):
    parameter = onnx.defs.OpSchema.FormalParameter
    inputs = [parameter(name, "tensor(float)") for name in ("value", "first", "second")]
    outputs = [parameter("output", "tensor(float)")]
    schema = onnx.defs.OpSchema("Attention", "theirs", 1, inputs=inputs, outputs=outputs)
    return onnxscript.values.Op(_THEIRS, "Attention", schema)(value, *points[:2])


@pytest.mark.parametrize("operator", ["ms_deform_attn_forward", "ms_deform_attn_fused_forward"])
@pytest.mark.parametrize("form", ["module", "program"])
def test_a_table_of_the_user_translates_the_operator(form, operator):
    """Whatever the plugin."""
    model, arguments = Layers().eval(), layer_arguments()
    given = model if form == "module" else torch.export.export(model, arguments)
    table = {getattr(torch.ops.cupy_msda, operator).default: theirs}
    options = {"custom_translation_table": table, "plugin": "tensorrt", "verbose": False}
    found = export.onnx(given, arguments, **options).model_proto
    custom = [node.op_type for node in found.graph.node if node.domain]
    assert custom == ["Attention", "Attention"]
