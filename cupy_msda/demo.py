# SPDX-License-Identifier: Apache-2.0
"""The demo: MSDeformAttn on the feature pyramid of a picture, compared with grid_sample, timed and drawn.

Nothing is trained: features, offsets and weights come from fixed random projections of colours and edges. The work is
that of a real encoder layer: every pixel of every level is a query.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from cupy_msda import (
    MSDeformAttn,
    budget,
    ms_deform_attn,
    ms_deform_attn_core_pytorch,
    plot,
    record,
    report,
)
from cupy_msda.faults import reason

D_MODEL, LEVELS, HEADS, POINTS = 256, 4, 8, 4
STRIDES = (8, 16, 32, 64)
LONGER_SIDE = 640  # pixels; a larger picture is scaled down
WHITES = (1, 255, 4095, 65535)  # of grey as fractions and in 8, 12 and 16 bits
REPEATS = 5
QUERIES_DRAWN = 4
# A location gradient jumps where a point crosses from one cell of its level to the next, so float32 and float64 may
# disagree there without either being wrong.
EDGE = 1e-3  # pixels

PICTURE: Any = resources.files("cupy_msda") / "data" / "coffee.jpg"

Core = Callable[[Tensor, Any, Tensor, Tensor], Tensor]


class Scene(NamedTuple):
    """A picture as the input of one encoder layer."""

    picture: np.ndarray  # H, W, 3 in [0, 1]
    salience: np.ndarray  # strength of the edges on the grid of stride 16
    shapes: list[tuple[int, int]]
    features: Tensor  # 1, S, D_MODEL
    reference_points: Tensor  # 1, S, 1, 2: the centre of each pixel


def run(image: Path | None, output: Path) -> int:
    """Run the demo; the exit status is 1 if a result is outside its budget."""
    obstacle = report.torch_obstacle()
    device = "cuda" if obstacle is None else "cpu"
    scene = build_scene(load_picture(image or PICTURE), device)
    module = build_module(device)
    height, width = scene.picture.shape[:2]
    print(f"picture    {image or PICTURE} ({width} x {height}), levels {scene.shapes}")
    print(
        f"module     d_model {D_MODEL}, {HEADS} heads, {LEVELS} levels, {POINTS} points; ", end=""
    )
    print(f"{scene.features.shape[1]} queries")
    if obstacle is None:
        print(f"backend    CUDA kernels on {torch.cuda.get_device_name()}\n")
    else:
        print(f"backend    {report.cpu_backend()} on the CPU\n           not on CUDA: {obstacle}\n")

    passed = print_errors(scene, module)
    print_times(scene, module)
    draw(scene, module, output)
    print(f"\nwrote {output}: where {QUERIES_DRAWN} queries look (untrained weights)")
    print("all errors within budget" if passed else "FAILED: an error is outside its budget")
    return int(not passed)


def load_picture(path: Path) -> np.ndarray:
    """The picture as an array (H, W, 3) in [0, 1], no side longer than LONGER_SIDE."""
    try:
        with path.open("rb") as opened, Image.open(opened) as file:
            picture = _in_rgb(ImageOps.exif_transpose(file))
            picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise SystemExit(f"the picture {path} cannot be read: {reason(error)}") from error
    return np.asarray(picture, np.float32) / 255


def _in_rgb(picture: Image.Image) -> Image.Image:
    """The picture as viewers show it, in RGB of 8 bits: transparency over white; of an animation, the first frame."""
    if picture.mode[0] in "IF":  # grey of 16 or 32 bits
        picture = _in_8_bits(picture)
    if not picture.mode.endswith(("A", "a")) and "transparency" not in picture.info:
        return picture.convert("RGB")
    background = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(background, picture.convert("RGBA")).convert("RGB")


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits scaled to 8; PIL's `convert` would clip it to 0 to 255.

    Such a file does not say which number is white.
    """
    grey = np.asarray(picture, np.float64)
    black, brightest = grey.min(), grey.max()
    if not np.isfinite(brightest - black):
        raise ValueError("its pixels must be finite, got infinity or NaN")
    white = next((number for number in WHITES if black >= 0 and brightest <= number), None)
    if white is None:
        white = brightest
    else:
        black = 0
    scaled = (grey - black) / max(white - black, np.finfo(np.float64).tiny)
    return Image.fromarray((255 * scaled).round().astype(np.uint8))


