# SPDX-License-Identifier: Apache-2.0
"""Models that leave this process: torch.export, saved and loaded, by standard operators, ONNX, AOTInductor."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from cupy_msda import (
    MSDeformAttn,
    MSDeformAttnFunction,
    decompositions,
    ms_deform_attn,
    ms_deform_attn_backward,
    reference,
)
from cupy_msda.budget import assert_within_budget
from tests.non_finite import non_finite_inputs
from tests.problems import check_against_reference, flat_points, random_inputs

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    pytest.skip("torch.export is tried with torch 2.13 and later", allow_module_level=True)

pytestmark = [
    # torch 2.13's own: what torch.save copies of a program, and what its tracers are made of.
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # torch.onnx says so of any two inputs that share a dynamic size.
    pytest.mark.filterwarnings("ignore:.*axis name. .* will not be used:UserWarning"),
]

SIZES = [(5, 7), (3, 4)]
S = sum(h * w for h, w in SIZES)
STARTS = [0, 35]
BATCH, QUERIES = Dim("batch"), Dim("queries")
DYNAMIC = ({0: BATCH}, {0: BATCH, 1: QUERIES}, {0: BATCH, 1: QUERIES})
# What programs are traced with, and other sizes to run them with.
TRACED, OTHERS = (2, 6), [(3, 9), (1, 1), (2, 0), (0, 4)]


class Bare(nn.Module):
    """The function, with the level table in one of the forms it comes in."""

    def __init__(self, form: str = "list") -> None:
        super().__init__()
        self.form = form
        self.register_buffer("shapes", torch.tensor(SIZES))
        self.register_buffer("starts", torch.tensor(STARTS))

    def forward(self, value, locations, weights, shapes=None):
        if self.form == "function":
            arguments = (value, self.shapes, self.starts, locations, weights, 64)
            return MSDeformAttnFunction.apply(*arguments)
        table = {
            "list": (SIZES, None),
            "starts": (SIZES, self.starts),
            "buffer": (self.shapes, STARTS),
            "input": (shapes, None),
        }[self.form]
        return ms_deform_attn(value, *table, locations, weights)


class Attention(nn.Module):
    """The module between layers of its own, with the level table as `Bare` takes it."""

    def __init__(self, form: str = "list", grad: bool = True) -> None:
        super().__init__()
        self.form = form
        self.attention = MSDeformAttn(16, 2, 2, 3)
        self.norm = nn.LayerNorm(16)
        self.register_buffer("shapes", torch.tensor(SIZES))
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.5)
        self.requires_grad_(grad)

    def forward(self, query, points, features, shapes=None):
        given = {"list": SIZES, "buffer": self.shapes, "input": shapes}[self.form]
        return self.norm(query + self.attention(query, points, features, given, None))


def bare_arguments(n, lq, form="list", **options):
    tensors = random_inputs(SIZES, n=n, lq=lq, **options).tensors
    return (*tensors, torch.tensor(SIZES)) if form == "input" else tensors


def attention_arguments(n, lq, form="list"):
    generator = torch.Generator().manual_seed(n + lq)
    tensors = (
        torch.randn(n, lq, 16, generator=generator),
        torch.rand(n, lq, 1, 2, generator=generator) * 1.2 - 0.1,
        torch.randn(n, S, 16, generator=generator),
    )
    return (*tensors, torch.tensor(SIZES)) if form == "input" else tensors


def attention_dynamic(form):
    shapes = ({0: BATCH, 1: QUERIES}, {0: BATCH, 1: QUERIES}, {0: BATCH})
    return (*shapes, None) if form == "input" else shapes


def bare_dynamic(form):
    return (*DYNAMIC, None) if form == "input" else DYNAMIC


WAYS = [
    ("list", False, False),
    ("buffer", False, False),
    ("list", True, True),
    ("list", True, False),
    ("input", True, False),
    ("input", False, True),
]
FORMS = ["list", "starts", "buffer", "input", "function"]
SINGLE = (torch.float32, torch.float32)


def targets(program):
    """Names of all operators of a program, those inside of higher-order operators too."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if node.op == "call_function"
    }


