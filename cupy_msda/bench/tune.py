# SPDX-License-Identifier: Apache-2.0
"""Time the candidates of plans on the GPU at hand, and write the table of the fastest."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupy_msda import budget, contract, report
from cupy_msda.bench import cases, correctness, gpu_timing, machine, timing
from cupy_msda.bench.cases import Case, Inputs, Shape
from cupy_msda.cuda import launch, plans, tuned
from cupy_msda.cuda.plans import Candidate, Choice, Device, Plan
from cupy_msda.faults import reason
from cupy_msda.problem import Grids, LevelTable, Problem
from cupy_msda.torch import exchange

_DTYPES = ("float32", "float16", "bfloat16")
_LIMITS = timing.Limits(
    50, 0.25
)  # of one result: with its check, a shape takes less than two seconds
_LEAST = 5  # repeats, even beyond the time limit
_POSITIONS = 4096  # whose gradients of value are checked
# What each result is written to, in the order of `correctness.RESULTS`.
_ARRAYS = ("output", "grad_value", "grad_locations", "grad_weights")
_WRITTEN = {
    plans.FORWARD: _ARRAYS[:1],
    plans.BACKWARDS[True, True]: _ARRAYS[1:],
    plans.BACKWARDS[True, False]: _ARRAYS[1:2],
    plans.BACKWARDS[False, True]: _ARRAYS[2:],
}


Watch = Callable[[timing.Call], float]  # microseconds of the device


class Job(NamedTuple):
    """A case, and the grids of its queries, as `query_order` gives them."""

    case: Case
    grids: Grids


def run(shapes: str | None, output: Path) -> int:
    """Tune shapes by name or of a file, or all of the benchmark, and write `output`; 1 if a candidate is wrong."""
    obstacle = report.torch_obstacle()
    if obstacle:
        raise SystemExit(f"cannot tune: {obstacle}")
    jobs = select(shapes)
    _write({}, output)  # before the work, in case the path cannot be written
    table, num_wrong = tune(jobs, "cuda", _device_us())
    _write(table, output)
    print(f"wrote {output}: {tuned.VARIABLE}={output} uses it")
    return int(num_wrong > 0)


def _write(table: tuned.Table, output: Path) -> None:
    """Write the table."""
    try:
        output.write_text(tuned.as_text(table), encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"{output} cannot be written: {error}") from error


# --- what to tune --------------------------------------------------------------------------------


def select(shapes: str | None) -> list[Job]:
    """The jobs of shapes: names between commas, a JSON file, or None for all of the benchmark; in each dtype.

    Points lie around the query where queries are pixels, as in encoders, and anywhere else.
    """
    grids: dict[str, Grids] = {}
    if shapes is None:
        names = list(cases.SHAPES)
    elif shapes.endswith(".json"):
        found = _read(shapes)
        grids = {name: given for name, (_, given) in found.items()}
        cases.SHAPES.update({name: shape for name, (shape, _) in found.items()})
        names = list(found)
    else:
        names = shapes.split(",")
    unknown = [name for name in names if name not in cases.SHAPES]
    if unknown:
        raise SystemExit(
            f"--shapes must be a .json file or names among {', '.join(cases.SHAPES)}, got {', '.join(unknown)}"
        )
    jobs = []
    for name in names:
        distribution = "uniform" if cases.SHAPES[name].queries is not None else "sigma 2"
        jobs += [Job(Case(name, distribution, dtype), grids.get(name)) for dtype in _DTYPES]
    return jobs


def _read(file: str) -> dict[str, tuple[Shape, Grids]]:
    """The shapes of a JSON file by name: the fields of `cases.Shape`, and "grids" for `query_order`, if it is given."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        return {name: _shape(dict(fields)) for name, fields in content.items()}
    except Exception as error:
        raise SystemExit(
            '--shapes must be names or a JSON file like {"mine": {"batch": 1, "levels": [[64, 64]], "queries": 300}}, '
            f"got {file}: {reason(error)}"
        ) from error


