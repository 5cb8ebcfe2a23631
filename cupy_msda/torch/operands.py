# SPDX-License-Identifier: Apache-2.0
"""The operators' arguments: their schemas, and the way from and to the arguments of the public functions.

The fields of `Operands` are the only list of them: schemas, packing and unpacking follow it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cupy_msda import contract
from cupy_msda.problem import Grids, Level, LevelTable, Problem

AUTO = "auto"
BILINEAR = "bilinear"


class Operands(NamedTuple):
    """The arguments of the forward operator, in the order of its schema.

    Each half of the level table is a tensor, which is passed on unread, or flat integers (H0, W0, H1, W1, ...); with
    neither for the starts, levels follow one another. `query_order` holds grids, flat as well; (): the order
    given; None: "auto". The last three are those of `Sampling`.
    """

    value: Any
    spatial_shapes: Any
    level_start_index: Any
    sizes: Any
    starts: Any
    sampling_locations: Any
    attention_weights: Any
    query_order: Any = None
    value_mask: Any = None
    num_points: Any = None
    interpolation: Any = BILINEAR


class Sampling(NamedTuple):
    """How points are read, as the public functions and `contract.check` take it by keyword."""

    num_points: Any = None
    interpolation: Any = BILINEAR
    value_mask: Any = None


PLAIN = Sampling()


def sampling_by(num_points: Any, interpolation: Any, value_mask: Any) -> Sampling:
    """These rules; `PLAIN` itself, which costs no further look, where all are the defaults."""
    if num_points is None and value_mask is None and interpolation is BILINEAR:
        return PLAIN
    return Sampling(num_points, interpolation, value_mask)


_TYPES = Operands(
    value="Tensor",
    spatial_shapes="Tensor?",
    level_start_index="Tensor?",
    sizes="SymInt[]?",
    starts="SymInt[]?",
    sampling_locations="Tensor",
    attention_weights="Tensor",
    query_order="SymInt[]?",
    value_mask="Tensor?",
    num_points="int[]?",
    interpolation="str",
)
_NUM_REQUIRED = len(Operands._fields) - len(Operands._field_defaults)


class BackwardOperands(NamedTuple):
    """The arguments of the backward operator.

    In its schema, arguments of the forward that may be left out stand last, where older graphs lack them.
    """

    grad_output: Any
    forward: Operands
    needs_value: Any
    needs_points: Any


# --- parts of the operands: functions, since older versions of Dynamo know only the fields of a NamedTuple --------


def tensors_of(operands: Operands) -> tuple[Any, Any, Any, Any, Any, Any]:
    """What autograd saves."""
    return (
        operands.value,
        operands.spatial_shapes,
        operands.level_start_index,
        operands.sampling_locations,
        operands.attention_weights,
        operands.value_mask,
    )


def constants_of(operands: Operands) -> tuple[Any, Any, Any, Any, Any]:
    """The rest."""
    return (
        operands.sizes,
        operands.starts,
        operands.query_order,
        operands.num_points,
        operands.interpolation,
    )


def joined(tensors: Sequence[Any], constants: Sequence[Any]) -> Operands:
    """The operands of these `tensors_of` and `constants_of`."""
    value, shapes, start_index, locations, weights, mask = tensors
    sizes, starts, order, *rules = constants
    table = shapes, start_index, sizes, starts
    return Operands(value, *table, locations, weights, order, mask, *rules)


def inputs_of(operands: Operands) -> tuple[Any, Any, Any]:
    """What has a gradient."""
    return operands.value, operands.sampling_locations, operands.attention_weights


def with_inputs(operands: Operands, value: Any, locations: Any, weights: Any) -> Operands:
    """The same with other `inputs_of`."""
    _, shapes, start_index, _, _, mask = tensors_of(operands)
    tensors = value, shapes, start_index, locations, weights, mask
    return joined(tensors, constants_of(operands))


def backward_operands(flat: Sequence[Any]) -> BackwardOperands:
    """From arguments, or what belongs to each of them, in the order of the schema."""
    grad_output, *rest = flat
    required, flags = rest[:_NUM_REQUIRED], rest[_NUM_REQUIRED : _NUM_REQUIRED + 2]
    forward = Operands(*required, *rest[_NUM_REQUIRED + 2 :])
    return BackwardOperands(grad_output, forward, *flags)


def flat(operands: BackwardOperands) -> tuple[Any, ...]:
    """In the order of the schema."""
    given = tuple(operands.forward)
    needs = operands.needs_value, operands.needs_points
    return (operands.grad_output, *given[:_NUM_REQUIRED], *needs, *given[_NUM_REQUIRED:])


def needs_of(operands: BackwardOperands) -> tuple[Any, Any, Any]:
    """Whether the gradients of value, locations and weights are needed."""
    return operands.needs_value, operands.needs_points, operands.needs_points


def given_of(operands: Operands) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments that `contract.check` takes by position."""
    value, locations, weights = inputs_of(operands)
    return (value, *_table_of(operands), locations, weights)