def is_standard(program):
    return not any("cupy_msda" in target for target in targets(program))


def on_the_edges(n=2, lq=6, **options):
    """Problems with points on, near and beyond every border; those of query 0 are all outside."""
    inputs = random_inputs(SIZES, n=n, lq=lq, p=5, **options)
    locations = inputs.locations.clone()
    for level, (h, w) in enumerate(SIZES):
        for axis, size in enumerate((w, h)):
            half = 0.5 / size  # of a pixel: -half and 1 + half are the first points outside
            edges = [0, 1, half, 1 - half, -half, 1 + half, -0.3, 1.4, -half / 2, 1 + half / 2]
            locations[:, 1, :, level, :, axis] = torch.tensor(edges[:5])
            locations[:, 2, :, level, :, axis] = torch.tensor(edges[5:])
            locations[:, 3, :, level, :, axis] = torch.tensor(edges[::2])
    nan, inf = float("nan"), float("inf")
    locations[:, 3, :, :, :, 1] = 0.5
    locations[:, 0, ..., 0] = torch.tensor([nan, inf, -inf, 1e30, -1e30])
    return inputs._replace(locations=locations)


def check_output(inputs, output):
    """The output within the error budget of the reference; what is outside is exactly zero."""
    exact = inputs.to(torch.float64)
    assert_within_budget(
        output,
        reference.forward(inputs.value, inputs.levels, *inputs.tensors[1:]),
        reference.forward(exact.value, exact.levels, *exact.tensors[1:]),
    )


def run(code: str, *arguments: object, cwd: Path) -> None:
    """Run Python code in a new process that does not find this checkout by its directory."""
    command = [sys.executable, "-I", "-c", textwrap.dedent(code), *map(str, arguments)]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300
    )
    assert finished.returncode == 0, finished.stderr


# --- torch.export ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "grad", "strict"), WAYS, ids=str)
def test_the_module_is_exported_with_the_operator_in_one_piece(form, grad, strict):
    model = Attention(form, grad)
    arguments = attention_arguments(*TRACED, form)
    fixed = torch.export.export(model, arguments, strict=strict)
    program = torch.export.export(
        model, arguments, dynamic_shapes=attention_dynamic(form), strict=strict
    )
    for one in (fixed, program):
        assert "cupy_msda.ms_deform_attn_fused_forward.default" in targets(one)
        assert torch.equal(one.module()(*arguments), model(*arguments))
    for n, lq in OTHERS:
        others = attention_arguments(n, lq, form)
        assert torch.equal(program.module()(*others), model(*others))


@pytest.mark.parametrize("form", FORMS)
def test_the_function_is_exported_with_the_operator_in_one_piece(form):
    model = Bare(form)
    arguments = bare_arguments(*TRACED, form)
    program = torch.export.export(model, arguments, dynamic_shapes=bare_dynamic(form))
    assert "cupy_msda.ms_deform_attn_forward.default" in targets(program)
    for n, lq in (TRACED, *OTHERS):
        others = bare_arguments(n, lq, form)
        assert torch.equal(program.module()(*others), model(*others))


LOAD_AND_RUN = """
    for path in sys.argv[1:]:
        program = torch.export.load(path + ".pt2").module()
        with torch.no_grad():
            torch.save([program(*arguments) for arguments in torch.load(path + ".in")], path + ".out")
"""


def saved(program, path, model, arguments):
    """Save a program and inputs for `LOAD_AND_RUN`; gives what it should compute."""
    torch.export.save(program, f"{path}.pt2")
    torch.save(arguments, f"{path}.in")
    with torch.no_grad():
        return [model(*one) for one in arguments]


