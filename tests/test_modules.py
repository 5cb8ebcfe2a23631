# SPDX-License-Identifier: Apache-2.0
"""`MSDeformAttn`: the parameters of Deformable-DETR's module, what it computes and what it refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from cupy_msda import MSDeformAttn, budget, ms_deform_attn_core_pytorch
from cupy_msda import modules as module_file
from cupy_msda.budget import assert_within_budget
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused

SIZES = [(4, 5), (2, 3)]
C, M, L, P = 24, 3, 2, 4  # D = 8
STATE = {
    "sampling_offsets.weight": (M * L * P * 2, C),
    "sampling_offsets.bias": (M * L * P * 2,),
    "attention_weights.weight": (M * L * P, C),
    "attention_weights.bias": (M * L * P,),
    "value_proj.weight": (C, C),
    "value_proj.bias": (C,),
    "output_proj.weight": (C, C),
    "output_proj.bias": (C,),
}


PROJECTIONS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


class Inputs(NamedTuple):
    """The first three arguments of the module."""

    query: torch.Tensor
    reference_points: torch.Tensor
    input_flatten: torch.Tensor


def example(coordinates=2, levels=L, dtype=torch.float32):
    shapes = ((2, 5, C), (2, 5, levels, coordinates), (2, 26, C))
    return Inputs(*(torch.rand(shape, dtype=dtype) for shape in shapes))


def trained(dtype=torch.float32, *, by_pixel=False):
    """A module whose parameters are not their initial values."""
    module = MSDeformAttn(C, L, M, P, use_4D_normalizer=by_pixel).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def by_hand(module, inputs, mask=None):
    """The module from its parameters alone, point by point where it is cheap, by grid_sample elsewhere."""
    state = module.state_dict()

    def project(name, x):
        if f"{name}.weight" not in state:  # a quantised layer packs its parameters
            return getattr(module, name)(x)
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    query, points, flat = inputs
    value = project("value_proj", flat)
    if mask is not None:
        value = torch.where(mask[:, :, None], torch.zeros_like(value), value)
    offsets = project("sampling_offsets", query).reshape(2, 5, M, L, P, 2)
    logits = project("attention_weights", query).reshape(2, 5, M, L * P)
    weights = (logits.exp() / logits.exp().sum(-1, keepdim=True)).reshape(2, 5, M, L, P)
    locations = torch.empty_like(offsets)
    for level, (h, w) in enumerate(SIZES):
        one = points[:, :, level if points.shape[2] > 1 else 0, None, None]  # N, Lq, 1, 1, 2 or 4
        pixel = 1 / torch.tensor([w, h], dtype=query.dtype)
        step = one[..., 2:] / P / 2 if points.shape[-1] == 4 else pixel
        locations[:, :, :, level] = one[..., :2] + offsets[:, :, :, level] * step
    value = value.reshape(2, 26, M, C // M)
    return project("output_proj", ms_deform_attn_core_pytorch(value, SIZES, locations, weights))


# --- parameters ------------------------------------------------------------------------------------


def test_state_has_the_names_and_shapes_of_deformable_detr():
    state = MSDeformAttn(C, L, M, P).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == STATE


def test_the_default_sizes_are_those_of_deformable_detr():
    module = MSDeformAttn()
    assert (module.d_model, module.n_levels, module.n_heads, module.n_points) == (256, 4, 8, 4)
    assert module.sampling_offsets.out_features == 8 * 4 * 4 * 2


def test_initial_values():
    module = MSDeformAttn(256, 3, 8, 4)
    assert not module.sampling_offsets.weight.any()
    bias = module.sampling_offsets.bias.detach().reshape(8, 3, 4, 2)
    # Eight heads look along the sides and diagonals of a square, counterclockwise from +x.
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            for level in range(3):
                torch.testing.assert_close(bias[head, level, point], expected, rtol=0, atol=1e-5)
    assert not module.attention_weights.weight.any()
    assert not module.attention_weights.bias.any()
    bound = math.sqrt(6 / (256 + 256))
    for projection in (module.value_proj, module.output_proj):
        assert not projection.bias.any()
        assert 0.99 * bound < projection.weight.abs().max() <= bound


def test_initial_directions_of_three_heads():
    bias = MSDeformAttn(C, L, M, P).sampling_offsets.bias.detach().reshape(M, L, P, 2)
    tangent = 1 / math.sqrt(3)
    expected = torch.tensor([[1, 0], [-tangent, 1], [-tangent, -1]])
    torch.testing.assert_close(bias[:, 1, 0], expected)
    torch.testing.assert_close(bias[:, 0, 3], 4 * expected)


def test_initial_offsets_do_not_take_part_in_autograd_history():
    bias = MSDeformAttn(C, L, M, P).sampling_offsets.bias
    assert bias.is_leaf
    assert bias.requires_grad


# --- as models of Deformable-DETR's kind use it --------------------------------------------------------


class Layer(torch.nn.Module):
    """A layer of an encoder."""

    def __init__(self, attention):
        super().__init__()
        self.self_attn = attention(C, L, M, P)
        self.linear = torch.nn.Linear(C, C)
        self.norm = torch.nn.LayerNorm(C)

    def forward(self, source, *geometry):
        source = self.norm(source + self.self_attn(source, geometry[0], source, *geometry[1:]))
        return source + self.linear(source)


class Encoder(torch.nn.Module):
    """Their model in small: every matrix is initialised, then what the attention wants to have otherwise."""

    def __init__(self, attention=MSDeformAttn):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(attention) for _ in range(2))
        self.level_embed = torch.nn.Parameter(torch.empty(L, C))
        self._reset_parameters()

    def _reset_parameters(self):
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()
        torch.nn.init.normal_(self.level_embed)

    def forward(self, maps, masks):
        sizes = torch.tensor([tuple(x.shape[-2:]) for x in maps])
        starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
        source = torch.cat(
            [x.flatten(2).mT + e for x, e in zip(maps, self.level_embed, strict=True)], 1
        )
        points = torch.rand(source.shape[0], source.shape[1], 1, 2).expand(-1, -1, L, -1)
        mask = torch.cat([m.flatten(1) for m in masks], 1)
        for layer in self.layers:
            source = layer(source, points, sizes, starts, mask)
        return source


def test_a_model_initialises_the_module_by_the_old_name():
    encoder = Encoder()
    for layer in encoder.layers:
        assert not layer.self_attn.sampling_offsets.weight.any()
        assert layer.self_attn.sampling_offsets.bias.any()
        assert not layer.self_attn.attention_weights.weight.any()
        assert layer.linear.weight.any()
    maps = [torch.rand(2, C, h, w) for h, w in SIZES]
    output = encoder(maps, [torch.zeros(2, h, w, dtype=torch.bool) for h, w in SIZES])
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_both_names_initialise_alike():
    modules = trained(), trained()
    for module, name in zip(modules, ("_reset_parameters", "reset_parameters"), strict=True):
        torch.manual_seed(1)
        getattr(module, name)()
        assert not module.attention_weights.weight.any()
    for one, other in zip(*(module.parameters() for module in modules), strict=True):
        assert torch.equal(one, other)


def test_a_subclass_that_initialises_otherwise_is_asked():
    class Zero(MSDeformAttn):
        def _reset_parameters(self):
            super()._reset_parameters()
            torch.nn.init.zeros_(self.sampling_offsets.bias)

    module = Zero(C, L, M, P)
    assert not module.sampling_offsets.bias.any()
    with torch.no_grad():
        module.sampling_offsets.bias.fill_(1)
    module.reset_parameters()
    assert not module.sampling_offsets.bias.any()


def test_checkpoints_load_both_ways():
    class Theirs(torch.nn.Module):
        """The parameters of their module, in their order."""

        def __init__(self, *_):
            super().__init__()
            self.sampling_offsets = torch.nn.Linear(C, M * L * P * 2)
            self.attention_weights = torch.nn.Linear(C, M * L * P)
            self.value_proj = torch.nn.Linear(C, C)
            self.output_proj = torch.nn.Linear(C, C)

    ours, theirs = Encoder(), Encoder(Theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(Encoder().state_dict())


def test_the_attributes_of_the_old_module():
    module = MSDeformAttn(C, L, M, P)
    assert (module.im2col_step, module.ratio, module.use_4D_normalizer) == (64, 1.0, False)
    inputs = example()
    expected = module(*inputs, SIZES, None)
    module.im2col_step = 1
    assert torch.equal(module(*inputs, SIZES, None), expected)


@pytest.mark.parametrize("ratio", [0.5, 1, 2.0, 1 / 3])
def test_a_value_of_other_width(ratio):
    width = int(C * ratio) // M * M
    module = MSDeformAttn(C, L, M, P, (width + 0.5) / C).double()
    assert tuple(module.value_proj.weight.shape) == (width, C)
    assert tuple(module.output_proj.weight.shape) == (C, width)
    inputs = example(dtype=torch.float64)
    seen = module.value_proj(inputs.input_flatten).unflatten(-1, (M, -1))
    offsets = module.sampling_offsets(inputs.query).unflatten(-1, (M, L, P, 2))
    weights = module.attention_weights(inputs.query).unflatten(-1, (M, -1)).softmax(-1)
    pixels = torch.tensor(SIZES).flip(-1)[:, None]
    points = inputs.reference_points[:, :, None, :, None] + offsets / pixels
    sampled = ms_deform_attn_core_pytorch(seen, SIZES, points, weights.unflatten(-1, (L, P)))
    torch.testing.assert_close(module(*inputs, SIZES, None), module.output_proj(sampled))
    assert copy.deepcopy(module).ratio == module.ratio


def test_reference_points_of_one_image_stand_for_all():
    module = trained(torch.float64)
    query, points, flat = example(dtype=torch.float64)
    output = module(query, points[:1], flat, SIZES, None)
    expected = module(query, points[:1].expand(2, -1, -1, -1), flat, SIZES, None)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("levels", [1, L])
def test_offsets_from_boxes_by_pixel(levels):
    plain = trained(torch.float64)
    module = MSDeformAttn(C, L, M, P, use_4D_normalizer=True).double()
    module.load_state_dict(plain.state_dict())
    query, boxes, flat = example(4, levels, torch.float64)
    # A box of 2 x 2 levels makes its unit one pixel.
    boxes = torch.cat([boxes[..., :2], torch.full_like(boxes[..., 2:], 2)], -1)
    output = module(query, boxes, flat, SIZES, None)
    torch.testing.assert_close(output, plain(query, boxes[..., :2], flat, SIZES, None))
    assert not torch.allclose(output, plain(query, boxes, flat, SIZES, None))
    half = torch.cat([boxes[..., :2], torch.ones_like(boxes[..., 2:])], -1)
    with torch.no_grad():
        plain.sampling_offsets.weight.mul_(0.5)
        plain.sampling_offsets.bias.mul_(0.5)
    halved = module(query, half, flat, SIZES, None)
    torch.testing.assert_close(halved, plain(query, boxes[..., :2], flat, SIZES, None))
    assert "use_4D_normalizer=True" in repr(module)


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("levels", [1, L])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_and_gradients_are_those_of_the_composition(coordinates, levels, masked):
    module = trained(torch.float64)
    inputs = example(coordinates, levels, torch.float64)
    mask = torch.rand(2, 26) < 0.4 if masked else None
    module.zero_grad()
    leaves = Inputs(*(tensor.requires_grad_() for tensor in inputs))
    output = module(*leaves, SIZES, None, mask)
    expected = by_hand(module, leaves, mask)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad_output = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, grad_output)
    wanted = torch.autograd.grad(expected, leaves, grad_output)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_padding_has_no_influence():
    module = trained()
    query, points, flat = example()
    mask = torch.zeros(2, 26, dtype=torch.bool)
    mask[:, 20:23] = True
    poisoned = flat.masked_fill(mask[..., None], 1e30)
    output = module(query, points, poisoned, SIZES, None, mask)
    assert torch.equal(output, module(query, points, flat, SIZES, None, mask))


@pytest.mark.parametrize(
    "form",
    [
        list,
        torch.tensor,
        *(partial(torch.tensor, dtype=dtype) for dtype in (torch.int32, torch.uint8, torch.uint16)),
    ],
)
def test_level_sizes_in_any_form(form):
    module = trained()
    inputs = example()
    starts = torch.tensor([0, 20])
    expected = module(*inputs, SIZES, None)
    torch.testing.assert_close(module(*inputs, form(SIZES), starts), expected)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_locations_and_weights_are_float32_or_wider(coordinates):
    seen = []

    def look(module, inputs):
        output, *points = module(*inputs, torch.tensor(SIZES), None, return_locations=True)
        seen.append((output.dtype, *(tensor.dtype for tensor in points)))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        look(trained(), example(coordinates))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        look(trained(dtype), example(coordinates, dtype=dtype))
    # Reference points of another precision than the module.
    query, points, flat = example(coordinates)
    look(trained(), (query, points.double(), flat))
    assert seen == [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
    ]


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("by_pixel", [False, True])
def test_the_locations_that_it_returns_are_those_that_it_reads(coordinates, by_pixel):
    module = trained(by_pixel=by_pixel)
    query, points, flat = example(coordinates)
    mask = torch.rand(flat.shape[:2]) > 0.7
    given = query, points, flat, SIZES, None, mask
    output, locations, weights = module(*given, return_locations=True)
    assert locations.shape == (*query.shape[:2], M, L, P, 2)
    value = module.value_proj(flat).masked_fill(mask[..., None], 0).unflatten(-1, (M, -1))
    expected = module.output_proj(ms_deform_attn(value, SIZES, None, locations, weights))
    wide = (tensor.double() for tensor in (query, points, flat))
    exact = copy.deepcopy(module).double()(*wide, SIZES, None, mask)
    for one in (output, module(*given)):
        assert_within_budget(*(tensor.detach() for tensor in (one, expected, exact)))


def test_autocast_is_as_close_as_its_layers_allow():
    """Projections and value in 16 bits, all that is between them in float32."""
    module = trained()
    inputs = example()
    exact = copy.deepcopy(module).double()(*(tensor.double() for tensor in inputs), SIZES, None)
    pixels = torch.tensor(SIZES).flip(-1)[:, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(*inputs, SIZES, None)
        value = module.value_proj(inputs.input_flatten).unflatten(-1, (M, -1))
        offsets = module.sampling_offsets(inputs.query).float().unflatten(-1, (M, L, P, 2))
        logits = module.attention_weights(inputs.query).float().unflatten(-1, (M, L * P))
        points = inputs.reference_points[:, :, None, :, None] + offsets / pixels
        weights = logits.softmax(-1).unflatten(-1, (L, P))
        sampled = ms_deform_attn_core_pytorch(value, SIZES, points, weights)
        expected = module.output_proj(sampled.contiguous())
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    assert_within_budget(*(tensor.detach() for tensor in (output, expected, exact)))
    # Both round in the layers alike. What lies between these rounds once, here and there to the other neighbour.
    assert budget.relative_error(output, expected.double()) < torch.finfo(torch.bfloat16).eps / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_all_that_projections_give_is_half(dtype, monkeypatch):
    seen = []

    def spy(value, shapes, starts, references, offsets, logits, **rules):
        seen.extend((value, references, offsets, logits))
        for tensor in (value, offsets, logits):
            tensor.retain_grad()
        return ms_deform_attn_fused(value, shapes, starts, references, offsets, logits, **rules)

    monkeypatch.setattr(module_file, "ms_deform_attn_fused", spy)
    module, inputs = trained(), example()
    with torch.autocast("cpu", dtype=dtype):
        output = module(*inputs, SIZES, None)
    output.float().square().sum().backward()
    assert [tensor.dtype for tensor in seen] == [dtype, torch.float32, dtype, dtype]
    assert all(seen[i].grad.dtype == dtype for i in (0, 2, 3))
    assert all(seen[i].grad.abs().sum() > 0 for i in (0, 2, 3))
    assert output.dtype == dtype


def test_a_training_step_with_a_scaler():
    module, inputs = trained(), example()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(factor):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = module(*inputs, SIZES, None).float().square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(1e9)  # overflows half precision: the scaler must notice
    assert scaler.get_scale() == 2.0**9
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    step(1.0)
    assert scaler.get_scale() == 2.0**9
    for name, tensor in module.state_dict().items():
        assert torch.isfinite(tensor).all()
        assert not torch.equal(tensor, before[name]), name


def test_a_training_step_moves_every_parameter():
    module = trained()
    before = copy.deepcopy(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(*example(), SIZES, None).square().sum().backward()
    optimizer.step()
    for name, tensor in module.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


@pytest.mark.filterwarnings("ignore:You are using `torch.load`")  # torch 2.4's pickled tensors do
def test_copies_compute_the_same():
    module, inputs = trained(), example()
    expected = module(*inputs, SIZES, None)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = MSDeformAttn(C, L, M, P)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    whole = io.BytesIO()
    torch.save(module, whole)
    whole.seek(0)
    unpickled = pickle.loads(pickle.dumps(module))
    for other in (
        copy.deepcopy(module),
        torch.optim.swa_utils.AveragedModel(module).module,
        loaded,
        torch.load(whole, weights_only=False),
        unpickled,
    ):
        assert torch.equal(other(*inputs, SIZES, None), expected)
        assert other.extra_repr() == module.extra_repr()


class LowRank(nn.Module):
    """A frozen projection with a trained addition, as PEFT's LoRA puts it in the place of a Linear."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    "wrap", [LowRank, weight_norm, lambda x: prune.l1_unstructured(x, "weight", 0)]
)
def test_projections_may_be_wrapped(wrap):
    """Nothing but their forward is used: https://github.com/pytorch/pytorch/issues/32590 tells of attention that
    reads `weight`."""
    module, inputs = trained(), example()
    expected = module(*inputs, SIZES, None)
    for name in PROJECTIONS:
        setattr(module, name, wrap(getattr(module, name)))
    output = module(*inputs, SIZES, None)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_errors_of_wrapped_projections_are_their_own():
    module = trained()
    module.sampling_offsets = LowRank(module.sampling_offsets)
    query, points, flat = example()
    with pytest.raises(RuntimeError, match="same dtype"):
        module(query.double(), points, flat, SIZES, None)


