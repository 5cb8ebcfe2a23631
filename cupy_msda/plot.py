# SPDX-License-Identifier: Apache-2.0
"""Pictures of where queries look."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_hex
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'cupy_msda.plot needs matplotlib: pip install "cupy-msda[plot]"', name=error.name
    ) from error

from cupy_msda.api import ms_deform_attn_backward
from cupy_msda.contract import check, read_table

COLOURS = ("#ffe14d", "#3ddc97", "#4cc3ff", "#ff6fb5")  # of up to four levels
_DARK, _LIGHT = "#16181d", "#e8eaee"
WIDTH, FOOTER = 7.68, 0.55  # of a panel, and of the legend below both, in inches of 100 pixels
AREA = (
    950  # of the mark of a point that has all the weight of its head, in square typographic points
)
MAX_ASPECT = 2  # a higher picture is drawn smaller


def sampling_points(
    image: Any,
    sampling_locations: Any,
    attention_weights: Any,
    queries: Sequence[int],
    spatial_shapes: Any,
    *,
    num_points: Any = None,
    reference_points: Any = None,
) -> Figure:
    """Draw where queries look: their points over the picture, and the heat map of their weights beside it.

    Points are coloured by level and sized by their share of the weight of their head. The heat map is the share
    that each place of the picture has in the output of these queries, over all heads: each point counts for the
    four pixels of its level that it is interpolated from, by bilinear factor and weight. Arrays may be of any
    library, on any device::

        with cupy_msda.record(model) as calls:
            model(pixels)
        call = calls[0]
        figure = cupy_msda.plot.sampling_points(
            image, call.sampling_locations, call.attention_weights, [12, 40], call.spatial_shapes
        )
        figure.savefig("points.png")

    Parameters
    ----------
    image : array, shape (H, W) or (H, W, 3), uint8 or floats from 0 to 1
        The picture that the levels cover: where a batch is padded, with its padding.
    sampling_locations : array, shape (1, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : array, shape (1, Lq, M, L, P)
        Of one image: of a batch, pass ``call.sampling_locations[i : i + 1]`` and so on.
    queries : sequence of ints
        Which of the Lq queries are drawn.
    spatial_shapes : sequence of (H, W) or integer array, shape (L, 2), in pixels
    num_points : sequence of ints, one for each level, or None
        If given, locations are (1, Lq, M, K, 2) and weights (1, Lq, M, K).
    reference_points : array, shape (1, Lq, L or 1, 2 or 4), or None
        If given, a cross marks each query at its (x, y) on the first level, and lines lead to its points.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed: from the import of this module.
    TypeError, ValueError
        An argument violates the contract above.
    """
    picture = _picture(image)
    points = _points(sampling_locations, attention_weights, spatial_shapes, num_points)
    chosen = _indices(queries, points.locations.shape[1])
    centres = None if reference_points is None else _centres(reference_points, points)[chosen]
    points = points.of(chosen)

    height, width = picture.shape[:2]
    panel = WIDTH * min(height / width, MAX_ASPECT)
    figure = Figure((2 * WIDTH, panel + FOOTER), dpi=100, facecolor=_DARK)
    footer = FOOTER / figure.get_figheight()
    beside = [figure.add_axes((left, footer, 0.5, 1 - footer)) for left in (0, 0.5)]
    for axes in beside:
        axes.imshow(picture, interpolation="bicubic")
    colours = _colours(len(points.sizes))
    _draw_points(beside[0], (width, height), points, centres, colours)
    _draw_heat(beside[1], _heat_map(points, (height, width)))
    for axes in beside:
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.axis("off")
    _legend(figure, points.sizes, colours, centres is not None)
    return figure


# --- the arguments ---------------------------------------------------------------------------------


class _Points(NamedTuple):
    """Sampling points of one image, in float64."""

    sizes: Sequence[tuple[int, int]]
    num_points: Any
    locations: np.ndarray  # (1, Lq, M, L, P, 2) or, with num_points, (1, Lq, M, K, 2)
    shares: (
        np.ndarray
    )  # (1, Lq, M, L, P) or (1, Lq, M, K): of the weight of the head, all of a head adding up to 1

    def of(self, queries: list[int]) -> _Points:
        """Those of some queries."""
        locations, shares = self.locations[:, queries], self.shares[:, queries]
        return self._replace(locations=locations, shares=shares)

    def by_level(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Locations (Lq, M * P, 2) and shares (Lq, M * P) of each level."""
        numbers = self.num_points or [self.locations.shape[-2]] * len(self.sizes)
        ends = np.cumsum(numbers)[:-1]
        lq, m = self.locations.shape[1:3]
        locations = np.split(self.locations.reshape(lq, m, -1, 2), ends, axis=2)
        shares = np.split(self.shares.reshape(lq, m, -1), ends, axis=2)
        return [
            (where.reshape(lq, -1, 2), share.reshape(lq, -1))
            for where, share in zip(locations, shares, strict=True)
        ]


def _points(locations: Any, weights: Any, spatial_shapes: Any, num_points: Any) -> _Points:
    """The points, checked."""
    given = {"sampling_locations": _host(locations), "attention_weights": _host(weights)}
    for name, array in given.items():
        if array.shape[:1] != (1,):
            raise ValueError(
                f"{name} must be of one image, shape (1, Lq, ...), got {array.shape}: pass {name}[i : i + 1]"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got infinity or NaN")
    where, weight = given.values()
    sizes = read_table("spatial_shapes", _host(spatial_shapes))
    value = _no_value(sizes, where)
    check(value, sizes, None, where, weight, num_points=num_points)
    magnitude = np.abs(weight)
    of_head = magnitude.sum(axis=tuple(range(3, magnitude.ndim)), keepdims=True)
    shares = magnitude / np.where(of_head > 0, of_head, 1)
    return _Points(sizes, num_points, where, shares)


def _no_value(sizes: Any, locations: np.ndarray) -> np.ndarray:
    """A value of one channel for points of these locations."""
    heads = locations.shape[2] if locations.ndim > 2 else 1
    return np.zeros((1, sum(h * w for h, w in sizes), heads, 1))


def _host(array: Any) -> Any:
    """An array of any library as NumPy's, floats in float64; what is no array as it is."""
    if hasattr(array, "detach"):  # torch, which may be on a device, in bfloat16 and part of a graph
        array = array.detach().cpu()
        array = array.double() if array.is_floating_point() else array
    elif hasattr(array, "get") and hasattr(array, "dtype"):  # CuPy
        array = array.get()
    if not hasattr(array, "dtype"):
        return array
    array = np.asarray(array)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _indices(queries: Any, count: int) -> list[int]:
    """The queries as ints from 0 to Lq."""
    try:
        chosen = [operator.index(query) for query in np.asarray(_host(queries)).tolist()]
    except TypeError as error:
        raise TypeError(f"queries must be a sequence of ints, got {queries!r}") from error
    if not chosen or not all(0 <= query < count for query in chosen):
        raise ValueError(f"queries must be indices below Lq = {count}, one or more, got {chosen}")
    return chosen


def _centres(reference_points: Any, points: _Points) -> np.ndarray:
    """(x, y) of all queries on the first level, shape (Lq, 2)."""
    references, lq = _host(reference_points), points.locations.shape[1]
    numbers = references.shape[2:]
    if references.shape[:2] != (1, lq) or numbers not in product((1, len(points.sizes)), (2, 4)):
        raise ValueError(
            "reference_points must be of one image and all queries, shape (1, Lq, L or 1, 2 or 4) with "
            f"Lq = {lq}, got {references.shape}"
        )
    return references[0, :, 0, :2]  # type: ignore[no-any-return]


def _picture(image: Any) -> np.ndarray:
    """The picture darkened and greyed, so that colours stand out, in RGB from 0 to 1."""
    picture = _host(image)
    if picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)) or 0 in picture.shape:
        raise ValueError(f"image must have shape (H, W) or (H, W, 3), got {picture.shape}")
    if picture.dtype == np.uint8:
        picture = picture / 255
    low, high = picture.min(), picture.max()
    if picture.dtype != np.float64 or not 0 <= low <= high <= 1:
        raise ValueError(
            f"image must hold uint8 or floats from 0 to 1, got {picture.dtype} from {low:.3g} to {high:.3g}"
        )
    if picture.ndim == 2:
        picture = np.repeat(picture[:, :, None], 3, axis=2)
    grey = picture.mean(-1, keepdims=True)
    return 0.7 * (0.45 * picture + 0.55 * grey)  # type: ignore[no-any-return]