def test_saved_programs_run_in_a_new_process(tmp_path):
    expected = {}
    for dynamic in (False, True):
        for form in ("list", "input"):
            model = Attention(form)
            arguments = [attention_arguments(*size, form) for size in (TRACED, *OTHERS)]
            shapes = attention_dynamic(form) if dynamic else None
            program = torch.export.export(model, arguments[0], dynamic_shapes=shapes)
            path = tmp_path / f"{form}-{dynamic}"
            runnable = arguments if dynamic else arguments[:1]
            expected[path] = saved(program, path, model, runnable)
    checkout = str(Path(__file__).parents[1])
    imports = f"import sys; sys.path.append({checkout!r}); import torch, cupy_msda"
    run(imports + textwrap.dedent(LOAD_AND_RUN), *expected, cwd=tmp_path)
    for path, outputs in expected.items():
        for got, output in zip(torch.load(f"{path}.out"), outputs, strict=True):
            assert torch.equal(got, output)


# --- by standard operators -------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "grad", "strict"), WAYS[::2], ids=str)
def test_the_module_by_standard_operators(form, grad, strict):
    model = Attention(form, grad)
    arguments = attention_arguments(*TRACED, form)
    program = torch.export.export(
        model, arguments, dynamic_shapes=attention_dynamic(form), strict=strict
    ).run_decompositions(decompositions())
    assert is_standard(program)
    assert "aten.layer_norm.default" in targets(program)  # nothing else is taken apart
    for n, lq in (TRACED, *OTHERS):
        others = attention_arguments(n, lq, form)
        torch.testing.assert_close(program.module()(*others), model(*others))


@pytest.mark.parametrize(
    ("form", "dtypes"),
    [
        *((form, SINGLE) for form in FORMS),
        ("list", (torch.float16, torch.float32)),
        ("input", (torch.float16, torch.float16)),
        ("list", (torch.bfloat16, torch.float32)),
        ("list", (torch.float64, torch.float32)),
    ],
    ids=str,
)
def test_numbers_by_standard_operators(form, dtypes):
    extra = (torch.tensor(SIZES),) if form == "input" else ()
    inputs = on_the_edges(dtypes=dtypes)
    program = torch.export.export(
        Bare(form), (*inputs.tensors, *extra), dynamic_shapes=bare_dynamic(form)
    ).run_decompositions(decompositions())
    assert is_standard(program)
    for inputs in (on_the_edges(dtypes=dtypes), on_the_edges(3, 9, dtypes=dtypes)):
        output = program.module()(*inputs.tensors, *extra)
        check_output(inputs, output)
        assert not output[:, 0].any()


class Gradients(nn.Module):
    """The array function of the gradients."""

    def __init__(self, sizes=SIZES) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, grad_output, value, locations, weights):
        inputs = (value, self.sizes, None, locations, weights)
        return tuple(ms_deform_attn_backward(grad_output, *inputs))


def test_gradients_by_standard_operators():
    dynamic = ({0: BATCH, 1: QUERIES}, *DYNAMIC)
    inputs = random_inputs(SIZES)
    program = torch.export.export(
        Gradients(), (inputs.grad_output, *inputs.tensors), dynamic_shapes=dynamic
    )
    assert "cupy_msda.ms_deform_attn_backward.default" in targets(program)
    program = program.run_decompositions(decompositions())
    assert is_standard(program)
    for problem in (inputs, random_inputs(SIZES, n=3, lq=9)):
        gradients = program.module()(problem.grad_output, *problem.tensors)
        output = ms_deform_attn(problem.value, SIZES, None, *problem.tensors[1:])
        check_against_reference(problem, output, gradients)