@pytest.mark.filterwarnings("ignore:.*deprecated")  # as all that quantises in torch itself
def test_projections_may_be_quantised():
    module, inputs = trained().eval(), example()
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(child) is nn.Linear for child in quantised.modules())
    # The last projection rounds its input anew, so that any difference before it may become a step.
    sampled = []
    quantised.output_proj.register_forward_pre_hook(lambda _, given: sampled.append(given[0]))
    quantised(*inputs, SIZES, None)
    by_hand(quantised, inputs, None)
    torch.testing.assert_close(*sampled)


def test_gradients_of_each_sample():
    module, inputs = trained(torch.float64), example(dtype=torch.float64)
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def loss(parameters, *sample):
        arguments = (*(tensor[None] for tensor in sample), SIZES, None)
        return torch.func.functional_call(module, parameters, arguments).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, *inputs)
    for index in range(2):
        sample = (tensor[index : index + 1] for tensor in inputs)
        module.zero_grad()
        module(*sample, SIZES, None).square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(got[name][index], parameter.grad)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_graphs_of_fx_compute_the_same(form, coordinates):
    module, inputs = trained(), example(coordinates)
    traced = torch.fx.symbolic_trace(module)
    traced.graph.lint()
    for mask in (None, torch.rand(2, 26) > 0.5):
        concrete = torch.fx.symbolic_trace(
            module, {} if mask is not None else {"input_padding_mask": None}
        )
        arguments = (*inputs, form(SIZES), None, *(() if mask is None else (mask,)))
        assert torch.equal(concrete(*arguments), module(*inputs, form(SIZES), None, mask))
    assert "ms_deform_attn_fused" in [node.name for node in traced.graph.nodes]
    with pytest.raises(ValueError, match="query must have shape"):
        traced(
            inputs.query[0], *inputs[1:], form(SIZES), None, torch.zeros(2, 26, dtype=torch.bool)
        )