def build_scene(picture: np.ndarray, device: str) -> Scene:
    """Mean colour and mean edge strength per cell of each stride, projected to D_MODEL channels."""
    height, width = picture.shape[:2]
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    grey = functional.pad(pixels.mean(0), (0, 1, 0, 1))
    edges = torch.stack([grey.diff(dim=1)[:height], grey.diff(dim=0)[:, :width]]).abs()
    edges[0, :, -1] = edges[1, -1, :] = 0  # the padding's
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    maps = [functional.adaptive_avg_pool2d(torch.cat([pixels, edges]), shape) for shape in shapes]
    rows = torch.cat([level.flatten(1).T for level in maps])
    rows = (rows - rows.mean(0)) / (rows.std(0, correction=0) + 1e-6)
    projection = torch.randn(rows.shape[1], D_MODEL, generator=torch.Generator().manual_seed(0))
    features = functional.layer_norm(rows @ projection, (D_MODEL,))
    centres = torch.cat([_pixel_centres(*shape) for shape in shapes])
    return Scene(
        picture,
        maps[1][3:].sum(0).numpy(),
        shapes,
        features[None].to(device),
        centres[None, :, None].to(device),
    )


def _pixel_centres(height: int, width: int) -> Tensor:
    """(x, y) of each pixel's centre as fractions of the level, row by row."""
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def build_module(device: str) -> MSDeformAttn:
    """The module with half its initial star of offsets, bent by the query, and with uneven attention."""
    torch.manual_seed(0)
    module = MSDeformAttn(D_MODEL, LEVELS, HEADS, POINTS)
    with torch.no_grad():
        module.sampling_offsets.bias.mul_(0.5)
        module.sampling_offsets.weight.normal_(std=0.3 / D_MODEL**0.5)
        module.attention_weights.weight.normal_(std=1 / D_MODEL**0.5)
    return module.to(device)


def forward(module: MSDeformAttn, scene: Scene) -> Tensor:
    """The module as its users call it."""
    result: Tensor = module(
        scene.features, scene.reference_points, scene.features, scene.shapes, None
    )
    return result


def forward_by_grid_sample(module: MSDeformAttn, scene: Scene) -> Tensor:
    """The same module around the grid_sample formulation."""
    value, locations, weights = operator_inputs(module, scene)
    sampled = ms_deform_attn_core_pytorch(value, scene.shapes, locations, weights)
    result: Tensor = module.output_proj(sampled)
    return result