# --- the drawing -----------------------------------------------------------------------------------


def _draw_points(
    axes: Axes,
    size: tuple[int, int],
    points: _Points,
    centres: np.ndarray | None,
    colours: Sequence[str],
) -> None:
    """The points of each level, the finest above, and crosses at the queries; `size`: (W, H) of the picture."""
    for colour, (locations, shares) in reversed(list(zip(colours, points.by_level(), strict=True))):
        at = locations * size - 0.5
        if centres is not None:
            from_centre = np.broadcast_to((centres * size - 0.5)[:, None], at.shape)
            rays = np.stack([from_centre, at], axis=2).reshape(-1, 2, 2)
            axes.add_collection(
                LineCollection(list(rays), colors=colour, linewidths=0.6, alpha=0.5)
            )
        axes.scatter(
            at[..., 0].ravel(),
            at[..., 1].ravel(),
            s=AREA * shares.ravel(),
            c=colour,
            alpha=0.9,
            edgecolors=_DARK,
            linewidths=0.5,
            zorder=2,
        )
    for centre in () if centres is None else centres * size - 0.5:
        for length, thickness, colour in ((13, 4.5, _DARK), (11, 2, "white")):
            axes.plot(
                *centre, marker="+", markersize=length, markeredgewidth=thickness, color=colour
            )