def sampling_of(operands: Operands) -> dict[str, Any]:
    """Those that it and the reference take by keyword."""
    return {
        "num_points": operands.num_points,
        "interpolation": operands.interpolation,
        "value_mask": operands.value_mask,
    }


def _table_of(operands: Operands) -> tuple[Any, Any]:
    """spatial_shapes and level_start_index as the public functions take them."""
    shapes, start_index = operands.spatial_shapes, operands.level_start_index
    return (
        _pairs(operands.sizes) if shapes is None else shapes,
        operands.starts if start_index is None else start_index,
    )


def order_of(operands: Operands) -> Any:
    """query_order as the public functions take it."""
    return AUTO if operands.query_order is None else _pairs(operands.query_order) or None


# --- schemas ---------------------------------------------------------------------------------------


def _declared(types: Operands, names: Iterable[str]) -> list[str]:
    """Fields as a schema declares them."""
    defaults = {
        name: f'="{value}"' if isinstance(value, str) else f"={value}"
        for name, value in Operands._field_defaults.items()
    }
    return [f"{getattr(types, name)} {name}{defaults.get(name, '')}" for name in names]


DECLARED = Operands(*_declared(_TYPES, Operands._fields))
FORWARD_SCHEMA = f"({', '.join(DECLARED)}) -> Tensor"
# A gradient that is not needed comes back without elements: operators cannot return None.
_BACKWARD_FIELDS = BackwardOperands(
    "Tensor grad_output",
    DECLARED,
    "bool needs_value",
    "bool needs_points",
)
BACKWARD_SCHEMA = f"({', '.join(flat(_BACKWARD_FIELDS))}) -> (Tensor, Tensor, Tensor)"


