# SPDX-License-Identifier: Apache-2.0
"""Level tables of one library beside values of another: the same outcome in every combination."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import cupy_msda  # noqa: E402
from cupy_msda import MSDeformAttn  # noqa: E402
from tests.calls import BACKWARD, FORWARD  # noqa: E402
from tests.contract.inputs import (  # noqa: E402
    SHAPE,
    SIZES,
    STARTS,
    D,
    L,
    M,
    NumPy,
    P,
    S,
    Torch,
    good_inputs,
    pattern,
)
from tests.contract.test_devices import OnDevice  # noqa: E402


class Strict:
    """The inputs as arrays of array-api-strict, which cannot be iterated."""

    def __init__(self):
        reason = "array-api-strict is not installed"
        self.xp = pytest.importorskip("array_api_strict", reason=reason)

    def array(self, shape, dtype="float32"):
        return self.xp.ones(shape, dtype=getattr(self.xp, dtype))


class Exporting:
    """An array of a library of its own, with DLPack and nothing else."""

    def __init__(self, array):
        self._array = np.asarray(array)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    def __dlpack__(self, **keywords):
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class FakeCupy(OnDevice):
    """An array of CuPy: whatever reads it number by number is counted, too."""

    __module__ = "cupy"

    def __iter__(self):
        self.reads += 1
        return iter(self.array)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        self.reads += 1
        return self.array[index]

    def __index__(self):
        self.reads += 1
        return int(self.array)


def of_ml_dtypes(name):
    """Integers of a dtype of ml_dtypes."""

    def make(rows):
        ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
        return np.array(rows, getattr(ml_dtypes, name))

    return make


def strict_table(rows):
    """Integers of array-api-strict."""
    return Strict().xp.asarray(rows)


VALUES = {"numpy": NumPy, "torch": Torch, "strict": Strict}
ACCEPTED = {
    "list": lambda rows: rows,
    "numpy int64": np.array,
    "numpy uint8": lambda rows: np.array(rows, np.uint8),
    "numpy read-only": lambda rows: np.frombuffer(np.array(rows).tobytes(), int).reshape(np.shape(rows)),
    "recarray": lambda rows: np.array(rows).view(np.recarray),
    "numpy rows": lambda rows: list(np.array(rows)),
    "torch int64": torch.tensor,
    "torch int16": lambda rows: torch.tensor(rows, dtype=torch.int16),
    "torch strided": lambda rows: torch.tensor([rows, rows]).movedim(0, -1)[..., 0],
    "torch rows": lambda rows: list(torch.tensor(rows)),
    "strict": strict_table,
    "exporting": Exporting,
    "a generator": lambda rows: (row for row in rows),
}  # fmt: skip
REFUSED = {
    "int4": of_ml_dtypes("int4"),
    "uint2": of_ml_dtypes("uint2"),
    "bfloat16": of_ml_dtypes("bfloat16"),
    "torch bfloat16": lambda rows: torch.tensor(rows, dtype=torch.bfloat16),
    "numpy floats": lambda rows: np.array(rows, float),
    "numpy bools": lambda rows: np.array(rows, bool),
    "objects": lambda rows: np.array(rows, object),
    "masked": lambda rows: np.ma.masked_equal(np.array(rows), 0),
    "sparse": lambda rows: torch.tensor(rows).to_sparse(),
    "exporting floats": lambda rows: Exporting(np.array(rows, float)),
    "bools": lambda rows: np.array(rows, bool).tolist(),
    "a set": set,
    "a dict": dict.fromkeys,
    "one row of numpy bools": lambda rows: [*rows[:-1], np.ones(np.shape(rows[-1]), bool)],
}
HALVES = {"spatial_shapes": SIZES, "level_start_index": STARTS}


def calls(lib):
    """Forward and backward with good inputs and a table that is changed by half."""
    inputs = good_inputs(lib)
    grad_output = inputs.pop("grad_output")
    yield lambda **half: [cupy_msda.ms_deform_attn(**(inputs | half))]
    yield lambda **half: cupy_msda.ms_deform_attn_backward(grad_output, **(inputs | half))


def call_of_the_module():
    """The same of the module."""
    module = MSDeformAttn(M * D, L, M, P)
    features, points = torch.ones(2, S, M * D), torch.rand(2, S, L, 2)

    def call(**half):
        table = {f"input_{name}": rows for name, rows in (HALVES | half).items()}
        return [module(features, points, features, **table)]

    return call


def same(results, expected):
    """Whether the results are equal, of any library."""
    return all(bool((a == b).all()) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("table", ACCEPTED)
@pytest.mark.parametrize("values", VALUES)
def test_tables_that_are_accepted_give_the_same(values, table, half):
    for call in calls(VALUES[values]()):
        results, expected = call(**{half: ACCEPTED[table](HALVES[half])}), call()
        if values == "strict":
            if np.lib.NumpyVersion(np.__version__) < "2.1.0":
                pytest.skip(
                    "NumPy before 2.1 makes such results read-only, which it cannot hand out"
                )
            results, expected = map(np.from_dlpack, results), map(np.from_dlpack, expected)
        assert same(results, expected)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("table", [table for table in ACCEPTED if table != "a generator"])
def test_the_module_accepts_the_same(table, half):
    call = call_of_the_module()
    assert same(call(**{half: ACCEPTED[table](HALVES[half])}), call())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("table", REFUSED)
def test_tables_that_are_refused_are_refused_alike(table, half):
    errors = set()
    for call in (*calls(NumPy()), *calls(Torch()), *calls(Strict()), call_of_the_module()):
        with pytest.raises((TypeError, ValueError)) as raised:
            call(**{half: REFUSED[table](HALVES[half])})
        errors.add((type(raised.value), str(raised.value)))
    assert len(errors) == 1
    assert errors.pop()[1].startswith(f"{half} must ")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
def test_a_table_on_a_device_is_read_at_once_beside_host_values(lib, half):
    for call in calls(lib):
        given = FakeCupy(np.array(HALVES[half]))
        assert same(call(**{half: given}), call())
        assert given.reads == 1


@pytest.mark.parametrize("half", HALVES)
def test_a_table_on_a_device_stays_unread_beside_tensors_on_a_device(half, idle_device):
    message = f"{half} must be an array of the library of value, torch, got one of cupy"
    for call in (*calls(Torch()), call_of_the_module()):
        given = FakeCupy(np.array(HALVES[half]))
        with pytest.raises(TypeError, match=pattern(message)):
            call(**{half: given})
        assert given.reads == 0


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
def test_lists_of_numbers_on_a_device_are_refused_unread(half, lib):
    parts = [FakeCupy(np.array(row)) for row in HALVES[half]]
    message = (
        f"{half} must be one array of shape ... where its numbers are on a device, since each ..."
    )
    for call in calls(lib):
        with pytest.raises(TypeError, match=pattern(message)):
            call(**{half: parts})
    assert not any(part.reads for part in parts)


# --- level sizes that fill less than S, without starts -----------------------------------------------

SMALL = [(4, 5), (2, 3), (1, 1)]
UNFILLED = (
    "spatial_shapes must have levels that fill the S = 28 positions of value where "
    "level_start_index is None, got 27 positions in ((4, 5), (2, 3), (1, 1))"
)


def entries():
    """Everything that takes a level table, by name: a function of tensors, sizes and starts."""
    flat = [number for size in SMALL for number in size]
    table = cupy_msda.decompositions()
    yield "function", cupy_msda.ms_deform_attn
    yield "apply", cupy_msda.MSDeformAttnFunction.apply
    for name, operator in (("operator", FORWARD), ("decomposition", table[FORWARD])):
        yield name, lambda v, _, s, *points, run=operator: run(v, None, None, flat, s, *points)
    for name, operator in (("backward operator", BACKWARD), ("its decomposition", table[BACKWARD])):
        yield (
            name,
            lambda v, _, s, *points, run=operator: run(
                v.new_ones(SHAPE["grad_output"]), v, None, None, flat, s, *points, True, True
            ),
        )
    yield (
        "torch.func",
        lambda value, *rest: torch.func.grad(lambda v: cupy_msda.ms_deform_attn(v, *rest).sum())(
            value
        ),
    )
    yield "meta", lambda *given: cupy_msda.ms_deform_attn(*map(to_meta, given))


def to_meta(given):
    """A tensor without memory for a tensor."""
    return given.to("meta") if isinstance(given, torch.Tensor) else given


@pytest.mark.parametrize(("name", "entry"), [pytest.param(*e, id=e[0]) for e in entries()])
def test_levels_that_leave_positions_need_starts(name, entry):
    value, _, _, *points, _ = good_inputs(Torch()).values()
    with pytest.raises(ValueError, match=pattern(UNFILLED)):
        entry(value, SMALL, None, *points)
    assert entry(value, SMALL, STARTS, *points) is not None


@pytest.mark.parametrize("form", ["list", "numpy int64", "torch int64", "strict", "a generator"])
@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
def test_so_do_they_in_every_form_on_the_host(lib, form):
    for call in calls(lib):
        with pytest.raises(ValueError, match=pattern(UNFILLED)):
            call(spatial_shapes=ACCEPTED[form](SMALL), level_start_index=None)
        call(spatial_shapes=ACCEPTED[form](SMALL))


def test_no_levels_read_nothing():
    value = good_inputs(NumPy())["value"]
    locations = np.ones((4, 5, 2, 0, 6, 2), np.float32)
    assert not cupy_msda.ms_deform_attn(value, [], None, locations, locations[..., 0]).any()