def test_non_finite_numbers_by_standard_operators():
    inputs = non_finite_inputs()
    cases = (
        (Bare("input"), (*inputs.tensors, inputs.shapes())),
        (Gradients(inputs.sizes), (inputs.grad_output, *inputs.tensors)),
    )
    output, gradients = (
        torch.export.export(*case).run_decompositions(decompositions()).module()(*case[1])
        for case in cases
    )
    check_against_reference(inputs, output, gradients)


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False)], ids=str)
def test_gradients_that_are_not_needed_have_no_elements(flags):
    inputs = random_inputs(SIZES)
    operator = torch.ops.cupy_msda.ms_deform_attn_backward.default
    table = (None, None, [5, 7, 3, 4], STARTS)
    arguments = (inputs.grad_output, inputs.value, *table, *inputs.tensors[1:], *flags)
    for got, expected in zip(
        decompositions()[operator](*arguments), operator(*arguments), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_decomposed_programs_run_where_the_package_is_absent(tmp_path):
    expected = {}
    for form in ("list", "input"):
        model = Attention(form)
        arguments = [attention_arguments(*size, form) for size in (TRACED, *OTHERS)]
        program = torch.export.export(
            model, arguments[0], dynamic_shapes=attention_dynamic(form)
        ).run_decompositions(decompositions())
        expected[tmp_path / form] = saved(program, tmp_path / form, model, arguments)
    imports = "import sys; sys.modules['cupy_msda'] = None; import torch"
    run(imports + textwrap.dedent(LOAD_AND_RUN), *expected, cwd=tmp_path)
    for path, outputs in expected.items():
        for got, output in zip(torch.load(f"{path}.out"), outputs, strict=True):
            torch.testing.assert_close(got, output)


class Ordered(nn.Module):
    """The function with an order of the queries, which may be that of a map's pixels."""

    def __init__(self, order: Any) -> None:
        super().__init__()
        self.order = order

    def forward(self, value, locations, weights, pixels):
        order = [pixels.shape] if self.order == "map" else self.order
        return ms_deform_attn(value, SIZES, None, locations, weights, query_order=order)


ORDERS = {"auto": ("auto", []), "none": (None, [[]]), "map": ("map", [[2, 3]])}
ORDERS["grids"] = ([(1, 2), (4, 1)], [[1, 2, 4, 1]])


@pytest.mark.parametrize(("order", "kept"), ORDERS.values(), ids=ORDERS)
def test_programs_keep_the_order_of_the_queries(order, kept, tmp_path):
    arguments = (*bare_arguments(*TRACED), torch.ones(2, 3))
    program = torch.export.export(Ordered(order), arguments)
    torch.export.save(program, tmp_path / "ordered.pt2")
    loaded = torch.export.load(tmp_path / "ordered.pt2")
    (node,) = (node for node in loaded.graph.nodes if "cupy_msda" in str(node.target))
    assert list(node.args[7:]) == kept
    output = Ordered("auto")(*arguments)
    assert torch.equal(loaded.module()(*arguments), output)
    standard = loaded.run_decompositions(decompositions())
    assert is_standard(standard)
    torch.testing.assert_close(standard.module()(*arguments), output)


def test_the_grids_of_the_queries_may_be_dynamic():
    h, w = Dim("h"), Dim("w")
    by_query = {0: BATCH, 1: QUERIES}
    program = torch.export.export(
        Ordered("map"),
        (*bare_arguments(*TRACED), torch.ones(2, 3)),
        dynamic_shapes=({0: BATCH}, by_query, by_query, {0: h, 1: w}),
    )
    standard = program.run_decompositions(decompositions())
    others = (*bare_arguments(3, 20), torch.ones(4, 5))
    output = Ordered("auto")(*others)
    assert torch.equal(program.module()(*others), output)
    torch.testing.assert_close(standard.module()(*others), output)
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 20"):
        program.module()(*others[:3], torch.ones(4, 4))


def test_an_order_that_does_not_fit_is_refused_while_exporting():
    arguments = (*bare_arguments(*TRACED), torch.ones(2, 3))
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 6"):
        torch.export.export(Ordered([(2, 2)]), arguments)


def test_the_operator_stays_in_one_piece_unless_asked_for():
    program = torch.export.export(Bare(), bare_arguments(*TRACED), dynamic_shapes=DYNAMIC)
    core = program.run_decompositions()
    assert "cupy_msda.ms_deform_attn_forward.default" in targets(core)
    # torch's compiler, too, would look here, and refuse to compile under CI.
    assert not decompositions().keys() & torch._decomp.decomposition_table.keys()


def test_a_decomposed_program_trains():
    model = Attention()
    arguments = attention_arguments(*TRACED)
    program = torch.export.export(model, arguments).run_decompositions(decompositions())
    copy = program.module()
    model(*arguments).square().sum().backward()
    copy(*arguments).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in copy.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


class Misfit(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, value, locations, weights):
        return ms_deform_attn(value, self.sizes, None, locations, weights)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(5, 7), (4, 4)], "must keep every level inside the S = 47"),
        ([(5, 7)], "spatial_shapes must have one entry for each of the L = 2"),
        (torch.tensor([(5, 7)]), r"spatial_shapes must have shape \(L, 2\) = \(2, 2\)"),
    ],
    ids=["beyond S", "too few", "too few in a tensor"],
)
def test_what_does_not_fit_is_refused_while_exporting(sizes, message):
    arguments = bare_arguments(*TRACED)
    with pytest.raises(ValueError, match=message):
        torch.export.export(Misfit(sizes), arguments, dynamic_shapes=DYNAMIC)