def _heat_map(points: _Points, shape: tuple[int, int]) -> np.ndarray:
    """The share of the output that comes from each place, on a picture of this shape: its mean is that of the shares.

    Coefficients of pixels are the gradient of the sum of the output by value. One of a level is spread over its cell.
    """
    grad_output = np.ones((1, points.locations.shape[1], points.locations.shape[2]))
    table = points.sizes, None
    coefficients = ms_deform_attn_backward(
        grad_output,
        _no_value(points.sizes, points.locations),
        *table,
        points.locations,
        points.shares,
        num_points=points.num_points,
    ).value.sum(axis=(0, 2, 3))  # S
    heat, start = np.zeros(shape), 0
    for h, w in points.sizes:
        if h * w > 0:
            level = coefficients[start : start + h * w].reshape(h, w)
            heat += _resized(level * (h * w), shape)
        start += h * w
    return heat / grad_output.size


def _resized(level: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map of cells interpolated at the centres of pixels, bilinearly."""
    for axis, (cells, pixels) in enumerate(zip(level.shape, shape, strict=True)):
        centres = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
        level = np.apply_along_axis(partial(np.interp, centres, np.arange(cells)), axis, level)
    return level


def _draw_heat(axes: Axes, heat: np.ndarray) -> None:
    """The heat over the picture, opaque where it is high; its root, which shows what is low, too."""
    strength = np.sqrt(heat / max(heat.max(), np.finfo(np.float64).tiny))
    axes.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=strength)


def _colours(levels: int) -> Sequence[str]:
    """A colour for each level."""
    if levels <= len(COLOURS):
        return COLOURS[:levels]
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.1, 0.9, levels))]


def _legend(
    figure: Figure, sizes: Sequence[tuple[int, int]], colours: Sequence[str], crosses: bool
) -> None:
    """Query mark, levels and weights, in one line below the pictures."""

    def mark(marker: str, colour: str, size: float, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            linestyle="",
            marker=marker,
            color=colour,
            markersize=size,
            mew=2 * (marker == "+"),
            label=label,
        )

    levels = enumerate(zip(colours, sizes, strict=True))
    handles = [
        *([mark("+", "white", 12, "query")] if crosses else []),
        *(
            mark("o", colour, 11, f"level {level} ({h} x {w})")
            for level, (colour, (h, w)) in levels
        ),
        *(mark("o", "#c8ccd4", (AREA * share) ** 0.5, f"weight {share}") for share in (0.02, 0.1)),
    ]
    figure.legend(
        handles=handles,
        loc="center",
        bbox_to_anchor=(0.5, FOOTER / 2 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        labelcolor=_LIGHT,
        fontsize=9,
        handletextpad=0.3,
        columnspacing=1.1,
    )