def test_shapes_on_meta_and_with_fake_tensors():
    with torch.device("meta"):
        module = MSDeformAttn(C, L, M, P)
        output = module(*example(), SIZES, None)
    assert output.is_meta
    assert output.shape == (2, 5, C)
    with pytest.raises(ValueError, match="inside the S = 26 positions"):
        module(*(tensor.to("meta") for tensor in example()), [(4, 5), (2, 4)], None)
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(tensor) for tensor in example()]
        output = MSDeformAttn(C, L, M, P)(*inputs, SIZES, None)
        assert isinstance(output, FakeTensor)
        output.sum().backward()
    assert output.shape == (2, 5, C)


def test_head_dim_need_not_be_a_power_of_two():
    module = MSDeformAttn(30, 1, 2, 1)
    output = module(
        torch.rand(1, 2, 30), torch.rand(1, 2, 1, 2), torch.rand(1, 6, 30), [(2, 3)], None
    )
    assert output.shape == (1, 2, 30)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_compiles_whole(form):
    module, inputs = trained(), example()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = compiled(*inputs, form(SIZES), None)
    torch.testing.assert_close(output, module(*inputs, SIZES, None))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_it_prints_its_sizes():
    assert "d_model=24, n_levels=2, n_heads=3, n_points=4" in repr(MSDeformAttn(C, L, M, P))