def test_what_does_not_fit_is_refused_while_decomposing():
    """As in programs exported by versions that did not look while exporting."""
    operator = torch.ops.cupy_msda.ms_deform_attn_forward.default
    value, *points = bare_arguments(*TRACED)
    with pytest.raises(ValueError, match="must keep every level inside the S = 47"):
        decompositions()[operator](value, None, None, [5, 7, 4, 4], None, *points)


# --- images of any size ----------------------------------------------------------------------------


class Images(nn.Module):
    """Level sizes that are those of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 3)

    def forward(self, query, points, *maps):
        sizes = [feature.shape[-2:] for feature in maps]
        features = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
        return self.attention(query, points, features, sizes, None)


def image_arguments(n, lq, h, w):
    query, points, _ = attention_arguments(n, lq)
    return query, points, torch.randn(n, 16, 2 * h, 2 * w), torch.randn(n, 16, h, w)


def image_dynamic():
    h, w = Dim("h"), Dim("w")
    by_query = {0: BATCH, 1: QUERIES}
    return by_query, by_query, ({0: BATCH, 2: 2 * h, 3: 2 * w}, {0: BATCH, 2: h, 3: w})


class Encoder(nn.Module):
    """The operator over all positions of two feature maps, with every integer taken from their shapes."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, points, weights, *maps):
        sizes = [tuple(feature.shape[-2:]) for feature in maps]
        value = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
        value = value.unflatten(-1, (2, 8))
        starts = [0, sizes[0][0] * sizes[0][1]]
        points, weights = (
            t.expand(value.shape[0], value.shape[1], *t.shape[2:]) for t in (points, weights)
        )
        if self.way == "order":
            return ms_deform_attn(value, sizes, starts, points, weights, query_order=sizes)
        if self.way == "apply":
            return MSDeformAttnFunction.apply(value, sizes, starts, points, weights, 64)
        if self.way == "tensors":
            sizes, starts = torch.tensor(sizes), torch.tensor(starts)
        return ms_deform_attn(value, sizes, starts, points, weights)


def encoder_arguments(n, h, w):
    maps = torch.randn(n, 16, 2 * h, 2 * w), torch.randn(n, 16, h, w)
    return torch.rand(1, 1, 2, 2, 3, 2), torch.rand(1, 1, 2, 2, 3), *maps


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("way", ["module", "starts", "order", "apply", "tensors"])
def test_level_sizes_may_be_dynamic(way, strict):
    dynamic = image_dynamic()
    if way == "module":
        model = Images()
        arguments = [image_arguments(n, 9, *size) for n, size in ((2, (3, 4)), (3, (5, 2)))]
    else:
        model, dynamic = Encoder(way), (None, None, dynamic[-1])
        arguments = [encoder_arguments(n, *size) for n, size in ((2, (3, 4)), (3, (5, 2)))]
    program = torch.export.export(model, arguments[0], dynamic_shapes=dynamic, strict=strict)
    standard = program.run_decompositions(decompositions())
    assert is_standard(standard)
    for given in arguments:
        expected = model(*given)
        assert torch.equal(program.module()(*given), expected)
        torch.testing.assert_close(standard.module()(*given), expected)