def register_once(register: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """Call a function of `torch.library`, unless an earlier import of the calling file has done so.

    torch refuses a second registration, and a notebook's autoreload imports again. A module that is reloaded keeps
    its namespace, so what is registered calls the new functions.
    """
    done: set[Any] = vars(torch.ops.cupy_msda).setdefault("_registered", set())
    key = register.__name__, *(part for part in arguments if isinstance(part, str | tuple))
    if key not in done:
        register(*arguments, **keywords)
        done.add(key)


class Arguments(NamedTuple):
    """The arguments of `MSDeformAttnFunction.apply`."""

    value: Any
    spatial_shapes: Any
    level_start_index: Any
    sampling_locations: Any
    attention_weights: Any
    im2col_step: Any = None
    query_order: Any = AUTO
    num_points: Any = None
    interpolation: Any = BILINEAR
    value_mask: Any = None


def arguments_of(operands: Operands) -> tuple[Any, ...]:
    """The arguments of `apply` that `pack` makes these operands of."""
    return (*given_of(operands), None, order_of(operands), *sampling_of(operands).values())


def argument_gradients(value: Any, locations: Any, weights: Any) -> tuple[Any, ...]:
    """What the backward of `apply` returns: None where there is no gradient."""
    # A plain tuple: of a NamedTuple, Dynamo (torch 2.13) takes every entry for None.
    return value, None, None, locations, weights, None, None, None, None, None


_SEQUENCES = (tuple, list)
# `contract.check`, or what takes its arguments.
_Check = Callable[..., tuple[Problem, LevelTable]]
NO_OPERANDS = Operands(*(None,) * len(Operands._fields))


def pack(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    query_order: Any,
    sampling: Sampling = PLAIN,
    check: _Check = contract.check,
) -> Operands:
    """The operands for arguments of the public functions; `check` raises the errors for what no operator can take."""
    shapes, start_index, sizes, starts = None, None, None, None
    if isinstance(spatial_shapes, Tensor):
        shapes = spatial_shapes
    else:
        sizes = _plain_pairs(spatial_shapes)
        if sizes is None:
            given = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
            sizes = _read("spatial_shapes", spatial_shapes, check, given, sampling)
    if isinstance(level_start_index, Tensor):
        start_index = level_start_index
    elif level_start_index is not None:
        starts = _plain(level_start_index)
        if starts is None:
            given = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
            starts = _read("level_start_index", level_start_index, check, given, sampling)
    order = None
    if query_order is not AUTO:
        given = value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        order = _order(query_order, check, given, sampling)
    table = shapes, start_index, sizes, starts
    operands = Operands(value, *table, sampling_locations, attention_weights, order)
    return operands if sampling is PLAIN else _with_sampling(operands, sampling, check)


def _with_sampling(operands: Operands, sampling: Sampling, check: _Check) -> Operands:
    """The operands with these rules; an error for what no operator can be given."""
    num_points, interpolation, mask = sampling
    contract.check_interpolation(interpolation)
    num_points = contract.check_num_points(num_points)
    if mask is not None and not isinstance(mask, Tensor):
        check(*given_of(operands), **sampling._asdict())
    # Not by `_replace`, which torch 2.4's Dynamo does not trace.
    tensors, constants = tensors_of(operands), constants_of(operands)
    rules = num_points, str(interpolation)
    return joined((*tensors[:-1], mask), (*constants[: -len(rules)], *rules))


def pack_traced(*arguments: Any) -> Operands:
    """`pack` in a graph."""
    value, shapes, start_index, locations, weights, order, sampling, *check = arguments
    order = traceable(order)
    if isinstance(order, Tensor):
        order = order.tolist()  # the operators take no tensor for it, so this breaks the graph
    table = traceable(shapes), traceable(start_index)
    return pack(value, *table, locations, weights, order, sampling, *check)


def traceable(numbers: Any) -> Any:
    """Integers for a graph: those in arrays, which a tracer does not know, become one tensor, unread."""
    if isinstance(numbers, np.ndarray):
        return torch.as_tensor(numbers)
    if not isinstance(numbers, (list, tuple, range)):
        return numbers
    rows = list(numbers)
    return torch.stack(list(map(_row, rows))) if any(map(_holds_array, rows)) else rows


def _holds_array(row: Any) -> bool:
    """Whether numbers of a level are in an array."""
    numbers = row if isinstance(row, (list, tuple)) else (row,)
    return any(isinstance(number, (Tensor, np.ndarray, np.generic)) for number in numbers)


def _row(row: Any) -> Tensor:
    """The numbers of a level as a tensor."""
    several = isinstance(row, (list, tuple))
    return torch.stack([torch.as_tensor(n) for n in row]) if several else torch.as_tensor(row)


def _order(
    query_order: Any, check: _Check, given: Sequence[Any], sampling: Sampling
) -> Sequence[int] | None:
    """query_order as the operators take it."""
    if isinstance(query_order, str) and query_order == AUTO:
        return None
    if query_order is None:
        return ()
    order = _plain_pairs(query_order)
    if order:
        return order
    problem, _ = check(*given, **sampling._asdict())
    return _flat(contract.check_query_order(query_order, problem.num_queries) or ())


def _plain_pairs(given: Any) -> tuple[Any, ...] | None:
    """Flat, if it is a list or tuple of pairs of plain ints or of a tracer's symbols; else None."""
    if not isinstance(given, _SEQUENCES):
        return None
    # Not by unpacking pairs (h, w), which would take sets, too.
    numbers = [
        number for row in given if isinstance(row, _SEQUENCES) and len(row) == 2 for number in row
    ]
    if len(numbers) != 2 * len(given):
        return None
    if all([type(number) is int for number in numbers]):  # noqa: C419 - a list takes half the time
        return tuple(numbers)
    return _plain(numbers)


def _plain(given: Any) -> tuple[Any, ...] | None:
    """As a tuple, if it is a list or tuple of plain ints or of a tracer's symbols; else None."""
    if not isinstance(given, _SEQUENCES):
        return None
    if all([type(number) is int for number in given]):  # noqa: C419
        return tuple(given)
    return tuple(given) if all(map(_is_plain, given)) else None


def _is_plain(number: Any) -> bool:
    """Whether an operator can be given the number as it is."""
    return type(number) is int or isinstance(number, torch.SymInt)


def _read(
    name: str, half: Any, check: _Check, given: Sequence[Any], sampling: Sampling
) -> tuple[int, ...]:
    """What is no such list of half a level table, by the contract's reader, among all that `check` takes."""
    rows = contract.read_table(name, half, _integer)
    if (
        rows is None
    ):  # on a device, perhaps of another library: the contract knows whether to read it
        _, table = check(*given, **sampling._asdict())
        rows = table.sizes if name == "spatial_shapes" else table.starts
    return _flat(rows) if name == "spatial_shapes" else tuple(rows)


def _integer(number: Any) -> Any:
    """An int; a symbol stays one, of which `__index__` would make a constant."""
    return number if isinstance(number, torch.SymInt) else operator.index(number)


def _flat(pairs: Iterable[Any]) -> tuple[Any, ...]:
    """Pairs as flat integers."""
    return tuple([number for pair in pairs for number in pair])


def _pairs(flat: Sequence[Any] | None) -> list[tuple[Any, Any]] | None:
    """Flat integers as pairs."""
    return None if flat is None else list(zip(flat[::2], flat[1::2], strict=True))


def check(operands: Operands, grad_output: Any = None) -> tuple[Problem, LevelTable, Grids]:
    """Check the contract."""
    found = contract.check(*given_of(operands), **sampling_of(operands))
    return check_rest(operands, grad_output, found)


def check_rest(
    operands: Operands,
    grad_output: Any,
    found: tuple[Problem, LevelTable],
    origin: str = "sampling_locations",
) -> tuple[Problem, LevelTable, Grids]:
    """Check what `contract.check` does not see, beside what it has found; `origin`: the argument that has Lq."""
    problem, table = found
    grids = contract.check_query_order(order_of(operands), problem.num_queries, origin)
    if grad_output is not None:
        contract.check_grad_output(problem, grad_output, operands.value)
    return problem, table, grids


def check_traced(operands: Operands, grad_output: Any = None) -> None:
    """Check the contract as far as it needs no number of a tensor and no symbolic size."""
    given, rules = given_of(operands), sampling_of(operands)
    check_rest_traced(operands, grad_output, lambda: contract.check(*given, **rules, traced=True))


def check_rest_traced(
    operands: Operands,
    grad_output: Any,
    check: Callable[[], tuple[Problem, LevelTable]],
    origin: str = "sampling_locations",
) -> None:
    """`check`, then `check_rest`, up to a size that is known only when the operator runs, which checks it."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    with suppress(GuardOnDataDependentSymNode):
        found = check()
        numbers = (found[0].num_queries, *(operands.query_order or ()))
        if not all(isinstance(number, int) for number in numbers):
            operands = operands._replace(query_order=None)
        check_rest(operands, grad_output, found, origin)


def levels_of(operands: Operands) -> list[Level]:
    """The levels for the reference, unread: ints where all are ints, else 0-dim tensors."""
    known = operands.spatial_shapes is None and operands.level_start_index is None
    shapes, starts = (
        half.long() if isinstance(half, Tensor) else half for half in _table_of(operands)
    )
    if starts is None:
        starts = list(accumulate((h * w for h, w in shapes), initial=0))[:-1]
    table = [Level(h, w, start) for (h, w), start in zip(shapes, starts, strict=True)]
    spatial_size = operands.value.shape[1]
    return table if known else [_shrunk(level, spatial_size) for level in table]


def _shrunk(level: Level, spatial_size: int) -> Level:
    """The level, or an empty one where it does not fit S, so that no index leaves value."""
    h, w, start = level
    fits = (h >= 0) & (h <= spatial_size) & (w >= 0) & (w <= spatial_size)
    fits = fits & (start >= 0) & (start + h * w <= spatial_size)
    return Level(h * fits, w * fits, start * fits)