def operator_inputs(module: MSDeformAttn, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """The module's inputs to the operator: value, sampling locations, attention weights."""
    n, s, _ = scene.features.shape
    value = module.value_proj(scene.features).view(n, s, HEADS, -1)
    offsets = module.sampling_offsets(scene.features).view(n, s, HEADS, LEVELS, POINTS, 2)
    logits = module.attention_weights(scene.features).view(n, s, HEADS, LEVELS * POINTS)
    weights = logits.softmax(-1).view(n, s, HEADS, LEVELS, POINTS)
    sizes = _sizes(scene).to(offsets)
    return value, scene.reference_points[:, :, None, :, None] + offsets / sizes, weights


def _sizes(scene: Scene) -> Tensor:
    """(W, H) of each level, shape (LEVELS, 1, 2)."""
    return torch.tensor(scene.shapes).flip(1)[:, None]


def _ours(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """`ms_deform_attn` with the arguments of the grid_sample formulation."""
    result: Tensor = ms_deform_attn(value, shapes, None, locations, weights)
    return result


def print_errors(scene: Scene, module: MSDeformAttn) -> bool:
    """Compare both with grid_sample in float64; return whether ours is within its budget."""
    with torch.no_grad():
        inputs = [tensor.contiguous() for tensor in operator_inputs(module, scene)]
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(1, inputs[0].shape[1], D_MODEL, generator=generator).to(inputs[0])
    pixels = inputs[1] * _sizes(scene).to(inputs[1]) - 0.5
    smooth = ((pixels - pixels.round()).abs() > EDGE).all(-1, keepdim=True)

    def results(core: Core, dtype: torch.dtype) -> list[np.ndarray]:
        value, locations, weights = (
            tensor.to(dtype).detach().requires_grad_() for tensor in inputs
        )
        output = core(value, scene.shapes, locations, weights)
        by_value, by_locations, by_weights = torch.autograd.grad(
            output, (value, locations, weights), grad.to(dtype)
        )
        parts = (output.detach(), by_value, by_locations * smooth, by_weights)
        return [part.cpu().numpy() for part in parts]

    exact = results(ms_deform_attn_core_pytorch, torch.float64)
    theirs = results(ms_deform_attn_core_pytorch, torch.float32)
    ours = results(_ours, torch.float32)
    print("relative error against float64       grid_sample   cupy_msda   of budget")
    passed = True
    names = ("output", "gradient of value", "gradient of locations *", "gradient of weights")
    for name, best, their, our in zip(names, exact, theirs, ours, strict=True):
        errors = [budget.relative_error(part, best) for part in (their, our)]
        part = budget.used(our, their, best)
        passed &= part <= 1
        print(f"  {name:32}{errors[0]:14.1e}{errors[1]:12.1e}{part:12.2f}")
    with torch.no_grad():
        outputs = forward_by_grid_sample(module, scene), forward(module, scene)
    left_out = f"{smooth.numel() - int(smooth.sum())} of {smooth.numel()}"
    print(f"  * without the {left_out} points within {EDGE} pixel of an edge between two")
    print("    cells, where this gradient jumps and float32 cannot tell the side")
    print("  root mean square; budget: twice the float32 error of grid_sample and some rounding")
    difference = float((outputs[0] - outputs[1]).abs().max())
    largest = float(outputs[0].abs().max())
    print(f"  outputs of the module, up to {largest:.1f}, differ by at most {difference:.1e}\n")
    return passed


def print_times(scene: Scene, module: MSDeformAttn) -> None:
    """Median times of both, alone and inside the module, forward and with the backward."""
    inputs = [tensor.detach().contiguous() for tensor in operator_inputs(module, scene)]
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def operator(core: Core) -> Callable[[], Tensor]:
        return lambda: core(leaves[0], scene.shapes, *leaves[1:])

    rows: tuple[tuple[str, Callable[[], Tensor], Callable[[], Tensor]], ...] = (
        ("operator", operator(ms_deform_attn_core_pytorch), operator(_ours)),
        (
            "MSDeformAttn",
            lambda: forward_by_grid_sample(module, scene),
            lambda: forward(module, scene),
        ),
    )
    print(f"time, median of {REPEATS}                    grid_sample   cupy_msda     faster by")
    for name, theirs, ours in rows:
        for what, wrap in (
            ("forward", _without_gradient),
            ("forward and backward", _with_backward),
        ):
            their, our = _median_times(wrap(theirs), wrap(ours))
            label = f"{name}, {what}"
            print(f"  {label:34}{their * 1e3:9.1f} ms{our * 1e3:9.1f} ms{their / our:12.1f} x")


def _without_gradient(function: Callable[[], Tensor]) -> Callable[[], object]:
    """The function under no_grad."""
    return torch.no_grad()(function)


def _with_backward(function: Callable[[], Tensor]) -> Callable[[], object]:
    """The function followed by the backward of its sum of squares, which needs every gradient."""
    return lambda: torch.autograd.backward(function().square().sum())


def _median_times(*functions: Callable[[], object]) -> list[float]:
    """Median seconds of each after a warm-up, interleaved so that noise affects all equally."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(REPEATS + 1):
        for function, seconds in zip(functions, times, strict=True):
            _synchronise()
            start = time.perf_counter()
            function()
            _synchronise()
            if repeat > 0:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def _synchronise() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def draw(scene: Scene, module: MSDeformAttn, output: Path) -> None:
    """The picture with the sampling points of a few queries, as the module's call is recorded."""
    with torch.no_grad(), record(module) as calls:
        forward(module, scene)
    (call,) = calls
    figure = plot.sampling_points(
        scene.picture,
        call.sampling_locations,
        call.attention_weights,
        salient_queries(scene),
        call.spatial_shapes,
        reference_points=call.reference_points,
    )
    try:
        figure.savefig(output, format="png")
    except Exception as error:
        raise SystemExit(f"the picture {output} cannot be written: {reason(error)}") from error


def salient_queries(scene: Scene) -> list[int]:
    """Indices of the queries of stride 16 with the strongest edges, well apart from each other and from the border."""
    rows, columns = scene.salience.shape
    start = scene.shapes[0][0] * scene.shapes[0][1]
    y, x = np.mgrid[:rows, :columns]
    salience = scene.salience.copy()
    distance = np.minimum.reduce([y + 1, rows - y, x + 1, columns - x])
    salience[distance <= min(rows, columns) / 6] = -1
    chosen = []
    for _ in range(QUERIES_DRAWN):
        row, column = np.unravel_index(salience.argmax(), salience.shape)
        chosen.append(start + int(row) * columns + int(column))
        salience[np.hypot(y - row, x - column) < (rows * columns) ** 0.5 / 2.8] = -1
    return chosen