def _shape(fields: dict[str, Any]) -> tuple[Shape, Grids]:
    """One shape of a file, and the grids of its queries; an error if it is none."""
    grids = fields.pop("grids", "auto")
    levels = tuple((h, w) for h, w in fields["levels"])
    shape = Shape(**fields | {"levels": levels})
    pixels = sum(h * w for h, w in levels)
    queries = pixels if shape.queries is None else shape.queries
    sizes = (shape.batch, queries, shape.points, shape.heads, shape.channels, *sum(levels, ()))
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"sizes must be positive integers, got {shape}")
    return shape, contract.check_query_order(grids, queries)


# --- the measurement -----------------------------------------------------------------------------


class _Prepared(NamedTuple):
    """What all candidates of a job share."""

    inputs: Inputs
    expected: correctness.Expected
    planned: tuple[Problem, LevelTable, Device, Grids]  # what is planned, before a choice
    device: int


def tune(jobs: list[Job], device: str, watch: Watch) -> tuple[tuned.Table, int]:
    """The table of the fastest candidates, and how many candidates were wrong."""
    begin = time.perf_counter()
    name = machine.describe(device)["device"]
    table: dict[str, list[tuned.Entry]] = {}
    num_wrong = 0
    for number, job in enumerate(jobs, 1):
        seconds = time.perf_counter() - begin
        print(f"[{number}/{len(jobs)}, {seconds:.0f} s] {job.case}", flush=True)
        prepared = _prepare(job, device)
        problem, _, described, grids = prepared.planned
        where = plans.queries(problem, grids)
        entries = table.setdefault(f"sm_{described.compute_capability}", [])
        for result in _WRITTEN:
            times, wrong = _time(result, prepared, watch)
            num_wrong += wrong
            if times:
                source = _source(name, job, times)
                entries.append(tuned.Entry(result, where, problem, _fastest(times), source))
    return table, num_wrong


def _prepare(job: Job, device: str) -> _Prepared:
    """The inputs of a job and the results that they must have."""
    inputs = cases.build(job.case, device)
    index = max(inputs.value.get_device(), 0)
    problem, table = contract.check(
        inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    )
    planned = problem, table.on_host, launch.describe(index), job.grids
    return _Prepared(inputs, correctness.expect(inputs), planned, index)


def _time(result: str, prepared: _Prepared, watch: Watch) -> tuple[dict[str, float], int]:
    """The median microseconds of the right candidates, none where there is no choice; and how many were wrong."""
    candidates = _candidates(result, prepared)
    if len(candidates) == 1:
        return {}, 0
    arrays = _allocate(result, prepared.inputs)
    calls: dict[str, timing.Call] = {}
    first: dict[str, Tensor] = {}
    for candidate in candidates:
        try:
            call = _make_call(_plan(result, candidate, prepared), arrays, prepared)
            got = _check(call, result, arrays, prepared, first)
        except Exception as error:  # a wrong result, or whatever else goes wrong
            print(f"  {result}: {candidate} is left out: {reason(error)}", flush=True)
        else:
            calls[str(candidate)] = call
            first = first or got
    times = _medians(calls, watch)
    for name, microseconds in times.items():
        mark = "  <-" if name == _fastest(times) else ""
        print(f"  {result:19}{microseconds:9.1f} us  {name}{mark}", flush=True)
    return times, len(candidates) - len(calls)


def _fastest(times: dict[str, float]) -> str:
    """The candidate with the smallest median."""
    return min(times, key=lambda name: times[name])


def _candidates(result: str, prepared: _Prepared) -> tuple[Candidate, ...]:
    """The candidates of a result, the model's first."""
    problem, _, device, grids = prepared.planned
    if result == plans.FORWARD:
        return plans.forward_candidates(problem, device, grids)
    return plans.backward_candidates(problem, device, grids, *_needs(result), False)


