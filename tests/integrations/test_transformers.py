# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face transformers compute the same on this package's kernels."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from cupy_msda.budget import assert_within_budget
from cupy_msda.integrations import transformers as integration
from cupy_msda.integrations.patching import is_ours
from tests.integrations import hugging_face

if reason := hugging_face.why_not():
    pytest.skip(reason, allow_module_level=True)
transformers = import_module("transformers")

COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# An older transformers, as of Python 3.10, has not all of them.
FAMILIES = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            find_spec(f"transformers.models.{family}") is None,
            reason=f"transformers {transformers.__version__} has no {family}",
        ),
    )
    for family in integration.FAMILIES
]
# With points (x, y), transformers' own forward of these fails: offsets of all levels share one dimension.
BOXES_ALONE = ("rt_detr_v2", "d_fine", "deimv2")
SIZES = [(4, 5), (2, 3), (1, 2)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On tensors as small as these, more threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model_of(family: str) -> nn.Module:
    """One model of a family for all tests, which leave its parameters as they are."""
    return hugging_face.build(family)


def modeling(family: str) -> ModuleType:
    return import_module(f"transformers.models.{family}.modeling_{family}")


def attention_of(family: str) -> Any:
    """The first of a model's attention modules, of its own."""
    named = (m for m in model_of(family).modules() if is_attention(type(m).__name__))
    return copy.deepcopy(next(named)).train()


def is_attention(name: str) -> bool:
    return name.endswith("MultiscaleDeformableAttention")


def tensors(result: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors of a model's output."""
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, dict | list | tuple):
        for part in result.values() if isinstance(result, dict) else result:
            yield from tensors(part)


def run(
    model: nn.Module, inputs: dict[str, Any], compiled: bool = False
) -> tuple[list[Any], list[Any]]:
    """Outputs and the gradients of parameters, of a loss that weights all outputs; of a copy, as models cache texts."""
    model = copy.deepcopy(model)
    call = torch.compile(model, backend="eager") if compiled else model
    torch.manual_seed(2)  # of dropout
    outputs = [output for output in tensors(call(**inputs)) if output.isfinite().all()]
    assert outputs
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (
            output.double() * torch.randn(output.shape, generator=generator, dtype=torch.float64)
        ).sum()
        for output in outputs
        if output.requires_grad
    )
    loss.backward()
    return outputs, [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def fused_calls(monkeypatch):
    """The calls of the fused operator."""
    calls = []
    call = integration.ms_deform_attn_fused

    def recorded(*given, **named):
        calls.append(given)
        return call(*given, **named)

    monkeypatch.setattr(integration, "ms_deform_attn_fused", recorded)
    return calls


# --- whole models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_computes_the_same(family, training, fused_calls):
    model, inputs = model_of(family), hugging_face.example(family)
    model.train(training)
    keys = list(model.state_dict())
    theirs = run(model, inputs)
    assert fused_calls == []
    with integration.patch(modeling(family)):
        ours = run(model, inputs)
        assert list(model.state_dict()) == keys
    torch.testing.assert_close(ours, theirs)
    assert len(fused_calls) >= 2  # one for each layer


@COMPILES
# Of Dynamo itself, where the model breaks its graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_model_computes_the_same():
    model, inputs = model_of("rt_detr").eval(), hugging_face.example("rt_detr")
    theirs = run(model, inputs)
    with integration.patch(model):
        ours = run(model, inputs, compiled=True)
    torch.testing.assert_close(ours, theirs)


# --- attention modules ----------------------------------------------------------------------------------


def arguments_of(family: str, attention: Any, coordinates: int = 4) -> dict[str, Any]:
    """Random arguments of an attention module, with a mask that has both values."""
    sizes = SIZES[: attention.n_levels]
    positions = sum(h * w for h, w in sizes)
    width = hugging_face.WIDTH
    levels = 1 if family in BOXES_ALONE else attention.n_levels
    given = {
        "hidden_states": torch.randn(2, 40, width, dtype=torch.float64),
        "encoder_hidden_states": torch.randn(2, positions, width, dtype=torch.float64),
        "position_embeddings": torch.randn(2, 40, width, dtype=torch.float64),
        "reference_points": torch.rand(2, 40, levels, coordinates, dtype=torch.float64),
        "attention_mask": torch.rand(2, positions) < 0.7,
        "spatial_shapes": torch.tensor(sizes),
        "spatial_shapes_list": sizes,
        "level_start_index": torch.tensor([0, 20, 26][: len(sizes)]),
    }
    if family in ("d_fine", "deimv2"):  # transformers' own forward fails with a mask of this shape
        del given["attention_mask"]
    known = inspect.signature(attention.forward).parameters
    return {
        name: part.requires_grad_() if torch.is_tensor(part) and part.is_floating_point() else part
        for name, part in given.items()
        if name in known
    }


def attend(attention: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Output, weights and all gradients of a call, of parameters and arguments."""
    leaves = dict(attention.named_parameters()) | {
        name: part for name, part in given.items() if getattr(part, "requires_grad", False)
    }
    for leaf in leaves.values():
        leaf.grad = None
    output, weights = attention(**given)
    (output.double().sin().sum() + weights.double().sin().sum()).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    return {"output": output, "weights": weights, **gradients}


def gradients(results: dict[str, Any]) -> torch.Tensor:
    """All in one vector."""
    parts = [part for name, part in results.items() if name not in ("output", "weights")]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_points_and_boxes_mean_the_same(family):
    attention = attention_of(family)
    for coordinates in (4,) if family in BOXES_ALONE else (2, 4):
        given = arguments_of(family, attention, coordinates)
        theirs = attend(attention, given)
        with integration.patch(attention):
            ours = attend(attention, given)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", BOXES_ALONE)
def test_points_in_a_model_of_boxes_are_refused(family):
    attention = attention_of(family)
    integration.patch(attention)
    given = arguments_of(family, attention, coordinates=2)
    message = r"reference_points must be boxes .* got shape \(2, 40, 1, 2\)"
    with pytest.raises(ValueError, match=message):
        attention(**given)


@pytest.mark.parametrize("compared", [True, False], ids=["module", "function"])
@pytest.mark.parametrize("family", BOXES_ALONE)
def test_discrete_sampling(family, compared, monkeypatch):
    monkeypatch.setattr(integration, "_is_compared", lambda: compared)
    attention = attention_of(family)
    name = "method" if family == "rt_detr_v2" else "decoder_method"
    setattr(attention, name, "discrete")
    given = arguments_of(family, attention)
    theirs = attend(attention, given)
    assert theirs["sampling_offsets.weight"] is None
    with integration.patch(modeling(family)), integration.patch(attention, strict=False):
        torch.testing.assert_close(attend(attention, given), theirs)


@pytest.mark.parametrize("family", BOXES_ALONE)
def test_the_scales_of_a_model_are_honoured(family):
    attention = attention_of(family)
    attention.offset_scale = 0.7
    (scale,) = attention.buffers()
    scale.copy_(torch.rand_like(scale))
    given = arguments_of(family, attention)
    theirs = attend(attention, given)
    with integration.patch(attention):
        torch.testing.assert_close(attend(attention, given), theirs)


@pytest.mark.parametrize("family", ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_autocast(family):
    attention = attention_of(family)
    given = arguments_of(family, attention)
    exact = attend(attention, given)
    attention.float()
    narrow = {
        name: part.detach().float().requires_grad_() if name in exact else part
        for name, part in given.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        theirs = attend(attention, narrow)
        with integration.patch(attention):
            ours = attend(attention, narrow)
    for name in ("output", "weights"):
        assert_within_budget(ours[name], theirs[name], exact[name])
    # All gradients at once: the error of a single bias is a few roundings to bfloat16, large or small by chance.
    assert_within_budget(*map(gradients, (ours, theirs, exact)))


@COMPILES
@pytest.mark.parametrize("by", ["class", "object"])
@pytest.mark.parametrize("family", ["deformable_detr", "d_fine"])
def test_compile(family, by):
    attention = attention_of(family)
    given = arguments_of(family, attention)
    theirs = attend(attention, given)
    with integration.patch(attention if by == "object" else modeling(family)):
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        ours = attend(compiled, given)
    expected = {name.removeprefix("_orig_mod."): part for name, part in ours.items()}
    torch.testing.assert_close(expected, theirs)


# --- what is replaced -----------------------------------------------------------------------------------


def names(patch: Any) -> set[str]:
    return {str(one).rpartition("transformers.models.")[2] for one in patch.replaced}


def test_a_search_finds_no_other_family():
    """A file of a newer transformers that holds such attention names its family here."""
    root = Path(transformers.__file__).parent
    marks = re.compile(r"multi_?scale_?deformable_?attention|sampling_offsets", re.IGNORECASE)
    found = {
        file.parent.name
        for file in root.rglob("*.py")
        if file.name.startswith("modeling_") and marks.search(file.read_text(encoding="utf-8"))
    }
    known = {family for family in integration.FAMILIES if (root / "models" / family).is_dir()}
    assert found == known


def test_the_installed_version_was_compared():
    """A newer one: run these tests with `_NEWEST_COMPARED` raised, and read what changed in its forwards."""
    assert integration._is_compared()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_module_is_replaced_by_patching_all(family):
    kinds = [kind for name, kind in vars(modeling(family)).items() if is_attention(name)]
    assert kinds
    with integration.patch() as everything:
        assert all(is_ours(kind.forward) for kind in kinds)
        with integration.patch() as again:
            assert again.replaced == ()
        assert all(is_ours(kind.forward) for kind in kinds)
    assert not any(is_ours(kind.forward) for kind in kinds)
    assert any(f"{family}.modeling_{family}." in name for name in names(everything))


@pytest.mark.parametrize("target", ["transformers.models.rt_detr", "modeling"])
def test_a_module(target):
    module = modeling("rt_detr") if target == "modeling" else import_module(target)
    with integration.patch(module) as patch:
        assert names(patch) == {
            "rt_detr.modeling_rt_detr.MultiScaleDeformableAttention.forward",
            "rt_detr.modeling_rt_detr.RTDetrMultiscaleDeformableAttention.forward",
        }
        assert not is_ours(modeling("d_fine").DFineMultiscaleDeformableAttention.forward)


def test_one_model_alone(fused_calls):
    model, other = hugging_face.build("rt_detr"), hugging_face.build("rt_detr")
    inputs = hugging_face.example("rt_detr")
    theirs = run(other, inputs)
    with integration.patch(model) as patch:
        assert "RTDetrMultiscaleDeformableAttention.forward of an object (2x)" in repr(patch)
        torch.testing.assert_close(run(other, inputs), theirs)
        assert fused_calls == []
        torch.testing.assert_close(run(model, inputs), theirs)
        assert len(fused_calls) == 2
        assert integration.patch(model).replaced == ()
    run(model, inputs)
    assert len(fused_calls) == 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_patched_model_is_patched(copied, fused_calls):
    model = attention_of("deformable_detr")
    given = arguments_of("deformable_detr", model)
    with integration.patch(model):
        twin = copied(model)
    with torch.no_grad():
        twin.output_proj.bias.add_(1)
    (ours, _), (theirs, _) = twin(**given), model(**given)
    torch.testing.assert_close(ours, theirs + 1)  # by its own parameters
    assert len(fused_calls) == 1


def test_attentions_are_recorded():
    model, inputs = model_of("deformable_detr"), hugging_face.example("deformable_detr")
    theirs = model.eval()(**inputs, output_attentions=True)
    with integration.patch(model):
        ours = model(**inputs, output_attentions=True)
    for name in ("cross_attentions", "encoder_attentions"):
        assert theirs[name]
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.fixture
def uncompared(monkeypatch):
    """As if the installed transformers were newer than what was compared."""
    monkeypatch.setattr(integration, "_is_compared", lambda: False)


@pytest.mark.parametrize("family", ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"])
def test_of_a_newer_version_the_layers_and_functions_alone_are_replaced(
    family, uncompared, fused_calls, monkeypatch
):
    calls = []
    call = integration.ms_deform_attn
    monkeypatch.setattr(
        integration,
        "ms_deform_attn",
        lambda *given, **named: calls.append(0) or call(*given, **named),
    )
    inputs = hugging_face.example(family)
    theirs = run(hugging_face.build(family), inputs)
    with integration.patch(modeling(family)) as patch:
        assert not any("Multiscale" in name for name in names(patch))
        torch.testing.assert_close(run(hugging_face.build(family), inputs), theirs)
    assert fused_calls == []
    assert calls


def test_of_a_newer_version_a_live_model_that_holds_its_function_is_patched(uncompared):
    model, inputs = hugging_face.build("d_fine"), hugging_face.example("d_fine")
    theirs = run(model, inputs)
    with integration.patch(model) as patch:
        assert {one.name for one in patch.replaced} == {"ms_deformable_attn_core"}
        torch.testing.assert_close(run(model, inputs), theirs)
        assert is_ours(
            pickle.loads(pickle.dumps(model))
            .model.decoder.layers[0]
            .encoder_attn.ms_deformable_attn_core
        )


def test_a_forward_with_another_argument_is_left_to_its_layer(monkeypatch):
    kind = modeling("rt_detr").RTDetrMultiscaleDeformableAttention
    forward = kind.forward

    def newer(self, hidden_states, novelty=None, **given):
        return forward(self, hidden_states, **given)

    newer.__qualname__ = forward.__qualname__
    newer.__module__ = forward.__module__
    monkeypatch.setattr(kind, "forward", newer)
    with integration.patch(modeling("rt_detr")) as patch:
        assert names(patch) == {"rt_detr.modeling_rt_detr.MultiScaleDeformableAttention.forward"}


def test_a_forward_that_another_package_has_replaced_stays():
    attention = attention_of("rt_detr")
    attention.forward = hook = partial(type(attention).forward, attention)
    patch = integration.patch(attention)
    assert attention.forward is hook
    assert [str(one) for one in patch.replaced] == [
        "transformers.models.rt_detr.modeling_rt_detr.MultiScaleDeformableAttention.forward of an object"
    ]


def test_a_subclass_that_computes_otherwise_keeps_its_forward():
    class Mine(modeling("rt_detr").RTDetrMultiscaleDeformableAttention):
        def forward(self, hidden_states, **given):
            output, weights = super().forward(hidden_states, **given)
            return 2 * output, weights

    attention = attention_of("rt_detr")
    given = arguments_of("rt_detr", attention)
    attention.__class__ = Mine
    theirs = attend(attention, given)
    with integration.patch(attention) as patch:
        assert len(patch.replaced) == 1
        torch.testing.assert_close(attend(attention, given), theirs)


def test_the_layer_for_kernels_fits():
    """By the rules of kernels 0.17.2; 5.24 asks for 0.18.2 or later, which no registry had when this was written."""
    repository = integration.LayerRepository()
    ours, theirs = repository.load(), modeling("rt_detr").MultiScaleDeformableAttention
    assert repository.layer_name == theirs.__name__
    assert ours.__init__ is nn.Module.__init__
    more = {name for name, _ in inspect.getmembers(ours)} - set(dir(nn.Module))
    assert more == {"can_torch_compile", "has_backward"}
    kinds = [
        [parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()]
        for layer in (ours, theirs)
    ]
    assert kinds[0] == kinds[1]
    # It binds the forward to layers that exist.
    attention = attention_of("rt_detr")
    given = arguments_of("rt_detr", attention)
    expected = attend(attention, given)
    attention.attn.forward = ours.forward.__get__(attention.attn)
    torch.testing.assert_close(attend(attention, given), expected)


def test_what_has_no_such_attention():
    for target in (nn.Linear(2, 2), import_module("transformers.models.bert.modeling_bert")):
        with pytest.raises(LookupError, match="must hold multi-scale deformable attention"):
            integration.patch(target)
        assert integration.patch(target, strict=False).replaced == ()


def test_importing_the_integration_does_not_import_transformers():
    code = f"import sys, {integration.__name__}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_transformers_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(integration, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="transformers must be installed"):
        integration.patch()
    assert integration.patch(strict=False).replaced == ()


def test_what_is_no_target():
    message = "target must be None, a module or a torch module, got str"
    with pytest.raises(TypeError, match=message):
        integration.patch("transformers")