# --- ONNX ------------------------------------------------------------------------------------------


@pytest.fixture
def to_onnx(tmp_path):
    """Export to ONNX and give a function that runs the file on tensors."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")

    def export(model: Any, arguments: Any = (), **options: Any) -> Any:
        path = tmp_path / "model.onnx"
        if isinstance(model, nn.Module):
            model.eval()
        program = torch.onnx.export(model, arguments, dynamo=True, verbose=False, **options)
        assert program.model.graph.num_nodes() > 10
        # TensorRT computes it wrongly: https://github.com/NVIDIA/TensorRT/issues/4813
        assert "GridSample" not in {node.op_type for node in program.model.graph}
        program.save(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]

        def infer(*tensors: torch.Tensor) -> torch.Tensor:
            feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return torch.from_numpy(session.run(None, feed)[0])

        return infer

    return export


@pytest.mark.parametrize(
    ("form", "dtypes"),
    [
        ("list", SINGLE),
        ("function", SINGLE),
        ("list", (torch.float16, torch.float32)),
    ],
    ids=str,
)
def test_numbers_in_onnxruntime(form, dtypes, to_onnx):
    extra = (torch.tensor(SIZES),) if form == "input" else ()
    traced = on_the_edges(dtypes=dtypes)
    infer = to_onnx(Bare(form), (*traced.tensors, *extra), dynamic_shapes=bare_dynamic(form))
    for inputs in (traced, on_the_edges(3, 9, dtypes=dtypes)):
        output = infer(*inputs.tensors, *extra)
        check_output(inputs, output)
        assert not output[:, 0].any()


@pytest.mark.parametrize(("form", "grad"), [("list", True), ("input", False)], ids=str)
def test_the_module_in_onnxruntime(form, grad, to_onnx):
    model = Attention(form, grad)
    arguments = attention_arguments(*TRACED, form)
    infer = to_onnx(model, arguments, dynamic_shapes=attention_dynamic(form))
    for n, lq in (TRACED, *OTHERS):
        others = attention_arguments(n, lq, form)
        torch.testing.assert_close(infer(*others), model(*others).detach())


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_points_of_levels_and_masks_in_onnxruntime(interpolation, to_onnx):
    numbers = [3, 1]
    inputs = flat_points(random_inputs(SIZES), numbers)
    mask = torch.rand(inputs.value.shape[:2], generator=torch.Generator().manual_seed(2)) > 0.3
    rules = {"num_points": numbers, "interpolation": interpolation, "value_mask": mask}

    class Model(nn.Module):
        def forward(self, value, locations, weights, value_mask):
            given = value, SIZES, None, locations, weights
            return ms_deform_attn(*given, **rules | {"value_mask": value_mask})

    output = to_onnx(Model(), (*inputs.tensors, mask))(*inputs.tensors, mask)
    value, *points = inputs.tensors
    exact = reference.forward(value.double(), inputs.levels, *(p.double() for p in points), **rules)
    assert_within_budget(output, reference.forward(value, inputs.levels, *points, **rules), exact)


def test_a_fixed_size_in_onnxruntime_and_then_the_kernels_again(to_onnx, monkeypatch):
    arguments = attention_arguments(*TRACED)
    model = Attention()
    output = to_onnx(model, arguments)(*arguments)
    monkeypatch.setattr("cupy_msda.torch.export.forward", None)
    torch.testing.assert_close(output, model(*arguments).detach())


def test_an_order_in_onnxruntime(to_onnx):
    inputs = random_inputs(SIZES, lq=6)
    arguments = (*inputs.tensors, torch.ones(2, 3))
    check_output(inputs, to_onnx(Ordered([(2, 3)]), arguments)(*arguments))


def test_a_decomposed_program_in_onnxruntime(to_onnx):
    program = torch.export.export(Bare(), bare_arguments(*TRACED), dynamic_shapes=DYNAMIC)
    infer = to_onnx(program.run_decompositions(decompositions()))
    inputs = random_inputs(SIZES, n=3, lq=9)
    check_output(inputs, infer(*inputs.tensors))


def test_dynamic_level_sizes_in_onnxruntime(to_onnx):
    model = Images()
    infer = to_onnx(model, image_arguments(*TRACED, 3, 4), dynamic_shapes=image_dynamic())
    for size in ((3, 4), (5, 2)):
        arguments = image_arguments(3, 9, *size)
        torch.testing.assert_close(infer(*arguments), model(*arguments).detach())


OLD_EXPORTER = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",  # it is deprecated, part by part
    "ignore::torch.jit.TracerWarning",  # it makes sizes constants
)


@OLD_EXPORTER
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("entry", ["list", "function", "module"])
def test_the_old_onnx_exporter_is_refused(entry, grad, mode, tmp_path):
    if entry == "module":
        model, arguments = Attention("list", grad).train(grad), attention_arguments(*TRACED)
    else:
        model, arguments = Bare(entry), bare_arguments(*TRACED)
        arguments = tuple(tensor.requires_grad_(grad) for tensor in arguments)
    with mode(), pytest.raises(RuntimeError, match=r"torch\.onnx\.export needs dynamo=True"):
        torch.onnx.export(model, arguments, tmp_path / "model.onnx", dynamo=False)


@OLD_EXPORTER
@pytest.mark.filterwarnings("ignore:no signature found for <torch.ScriptMethod:UserWarning")
def test_the_old_onnx_exporter_is_refused_for_a_traced_model(tmp_path):
    arguments = bare_arguments(*TRACED)
    traced = torch.jit.trace(Bare(), arguments)
    with pytest.raises(RuntimeError, match=r"torch\.onnx\.export needs dynamo=True"):
        torch.onnx.export(traced, arguments, tmp_path / "model.onnx", dynamo=False)


# --- AOTInductor -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_packages_of_compiled_code(tmp_path):
    """With the operator as one node, and by standard operators, where this package is absent."""
    if shutil.which("g++") is None:
        pytest.skip("AOTInductor needs g++")
    model = Bare()
    arguments = [bare_arguments(*size) for size in (TRACED, *OTHERS)]
    program = torch.export.export(model, arguments[0], dynamic_shapes=DYNAMIC)
    standard = program.run_decompositions(decompositions())
    paths = [str(tmp_path / name) for name in ("whole.pt2", "standard.pt2")]
    for path, one in zip(paths, (program, standard), strict=True):
        torch._inductor.aoti_compile_and_package(one, package_path=path)
    whole = torch._inductor.aoti_load_package(paths[0])
    expected = [model(*one) for one in arguments]
    for one, output in zip(arguments, expected, strict=True):
        assert torch.equal(whole(*one), output)
    ordered, others = Ordered([(2, 3)]), (*arguments[0], torch.ones(2, 3))
    path = str(tmp_path / "ordered.pt2")
    torch._inductor.aoti_compile_and_package(
        torch.export.export(ordered, others), package_path=path
    )
    assert torch.equal(torch._inductor.aoti_load_package(path)(*others), expected[0])
    torch.save(arguments, tmp_path / "in")
    code = """
        import sys
        sys.modules["cupy_msda"] = None
        import torch
        standard = torch._inductor.aoti_load_package(sys.argv[2])
        torch.save([standard(*one) for one in torch.load("in")], "out")
        try:
            torch._inductor.aoti_load_package(sys.argv[1])
        except RuntimeError as error:
            assert "cupy_msda::ms_deform_attn_forward" in str(error)
        else:
            raise AssertionError("the operator was found")
    """
    run(code, *paths, cwd=tmp_path)
    for got, output in zip(torch.load(tmp_path / "out"), expected, strict=True):
        torch.testing.assert_close(got, output)