def _needs(result: str) -> tuple[bool, bool]:
    """Which gradients a backward writes: of value, of points."""
    return next(needs for needs, name in plans.BACKWARDS.items() if name == result)


def _plan(result: str, candidate: Candidate, prepared: _Prepared) -> Plan:
    """The plan of a candidate."""
    choice = Choice(str(candidate), "tuning")
    if result == plans.FORWARD:
        return plans.plan_forward(*prepared.planned, choice)
    value, points = _needs(result)
    return plans.plan_backward(
        *prepared.planned, needs_value=value, needs_points=points, choice=choice
    )


def _allocate(result: str, inputs: Inputs) -> dict[str, Tensor]:
    """The arrays of a result's launches, by the names of plans."""
    given = dict(zip(("value", "locations", "weights"), inputs.tensors, strict=True))
    like = dict(zip(_ARRAYS, (inputs.grad_output, *inputs.tensors), strict=True))
    written = {name: torch.empty_like(like[name]) for name in _WRITTEN[result]}
    return {"grad_output": inputs.grad_output, **given, **written}


def _make_call(plan: Plan, arrays: dict[str, Tensor], prepared: _Prepared) -> timing.Call:
    """Compile a plan, and make the call that queues its launches on torch's current stream."""
    bound = launch.bind(plan, prepared.device)
    if plan.workspace and "accumulator" not in arrays:  # as large for every candidate
        value = prepared.inputs.value
        arrays["accumulator"] = value.new_empty(plan.workspace, dtype=torch.uint8)

    def call() -> None:
        arguments = launch.thread_arguments()
        for name, tensor in arrays.items():
            arguments.set_pointer(name, tensor.data_ptr())
        launch.run(bound, arguments, exchange.current_stream(bound.device, arguments))

    return call


def _check(
    call: timing.Call,
    result: str,
    arrays: dict[str, Tensor],
    prepared: _Prepared,
    first: dict[str, Tensor],
) -> dict[str, Tensor]:
    """What a candidate computes for the queries that are compared; ValueError if it is wrong.

    It must be within the error budget and, but for the gradient of value, bitwise as that of the first candidate.
    """
    expected = prepared.expected
    for name in _WRITTEN[result]:
        arrays[name].fill_(torch.nan)
    arrays["grad_output"] = expected.grad_output
    try:
        call()
    finally:
        arrays["grad_output"] = prepared.inputs.grad_output
    step = max(1, prepared.inputs.value.shape[1] // _POSITIONS)
    truths = dict(zip(_ARRAYS, zip(expected.reference, expected.exact, strict=True), strict=True))
    got = {}
    for name in _WRITTEN[result]:
        if name == "grad_value":
            part, *truth = (array[:, ::step] for array in (arrays[name], *truths[name]))
        else:
            part, *truth = arrays[name][:, expected.queries], *truths[name]
        if name != "grad_value" and first and not torch.equal(part, first[name]):
            raise ValueError(f"{name} has other bits than by the first candidate")
        error = budget.used(part, *truth)
        if not error <= 1:
            raise ValueError(f"the error of {name} is {error:.2g} times its budget")
        got[name] = part
    return got


def _device_us() -> Watch:
    """The stopwatch of the current GPU. It clears the L2 cache first, which gives the host time to queue the call."""
    gpu = gpu_timing.current_gpu()
    return lambda call: gpu.device_us(lambda: call)


def _medians(calls: Mapping[str, timing.Call], watch: Watch) -> dict[str, float]:
    """The median microseconds of each; in each repeat all take turns in random order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in timing.in_turns(calls, _LIMITS, _LEAST):
        times[name].append(watch(calls[name]))
    return {name: median(found) for name, found in times.items()}


def _source(device: str, job: Job, times: Mapping[str, float]) -> str:
    """What an entry rests on."""
    date = datetime.now(timezone.utc).date().isoformat()
    measured = "; ".join(f"{candidate}: {us:.1f} us" for candidate, us in times.items())
    return f"{device}, {date}, {job.case.distribution}: {measured}"