# --- what is refused -------------------------------------------------------------------------------


def test_d_model_must_be_a_multiple_of_n_heads():
    with pytest.raises(
        ValueError, match="d_model must be a multiple of n_heads, got d_model 10 with n_heads 3"
    ):
        MSDeformAttn(10, n_heads=3)


@pytest.mark.parametrize("name", ["d_model", "n_levels", "n_heads", "n_points"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        MSDeformAttn(**{name: 0})


@pytest.mark.parametrize("ratio", [0, -1.0, 0.3, 1.1, float("nan"), float("inf"), 1e30])
def test_ratio_must_keep_heads_whole(ratio):
    with pytest.raises(
        ValueError,
        match=r"ratio must be such that int\(d_model \* ratio\) is a multiple of n_heads",
    ):
        MSDeformAttn(C, L, M, P, ratio)


@pytest.mark.parametrize("ratio", [True, "1", None, 1j, torch.ones(())])
def test_ratio_must_be_a_number(ratio):
    with pytest.raises(TypeError, match="ratio must be a number"):
        MSDeformAttn(C, L, M, P, ratio)


BAD = {
    "query": (torch.rand(2, 5, C + 1), ValueError, r"query must have shape \(N, Lq, C = 24\)"),
    "reference_points": (torch.rand(2, 5, L, 3), ValueError, r"reference_points must have shape"),
    "reference_points ": (torch.rand(2, 5, L + 1, 2), ValueError, r"reference_points must have shape"),
    "reference_points  ": (torch.rand(2, 4, L, 2), ValueError, r"reference_points must have shape"),
    "reference_points   ": (torch.rand(2, 5, 2), ValueError, r"reference_points must have shape"),
    "input_flatten": (torch.rand(1, 26, C), ValueError, r"input_flatten must have shape \(N, S, C = 24\)"),
    "input_spatial_shapes": ([(4, 5)], ValueError, "spatial_shapes must have one entry for each of the L = 2"),
    "input_spatial_shapes ": (torch.tensor([[4, 5]]), ValueError, r"spatial_shapes must have shape \(L, 2\)"),
    "input_spatial_shapes  ": ([(4, 5, 6), (2, 3, 1)], ValueError, r"spatial_shapes must hold \(H, W\) pairs"),
    "input_spatial_shapes   ": (torch.rand(L, 2), TypeError, "spatial_shapes must have an integer dtype"),
    "input_spatial_shapes    ": (None, TypeError, "spatial_shapes must be a sequence"),
    "input_spatial_shapes     ": ([(4, 5), (2, 4)], ValueError, "spatial_shapes and level_start_index must keep"),
    "input_level_start_index": ([0], ValueError, "level_start_index must have one entry"),
    "input_padding_mask": (torch.zeros(2, 26), TypeError, "input_padding_mask must have dtype bool, True for pad"),
    "query ": (torch.rand(2, 5, C, dtype=torch.float64), TypeError, "query must have the dtype of the module's param"),
    "query  ": (torch.rand(2, 5, C).numpy(), TypeError, "query must be a torch tensor, got ndarray"),
    "query   ": (torch.rand(2, 5, C).to_sparse(), TypeError, "query must be a dense tensor"),
    "input_flatten ": (torch.rand(2, 26, C).half(), TypeError, "input_flatten must have the dtype of the module's"),
    "input_flatten  ": (None, TypeError, "input_flatten must be a torch tensor, got NoneType"),
    "input_flatten   ": (torch.rand(2, 26, C, device="meta"), ValueError, "input_flatten must be on the device"),
    "reference_points     ": (torch.rand(2, 5, L, 2).cfloat(), TypeError, "reference_points must have a floating"),
    "reference_points      ": (torch.rand(3, 5, L, 2), ValueError, "reference_points must have shape"),
    "input_spatial_shapes      ": ([(4, 5), (2, 2)], ValueError, "spatial_shapes must have levels that fill the S"),
    "input_padding_mask  ": ([False] * 26, TypeError, "input_padding_mask must be a torch tensor, got list"),
    "input_padding_mask ": (torch.zeros(2, 25, dtype=torch.bool), ValueError, "input_padding_mask must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_refused(case):
    given, error, message = BAD[case]
    arguments = {
        **example()._asdict(),
        "input_spatial_shapes": SIZES,
        "input_level_start_index": None,
        case.strip(): given,
    }
    with pytest.raises(error, match=message):
        MSDeformAttn(C, L, M, P)(**arguments)
