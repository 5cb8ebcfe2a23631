# SPDX-License-Identifier: Apache-2.0
"""Faults for `python -m tests.mutate`: in one file one text in place of another, and the tests that must fail then.

No test that looks for the changed text itself in the sources is among them: it would fail for the wrong reason.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One fault. `survives`: why no test can fail, if that is so."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""


def _fault(name: str, old: str, new: str, *tests: str, survives: str = "") -> Mutation:
    """A mutation that these tests find."""
    return Mutation(name, old, new, tests, survives)


_EMULATOR = "tests/emulator/test_"
_KERNELS, _SAMPLING = f"{_EMULATOR}kernels.py::test_", f"{_EMULATOR}sampling.py::test_"
_BINNED, _TILED = f"{_EMULATOR}binned.py::test_", f"{_EMULATOR}tiled.py::test_"
_ORDERED = f"{_EMULATOR}binned_deterministic.py::test_"
_FIXED, _FUSED = f"{_EMULATOR}fixed_point.py::test_", f"{_EMULATOR}fused.py::test_"
_SCHEDULER, _FINITE = f"{_EMULATOR}tile_scheduler.py::test_", f"{_EMULATOR}non_finite.py::test_"
_ROUND, _EDGES = f"{_EMULATOR}round.py::test_", f"{_EMULATOR}edges.py::test_"
_FUZZ = f"{_EMULATOR}fuzz.py::test_random_outputs"
_LIMITS = "tests/test_plan_limits.py::test_"
_PLANS, _LAUNCH, _CPU = (
    "tests/test_plans.py::test_",
    "tests/test_launch.py::test_",
    "tests/test_cpu.py::test_",
)
_CPU_FUSED, _CPU_PROCESSES = "tests/test_cpu_fused.py::test_", "tests/test_cpu_processes.py::test_"

_EXACT = f"{_KERNELS}points_on_pixels_and_edges_are_exact"
_SPLIT = f"{_KERNELS}split_k_forward[d8-f16]"
_ROW, _ROW_BACK = f"{_KERNELS}specialised_forward[d8]", f"{_KERNELS}specialised_backward[d8]"

# Dropped barriers and lost atomics, for a detector of races to find.
_RACE = "the emulator runs another thread at a barrier only, so that it does not see this race"

MUTATIONS: dict[str, tuple[Mutation, ...]] = {
    "kernels/levels.cuh": (
        _fault(
            "size-of-a-level-unchecked",
            "height <= largest && width <= largest &&",
            "",
            f"{_KERNELS}invalid_tables_under_the_sanitizers[generic]",
        ),
        _fault(
            "negative-start-unchecked",
            "start >= 0 && height <= largest",
            "height <= largest",
            f"{_KERNELS}level_start_that_does_not_fit_gives_nan[-1099511627776-generic]",
        ),
        _fault(
            "end-of-a-level-unchecked",
            "start <= p.spatial_size - height * width",
            "start <= p.spatial_size",
            f"{_KERNELS}level_table_that_does_not_fit_gives_nan[past-the-end-starts-generic]",
        ),
        _fault(
            "a-level-may-end-one-too-late",
            "start <= p.spatial_size - height * width",
            "start <= p.spatial_size - height * width + 1",
            f"{_EDGES}a_level_that_ends_one_position_too_late_gives_nan",
        ),
        _fault(
            "width-of-an-empty-level",
            "if (height == 0 || width == 0) return {0, 1, 0};",
            "",
            f"{_KERNELS}an_empty_level_may_have_any_width[specialised]",
        ),
        _fault(
            "derived-start-of-the-level-before",
            "i < level; ++i)",
            "i < level - 1; ++i)",
            f"{_KERNELS}level_table_on_the_device[derived-starts-generic]",
        ),
        _fault(
            "level-of-a-point",
            "return k / p.level_points;",
            "return k % p.num_levels;",
            f"{_KERNELS}generic[d30]",
        ),
        _fault(
            "first-point-of-the-next-level",
            "while (k >= p.ends[level])",
            "while (k > p.ends[level])",
            f"{_SAMPLING}generic[uneven]",
        ),
        _fault(
            "barrier-after-the-levels",
            "starts, p);\n  __syncthreads();",
            "starts, p);",
            f"{_KERNELS}any_order_of_the_lanes[specialised]",
        ),
    ),
    "kernels/bilinear.cuh": (
        _fault(
            "swapped-corners",
            "{upper * left, upper * cell.right,",
            "{upper * cell.right, upper * left,",
            _ROW,
        ),
        _fault(
            "interior-up-to-the-last-column",
            "static_cast<float>(level.width) - 1.0f, last_row",
            "static_cast<float>(level.width), last_row",
            f"{_EDGES}points_on_the_last_row_or_column_read_nothing_beyond[column-32-torch.float32]",
        ),
        _fault(
            "interior-on-the-last-row",
            "< __float_as_uint(last_row)",
            "<= __float_as_uint(last_row)",
            f"{_EDGES}points_on_the_last_row_or_column_read_nothing_beyond[row-32-torch.float32]",
        ),
        _fault(
            "right-column-beyond-the-level",
            "cell.column + 1 < level.width ? 10u",
            "cell.column + 1 <= level.width ? 10u",
            f"{_KERNELS}padding_is_exact_zero[30-torch.float32]",
            f"{_EXACT}[generic-torch.float32]",
        ),
        _fault(
            "first-row-not-counted",
            "cell.row >= 0 ? 3u",
            "cell.row > 0 ? 3u",
            _ROW,
        ),
        _fault(
            "edge-included",
            "return at.x > -one &&",
            "return at.x >= -one &&",
            f"{_KERNELS}the_edge_is_excluded[generic]",
        ),
        _fault(
            "nearest-beyond-the-last-pixel",
            "static_cast<Real>(size - 1)), index",
            "static_cast<Real>(size)), index",
            f"{_SAMPLING}output[nearest]",
        ),
        _fault(
            "nearest-beyond-the-last-pixel-of-any-level",
            "size - 1ll",
            "size - 0ll",
            f"{_SAMPLING}generic[nearest-f64]",
        ),
        _fault(
            "nearest-pixel-of-another-rounding",
            "{ return __fadd_rn(__fmul_rn(u, size), 0.5f); }",
            "{ return __fmaf_rn(u, size, 0.5f); }",
            f"{_EDGES}the_nearest_pixel_is_rounded_twice",
        ),
        _fault(
            "mask-of-the-lower-row",
            "(i & 2 ? width : 0)",
            "(i & 2 ? 1 : 0)",
            f"{_SAMPLING}output[masked]",
        ),
        _fault(
            "sign-of-the-gradient-in-y",
            "across_upper), lower - upper,",
            "across_upper), upper - lower,",
            _ROW_BACK,
        ),
        _fault(
            "width-for-height",
            "static_cast<Real>(level.height) * weight * unit.y",
            "static_cast<Real>(level.width) * weight * unit.y",
            f"{_KERNELS}specialised_backward[msda-triton]",
        ),
        _fault(
            "nan-for-infinity-in-gradients",
            "if (unit.weight != unit.weight) unit = unit_gradient(cell, dot);",
            "",
            f"{_FINITE}non_finite_inputs[generic]",
        ),
        _fault(
            "zero-times-infinity",
            "if (!FINITE && is_infinite(weight)) {",
            "if (false) {",
            f"{_FINITE}non_finite_inputs[generic]",
        ),
        _fault(
            "rounded-to-nearest-for-down",
            "const float shifted = __fadd_rd(x, ONES);",
            "const float shifted = x + ONES;",
            _ROW,
        ),
        _fault(
            "row-of-a-cell-rounded-to-nearest",
            "row = __fadd_rd(at.y, ONES) - ONES;",
            "row = at.y + ONES - ONES;",
            _ROW,
        ),
    ),
    "kernels/descriptors.cuh": (
        _fault(
            "padded-grid",
            "&& image < static_cast<unsigned>(p.batch);",
            ";",
            f"{_EDGES}a_padded_grid_writes_nothing_outside",
        ),
        _fault("wrong-part-of-split-k", "part = group % SPLIT_K;", "part = 0;", _SPLIT),
        _fault(
            "query-of-a-split-group",
            "+ group / SPLIT_K;",
            "+ group;",
            _SPLIT,
        ),
        _fault(
            "wrong-stride-of-a-pixel-row",
            "static_cast<int>(point.cell.corners), width * PIXEL)",
            "static_cast<int>(point.cell.corners), (width + 1) * PIXEL)",
            _ROW,
        ),
        _fault(
            "stride-of-a-wider-accumulator",
            "return corner & 1 ? row + PIXEL * WIDER : row;",
            "return corner & 1 ? row + PIXEL : row;",
            f"{_KERNELS}specialised_backward[d8-f16]",
        ),
        _fault(
            "infinite-weight-in-fixed-point",
            "weight = is_finite(weight) ? weight * factor : 0.0f;",
            "weight = weight * factor;",
            f"{_FIXED}non_finite_inputs_show[weights-inf-specialised]",
            survives="the poison that follows every such addend replaces whatever was added",
        ),
        _fault(
            "stale-descriptor",
            "  descriptors.places[index] = make_int2(0, 0);\n",
            "",
            f"{_KERNELS}specialised_backward[d8]",
            f"{_BINNED}gradient_of_value[d8]",
        ),
        _fault(
            "image-of-a-row",
            "* M + head) * D;",
            "+ head) * D;",
            f"{_KERNELS}specialised_forward[mask2former-512]",
        ),
    ),
    "kernels/point.cuh": (
        _fault(
            "level-of-a-point-of-uneven-levels",
            "k >= end ? 1 : 0",
            "k > end ? 1 : 0",
            f"{_SAMPLING}output[uneven]",
        ),
        _fault(
            "first-point-of-a-level",
            "sum += i++ < level",
            "sum += i++ <= level",
            f"{_SAMPLING}deterministic_gradients_of_value[all]",
        ),
        _fault(
            "row-of-a-point-rounded-down",
            "(0x7fffffffu / points) + 1u",
            "(0x7fffffffu / points)",
            f"{_SAMPLING}deterministic_gradients_of_value[all]",
        ),
        _fault(
            "mask-of-the-first-image",
            "S::MASKED ? mask + position : mask",
            "mask",
            f"{_SAMPLING}output[masked]",
        ),
        _fault(
            "weight-of-a-point-outside",
            "if (located.cell.corners == 0u) located.weight = 0;",
            "",
            f"{_KERNELS}points_that_do_not_count[generic]",
        ),
        _fault(
            "bad-level-without-nan",
            "if (!INTERIOR && point.level.start < 0) located.weight",
            "if (false) located.weight",
            f"{_KERNELS}level_start_that_does_not_fit_gives_nan[-1-generic]",
        ),
        _fault(
            "nan-gradient-of-a-bad-level",
            "if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};",
            "",
            f"{_KERNELS}level_table_that_does_not_fit_gives_nan[past-the-end-starts-generic]",
        ),
        _fault(
            "gradient-of-a-logit-without-the-mean",
            "(of_lane.gradient[COUNT - 1 - i] - sum)",
            "of_lane.gradient[COUNT - 1 - i]",
            f"{_FUSED}gradients[points]",
        ),
        _fault(
            "gradients-of-logits-in-reverse",
            "sum += weight[i] * of_lane.gradient[COUNT - 1 - i];",
            "sum += weight[i] * of_lane.gradient[i];",
            f"{_FUSED}gradients[boxes]",
            f"{_FUSED}gradients[uneven-boxes]",
        ),
    ),
    "kernels/fused.cuh": (
        _fault(
            "reference-points-of-one-image",
            "if (query >= static_cast<unsigned>(p.reference_rows)) query %= p.reference_rows;",
            "",
            f"{_FUSED}output[boxes-of-one-image]",
            f"{_FUSED}under_the_sanitizers",
        ),
        _fault(
            "softmax-without-the-maximum",
            "sum += exp_not_positive(own[i] - largest);",
            "sum += exp_not_positive(own[i]);",
            f"{_FUSED}output[points]",
        ),
        _fault(
            "logits-beyond-the-row",
            "(i + 1) * G <= K || k < K ? widen(logits[k]) : nothing",
            "widen(logits[k])",
            f"{_FUSED}output[boxes]",
            f"{_FUSED}output[uneven]",
        ),
        _fault(
            "width-of-a-box-for-its-height",
            "reference[3] * scale",
            "reference[2] * scale",
            f"{_FUSED}output[boxes]",
        ),
        _fault(
            "half-a-pixel",
            "(at.offset.v - 0.5f)",
            "at.offset.v",
            f"{_FUSED}output[points]",
        ),
    ),
    "kernels/reference_gradient.cu": (
        _fault(
            "all-levels-for-each",
            "if (S::BY_LEVEL && level != own) continue;",
            "",
            f"{_FUSED}gradients[points]",
        ),
        _fault(
            "scale-of-a-box",
            "sum[3] += gradient[1] * (offset[1] * scale);",
            "sum[3] += gradient[1] * offset[1];",
            f"{_FUSED}gradients[boxes]",
        ),
        _fault(
            "images-that-share-a-reference",
            "row < all; row += rows)",
            "row < rows; row += rows)",
            f"{_FUSED}gradients[boxes-of-one-image]",
        ),
    ),
    "kernels/fixed_point.cuh": (
        _fault(
            "margin-of-the-addends",
            "  addends += addends >> 10;\n",
            "",
            f"{_ORDERED}a_crowd_of_one_sign_reaches_no_limit",
            f"{_FIXED}the_largest_sum_of_the_most_addends_does_not_wrap[1-255-1-torch.float32]",
            survives="no margin is needed: rounding is monotonic, so that a float sum of n addends, each at most "
            "2^bits, is at most n * 2^bits, which a float holds",
        ),
        _fault(
            "one-bit-more-for-sums",
            "constexpr int VALID_BITS = 62;",
            "constexpr int VALID_BITS = 63;",
            f"{_FIXED}the_largest_sum_of_the_most_addends_does_not_wrap",
        ),
        _fault(
            "addends-of-one-point",
            "static_cast<long long>(p.num_queries) * p.row_points;",
            "static_cast<long long>(p.num_queries);",
            f"{_FIXED}many_addends_of_one_sign[generic]",
            f"{_FIXED}the_largest_sum_of_the_most_addends_does_not_wrap",
        ),
        _fault(
            "poison-not-read",
            "if (*accumulator + (1ull << VALID_BITS) >= NON_FINITE)",
            "if (false)",
            f"{_FIXED}non_finite_inputs_show[grad_output-nan-generic]",
        ),
        _fault(
            "poison-not-written",
            "    atomicAdd(to, to_fixed(coefficient, grad));\n  else\n    atomicExch(to, NON_FINITE);",
            "    atomicAdd(to, to_fixed(coefficient, grad));",
            f"{_FIXED}non_finite_inputs_show[grad_output-nan-generic]",
        ),
        _fault("bias", "0x56400000u - 301u", "0x56400000u - 300u", f"{_FIXED}gradients[generic]"),
        _fault(
            "scale-of-the-second-limb",
            "fma(coefficient, grad, -high) * power(double{}, scale.bits);",
            "fma(coefficient, grad, -high) * power(double{}, scale.bits - 1);",
            f"{_FIXED}gradients[float64]",
        ),
        _fault(
            "infinity-decides-the-unit",
            "return field == 0xff ? 0 : field;",
            "return field;",
            f"{_FINITE}fixed_point_has_nan_where_the_equations_are_not_finite[generic]",
            f"{_FIXED}non_finite_inputs_show[grad_output-inf-generic]",
        ),
    ),
    "kernels/fixed_point.cu": (
        _fault(
            "largest-weight-lost",
            "  keep_largest(fields + 1, of_weights);\n",
            "",
            f"{_FIXED}any_magnitude_of_gradients_and_weights[(8, 8)-generic]",
        ),
        _fault(
            "points-outside-decide-the-unit",
            "if (arrays.template contributes<Real>(at, read_level(level_of(p, k), sizes, starts, p))) of_weights",
            "of_weights",
            f"{_FIXED}points_outside_do_not_decide_the_unit[generic]",
        ),
        _fault(
            "largest-of-half-the-lanes",
            "for (int offset = WARP / 2; offset > 0; offset /= 2) number",
            "for (int offset = WARP / 4; offset > 0; offset /= 2) number",
            f"{_EDGES}the_unit_is_that_of_the_loudest[lane]",
        ),
        _fault(
            "last-write-for-the-largest",
            "atomicMax(to, number)",
            "*to = number",
            f"{_EDGES}the_unit_is_that_of_the_loudest[query]",
        ),
    ),
    "kernels/scalar.cuh": (
        _fault(
            "ties-away-from-even",
            "(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16",
            "(bits + 0x8000u) >> 16",
            f"{_ROUND}ties_infinities_nan_and_subnormals",
        ),
        _fault(
            "float16-overflows-early",
            "magnitude >= 0x477ff000u",
            "magnitude >= 0x477fe000u",
            f"{_ROUND}ties_infinities_nan_and_subnormals",
        ),
        _fault(
            "subnormal-float16",
            "magnitude >= 0x38800000u",
            "magnitude >= 0x38000000u",
            f"{_ROUND}ties_infinities_nan_and_subnormals",
        ),
        _fault(
            "infinite-float16",
            "if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);",
            "",
            f"{_KERNELS}halves_widen_exactly[torch.float16]",
        ),
        _fault(
            "low-half-of-a-pair-of-bfloat16",
            "__uint_as_float(pairs.words[i] & 0xffff0000u)",
            "__uint_as_float(pairs.words[i])",
            f"{_EDGES}vectors_of_halves_widen_exactly",
        ),
        _fault("fourth-channel", "atomicAdd(to + 3, d);", "atomicAdd(to + 3, c);", _ROW_BACK),
        _fault(
            "second-of-a-pair",
            "narrow_to<T>(from[2 * i + 1]).bits",
            "narrow_to<T>(from[2 * i]).bits",
            f"{_KERNELS}specialised_forward[d8-f16]",
        ),
    ),
    "kernels/forward.cu": (
        _fault(
            "right-corner-of-another-pixel",
            "return corner & 1 ? left + PIXEL : left;",
            "return corner & 1 ? left + UNIT : left;",
            _ROW,
        ),
        _fault(
            "lost-stage",
            "end = begin + PART - TAIL;\n  unsigned k",
            "end = begin + PART - TAIL - G;\n  unsigned k",
            f"{_KERNELS}specialised_forward[bevformer-sca]",
            f"{_KERNELS}specialised_forward[dino5-encoder]",
        ),
        _fault(
            "lanes-without-a-point-read-on",
            "k = end + min(member, TAIL - 1);",
            "k = end + member;",
            f"{_SAMPLING}under_the_sanitizers[uneven-masked]",
        ),
        _fault(
            "sum-of-half-the-parts",
            "for (int offset = G; offset < G * SPLIT_K; offset *= 2)",
            "for (int offset = 2 * G; offset < G * SPLIT_K; offset *= 2)",
            _SPLIT,
        ),
        _fault(
            "idle-groups-beyond-the-last-query",
            "image_head * queries + min(index, queries - 1)",
            "image_head * queries + index",
            f"{_SCHEDULER}query_tiles_by_the_callers_grids_and_under_the_sanitizers",
        ),
        _fault(
            "padded-grid-of-query-tiles",
            "  if (image_head >= static_cast<unsigned>(p.batch * M)) return;\n",
            "",
            f"{_EDGES}a_padded_grid_writes_nothing_outside",
        ),
        _fault(
            "idle-rows-elsewhere",
            "  if (!row.active) row.image = row.query = 0;  // computes along with its warp, and stores nothing\n",
            "",
            f"{_KERNELS}under_the_sanitizers[specialised]",
        ),
        _fault(
            "masked-points-as-interior",
            "MAY_MISS = S::NEAREST || S::MASKED;",
            "MAY_MISS = S::NEAREST;",
            f"{_SAMPLING}output[masked]",
        ),
        _fault(
            "descriptors-read-before-they-are-written",
            "unsigned first) {\n  __syncwarp();",
            "unsigned first) {",
            f"{_KERNELS}any_order_of_the_lanes",
        ),
        _fault(
            "descriptors-written-while-they-are-read",
            "places[padded(j)]);\n  __syncwarp();",
            "places[padded(j)]);",
            f"{_KERNELS}any_order_of_the_lanes",
            survives=_RACE,
        ),
    ),
    "kernels/backward.cu": (
        _fault(
            "half-of-the-exchange",
            "give = upper ? low.at[i] : high.at[i];",
            "give = upper ? high.at[i] : low.at[i];",
            _ROW_BACK,
        ),
        _fault(
            "stride-of-a-lanes-channels",
            "atomicAdd(to + c * T::G, to_fixed(coefficient, walk.units[c]));",
            "atomicAdd(to + c, to_fixed(coefficient, walk.units[c]));",
            f"{_FIXED}gradients[specialised]",
        ),
        _fault(
            "non-finite-gradients-of-output",
            "(weights >> j | walk.non_finite >> c) & 1u",
            "(weights >> j) & 1u",
            f"{_FIXED}non_finite_inputs_show[grad_output-nan-specialised]",
        ),
        _fault(
            "weights-of-another-group",
            "__ballot_sync(ALL_LANES, non_finite) >> walk.first_lane",
            "__ballot_sync(ALL_LANES, non_finite)",
            f"{_FIXED}non_finite_inputs_show[weights-nan-specialised]",
        ),
        _fault(
            "idle-rows-as-interior",
            "|| (active && member >= COUNT));",
            "|| member >= COUNT || !active);",
            f"{_EDGES}idle_rows_read_nothing_outside",
        ),
        _fault(
            "lost-stage-of-points",
            "first + G <= end; first += G)",
            "first + G < end; first += G)",
            f"{_KERNELS}specialised_backward[msda-triton]",
        ),
        _fault(
            "lost-tail-of-points",
            "active, end - TAIL, points, gradients);",
            "active, begin, points, gradients);",
            f"{_KERNELS}specialised_backward[d8]",
        ),
        _fault(
            "plane-for-image",
            "points.of_image(plane / M);",
            "points.of_image(plane);",
            f"{_SAMPLING}gradients[masked]",
        ),
        _fault(
            "descriptors-of-gradients-read-early",
            "active && member >= COUNT));\n  __syncwarp();",
            "active && member >= COUNT));",
            f"{_KERNELS}any_order_of_the_lanes[specialised]",
            survives=_RACE,
        ),
        _fault(
            "descriptors-of-gradients-written-early",
            "  __syncwarp();\n  if constexpr (T::S::FUSED && T::POINTS) {\n    kept",
            "  if constexpr (T::S::FUSED && T::POINTS) {\n    kept",
            f"{_KERNELS}any_order_of_the_lanes[specialised]",
            survives=_RACE,
        ),
    ),
    "kernels/generic.cu": (
        _fault(
            "padded-grid-of-any-shape",
            "active = at < p.num_queries && image < p.batch;",
            "active = at < p.num_queries;",
            f"{_EDGES}a_padded_grid_writes_nothing_outside",
        ),
        _fault(
            "points-of-the-next-row",
            "const int count = min(WARP, row_points - first);",
            "const int count = WARP;",
            f"{_KERNELS}generic[d30]",
        ),
        _fault(
            "channels-beyond-the-last",
            "      if (channel >= p.head_dim) return;\n",
            "",
            f"{_KERNELS}under_the_sanitizers[generic]",
        ),
        _fault(
            "dot-product-of-half-the-lanes",
            "for (int offset = WARP / 2; offset > 0; offset /= 2)\n    for",
            "for (int offset = WARP / 4; offset > 0; offset /= 2)\n    for",
            f"{_KERNELS}generic[d30]",
        ),
        _fault(
            "pitch-without-channels",
            "static_cast<long long>(level.width) * p.num_heads * p.head_dim;",
            "static_cast<long long>(level.width) * p.num_heads;",
            f"{_KERNELS}generic[d30]",
        ),
        _fault(
            "missing-cast-of-a-position",
            "static_cast<long long>(row.image) * p.spatial_size + pixel;",
            "row.image * p.spatial_size + pixel;",
            f"{_KERNELS}generic",
            survives="needs more than 2^31 positions",
        ),
        _fault(
            "any-descriptors-read-early",
            "points, factor);\n    __syncwarp();",
            "points, factor);",
            f"{_KERNELS}any_order_of_the_lanes[generic]",
        ),
        _fault(
            "any-descriptors-written-early",
            "visit(own[j], j);\n    __syncwarp();",
            "visit(own[j], j);",
            f"{_EDGES}a_stage_of_points_ends_before_the_next_begins",
        ),
    ),
    "kernels/tile_scheduler.cuh": (
        _fault(
            "rows-beyond-a-range",
            "min(first + lane / ROWS * STEP + lane % ROWS, end - 1)",
            "first + lane / ROWS * STEP + lane % ROWS",
            _FUZZ,
        ),
        _fault(
            "height-of-the-last-band",
            "min(HEIGHT, grid.height - band * HEIGHT)",
            "HEIGHT",
            f"{_SCHEDULER}order_is_tile_by_tile",
        ),
        _fault(
            "grids-that-do-not-hold-the-queries",
            "queries == p.num_queries ? count : 0",
            "count",
            f"{_SCHEDULER}queries_that_are_no_grid_are_taken_as_they_come",
        ),
        _fault(
            "cost-of-coarse-levels",
            "(rest - coarse) / COARSE_COST;",
            "(rest - coarse) / FINE_COST;",
            f"{_SCHEDULER}persistent_blocks_visit_every_row_once",
            f"{_SCHEDULER}ranges_of_persistent_blocks_cost_the_same",
        ),
        _fault(
            "rows-of-other-warps",
            "from += ROWS, first += STEP",
            "from += ROWS, first += ROWS",
            f"{_SCHEDULER}persistent_blocks_visit_every_row_once",
        ),
        _fault(
            "barrier-after-the-scheduler",
            "fine_size = 0;\n  }\n  __syncthreads();",
            "fine_size = 0;\n  }",
            f"{_SCHEDULER}persistent_forward_is_bitwise_identical[f32]",
            f"{_SCHEDULER}order_is_tile_by_tile",
        ),
        _fault(
            "barrier-after-the-range",
            "blockIdx.x + threadIdx.x);\n  __syncthreads();",
            "blockIdx.x + threadIdx.x);",
            f"{_SCHEDULER}persistent_blocks_visit_every_row_once",
        ),
    ),
    "kernels/backward_value_binned.cu": (
        _fault(
            "missing-flush",
            "  cell.move({0, 0});\n",
            "",
            f"{_BINNED}walks_from_cell_to_cell[one-cell]",
        ),
        _fault(
            "missing-flush-of-a-column",
            "    flush(2);\n",
            "",
            f"{_BINNED}walks_from_cell_to_cell[corners]",
        ),
        _fault(
            "neighbours-of-another-pitch",
            "next.y == place.y && ",
            "",
            f"{_BINNED}a_cell_of_another_level_at_the_same_pixel_is_another",
        ),
        _fault(
            "neighbours-beyond-the-edge",
            " && (place.x >> 1 & 5) == (next.x & 5)",
            "",
            f"{_BINNED}walks_from_cell_to_cell[end-of-a-row-and-the-next]",
        ),
        _fault(
            "cells-of-another-pitch",
            "place.x != cell.place.x || place.y != cell.place.y",
            "place.x != cell.place.x",
            f"{_BINNED}a_cell_of_another_level_at_the_same_pixel_is_another",
        ),
        _fault(
            "prefix-sum-of-warps",
            "if (i < warp) begin += warp_sums[i];",
            "if (i <= warp) begin += warp_sums[i];",
            f"{_BINNED}gradient_of_value[d8]",
        ),
        _fault(
            "lost-update-of-a-counter",
            "return get(atomicAdd(&words[bin / 2], points << bin % 2 * 16), bin);",
            "words[bin / 2] += points << bin % 2 * 16;\n    return get(words[bin / 2], bin) - points;",
            f"{_BINNED}gradient_of_value[d8]",
            survives=_RACE,
        ),
        _fault(
            "rows-beyond-the-batch",
            "    if (row == NONE) continue;\n",
            "",
            f"{_SCHEDULER}under_the_sanitizers[several-images]",
        ),
        _fault(
            "padded-grid-of-batches",
            "  if (image_head >= static_cast<unsigned>(p.batch * M)) return;\n",
            "",
            f"{_EDGES}a_padded_grid_writes_nothing_outside",
        ),
        _fault(
            "bins-cleared-late",
            "shared.bins.clear();\n  __syncthreads();",
            "shared.bins.clear();",
            f"{_ORDERED}any_order_of_blocks_and_lanes[d8]",
        ),
        _fault(
            "list-read-early",
            "= i * BLOCK + threadIdx.x;\n  __syncthreads();",
            "= i * BLOCK + threadIdx.x;",
            f"{_ORDERED}any_order_of_blocks_and_lanes[d8]",
        ),
        _fault(
            "points-of-a-bin-in-any-order",
            "static_cast<unsigned short>(shared.bins.begin(bin) + before)",
            "static_cast<unsigned short>(shared.bins.begin(bin))",
            f"{_ORDERED}any_order_of_blocks_and_lanes[d8]",
        ),
    ),
    "kernels/backward_value_tiled.cu": (
        _fault(
            "last-position-of-a-tile",
            "static_cast<unsigned>(upper + 1) <= TILE",
            "static_cast<unsigned>(upper + 1) < TILE",
            f"{_TILED}tiles[six-tiles]",
        ),
        _fault(
            "order-of-the-warps",
            "if (i < warp) next += counts[i];",
            "if (i <= warp) next += counts[i];",
            f"{_TILED}tiles[detr-decoder]",
        ),
        _fault(
            "end-of-the-queue",
            "queue[(tail + count_below(queued, lane)) % QUEUE]",
            "queue[tail + count_below(queued, lane)]",
            f"{_TILED}tiles[rounds]",
            f"{_TILED}under_the_sanitizers[rounds-of-odd-points]",
        ),
        _fault(
            "end-of-the-gradient",
            "    if (position + i >= p.spatial_size) break;\n",
            "",
            f"{_TILED}under_the_sanitizers[dino-decoder-f16]",
        ),
        _fault(
            "column-beside-the-warps",
            "if (right > 1) return false;",
            "if (right > 2) return false;",
            f"{_TILED}tiles[detr-decoder]",
            survives="a warp's queue holds its own columns; of others there are points outside, which have no corner",
        ),
        _fault(
            "tile-stored-early",
            "  __syncthreads();\n  store_tile",
            "  store_tile",
            f"{_TILED}tiles[detr-decoder]",
        ),
        _fault(
            "lost-tail-of-the-queue",
            "hit - lane < hits || head < tail;",
            "hit - lane < hits;",
            f"{_TILED}tiles[detr-decoder]",
        ),
        _fault(
            "rows-of-one-parity",
            "pair.of_row[(cell.row + down) & 1]",
            "pair.of_row[down]",
            f"{_TILED}tiles[detr-decoder]",
        ),
    ),
    "kernels/round.cu": (
        _fault(
            "lost-tail",
            "if (thread < tail)",
            "if (thread + 1 < tail)",
            f"{_ROUND}any_number_of_elements",
        ),
        _fault(
            "elements-beyond-the-last",
            "i < count - tail;",
            "i < count;",
            f"{_ROUND}no_access_outside_the_arrays",
        ),
    ),
    "cupy_msda/cuda/plans.py": (
        _fault(
            "one-position-too-many",
            "problem.spatial_size >= 2**22",
            "problem.spatial_size > 2**22",
            f"{_PLANS}generic_kernels_take_what_the_specialised_cannot",
        ),
        _fault(
            "one-byte-too-many",
            "* pixel_bytes >= 2**31",
            "* pixel_bytes > 2**31",
            f"{_PLANS}generic_kernels_take_what_the_specialised_cannot",
        ),
        _fault(
            "images-lost-in-y-and-z",
            "return x, -(-image_heads // z), z",
            "return x, image_heads // z, z",
            f"{_PLANS}y_and_z_cover_all_images_and_heads",
        ),
        _fault(
            "unequal-parts",
            " and points % (split_k * 2) == 0",
            "",
            f"{_PLANS}parts_of_uneven_points_are_equal",
        ),
        _fault(
            "rows-beyond-32-bits",
            '!= "order" and rows < 2**31',
            '!= "order" and rows <= 2**31',
            f"{_PLANS}persistent_kernels_number_rows_in_32_bits",
        ),
        _fault(
            "positions-beyond-32-bits",
            "most = max(problem.num_queries, problem.spatial_size)",
            "most = problem.num_queries",
            f"{_LIMITS}persistent_kernels_number_positions_in_32_bits",
        ),
        _fault(
            "bytes-of-an-accumulator",
            'return "accumulator", 4 * problem.value_elements',
            'return "accumulator", 2 * problem.value_elements',
            f"{_LIMITS}a_16_bit_gradient_is_accumulated_in_float32",
        ),
        _fault(
            "words-of-the-units",
            "problem.value_elements + problem.batch * problem.num_heads",
            "problem.value_elements",
            f"{_PLANS}words_of_the_fixed_point_accumulators",
        ),
        _fault(
            "lost-fill",
            "(fill, *launches), workspace",
            "launches, workspace",
            f"{_PLANS}backward[float32]",
        ),
        _fault(
            "one-point-too-many-for-the-list",
            "problem.row_points <= MAX_BINNED_POINTS",
            "problem.row_points <= MAX_BINNED_POINTS + 1",
            f"{_LIMITS}a_list_of_points_has_room_for_32_of_a_row",
        ),
        _fault(
            "one-level-too-many-for-the-bins",
            "problem.num_levels <= MAX_BINNED_LEVELS",
            "problem.num_levels <= MAX_BINNED_LEVELS + 1",
            f"{_PLANS}binned_points_have_room_for_few_levels_and_points",
        ),
        _fault(
            "starts-of-the-device-at-zero",
            "    levels[:, 2] = DERIVED_START\n",
            "",
            f"{_PLANS}params_say_which_starts_are_derived",
        ),
        _fault(
            "table-of-the-host-twice",
            '"sizes" if table.sizes is None else None',
            '"sizes" if table.sizes is not None else None',
            f"{_PLANS}a_null_pointer_stands_for_what_the_host_knows_of_the_table",
        ),
        _fault(
            "one-point-too-many-for-tiles",
            "max(problem.level_points) <= MAX_POINTS_TILED",
            "max(problem.level_points) <= MAX_POINTS_TILED + 1",
            f"{_LIMITS}tiles_take_8192_points_of_a_level",
        ),
        _fault(
            "points-of-the-first-level",
            "max(problem.level_points) <=",
            "problem.level_points[0] <=",
            f"{_PLANS}tiles_take_few_points_of_the_level_that_has_most",
        ),
        _fault(
            "reference-points-of-every-image",
            "problem.references.batch * problem.num_queries if",
            "problem.batch * problem.num_queries if",
            f"{_PLANS}params_of_fused_kernels_hold_the_scale_and_who_has_reference_points",
        ),
        _fault(
            "a-warp-to-a-row-on-persistent-blocks",
            "may_persist = group < WARP and",
            "may_persist = group <= WARP and",
            f"{_PLANS}a_persistent_backward_leaves_room_for_registers",
        ),
        _fault(
            "fused-points-beyond-32-bits",
            "problem.point_elements >= 2**31",
            "problem.point_elements > 2**31",
            f"{_PLANS}what_is_composed",
        ),
        _fault(
            "units-found-after-they-are-used",
            "(before, *launches, after)",
            "(*launches, before, after)",
            f"{_PLANS}deterministic_backward_in_fixed_point",
        ),
        _fault(
            "deterministic-by-atomics",
            "return tuple(first if deterministic else first + second + tiled[:1])",
            "return tuple(first + second + tiled[:1])",
            "tests/test_tuned.py::test_deterministic_calls_take_an_entry_that_keeps_their_bits",
        ),
        _fault(
            "ends-for-points",
            'params["ends"][: len(points)] = list(accumulate(points))',
            'params["ends"][: len(points)] = points',
            f"{_PLANS}params_of_generic_kernels_hold_the_points_of_the_levels",
        ),
        _fault(
            "grids-not-counted",
            'params["num_grids"] = len(case.grids)',
            'params["num_grids"] = 1',
            f"{_PLANS}params_of_persistent_and_binned_kernels_hold_given_grids",
        ),
        _fault(
            "rows-of-a-small-block",
            "rows = candidate.threads // (group * candidate.number)",
            "rows = BLOCK // (group * candidate.number)",
            f"{_KERNELS}split_k_forward[detr-decoder]",
        ),
        _fault(
            "no-block-for-few-rows",
            "min(blocks, -(-rows // (BLOCK // WARP)))",
            "min(blocks, rows // (BLOCK // WARP))",
            f"{_LIMITS}passes_over_few_rows_have_a_block",
        ),
        _fault(
            "no-mask",
            '"mask" if problem.has_mask else None',
            "None",
            f"{_PLANS}a_mask_comes_after_the_weights",
        ),
    ),
    "cupy_msda/cuda/launch.py": (
        _fault(
            "misaligned-arrays",
            "return array if array.data.ptr % ALIGNMENT == 0 else array.copy()",
            "return array",
            f"{_LAUNCH}arrays_that_are_not_contiguous_or_not_aligned",
        ),
        _fault(
            "arrays-with-gaps",
            "array = cupy.ascontiguousarray(array, dtype)",
            "array = array if dtype is None else array.astype(dtype)",
            f"{_LAUNCH}arrays_that_are_not_contiguous_or_not_aligned",
            f"{_LAUNCH}masks_of_any_layout",
        ),
        _fault(
            "int32-for-int64",
            '_aligned(array, "int64")',
            "_aligned(array)",
            f"{_LAUNCH}level_tables_on_the_device",
        ),
        _fault(
            "arguments-of-the-first-launch",
            "table = arguments.tables.get(key) or",
            "table = next(iter(arguments.tables.values()), 0) or",
            f"{_LAUNCH}arrays_reach_the_kernels_and_results_come_back[driver-half]",
        ),
        _fault(
            "fills-on-the-null-stream",
            "memset(arguments.words[data], 0, num_bytes, stream)",
            "memset(arguments.words[data], 0, num_bytes, 0)",
            f"{_LAUNCH}fills_and_launches_go_to_cupys_current_stream",
        ),
        _fault(
            "launches-on-the-null-stream",
            "launch_kernel(*where, stream, table, 0)",
            "launch_kernel(*where, 0, table, 0)",
            f"{_LAUNCH}a_plan_runs_on_the_stream_that_it_is_given",
        ),
        _fault(
            "raw-kernels-on-the-null-stream",
            "with streams.from_external(_External(stream)) if stream else streams.null:",
            "with streams.null:",
            f"{_LAUNCH}a_plan_runs_on_the_stream_that_it_is_given",
        ),
        _fault(
            "another-current-device",
            "bound.device not in arguments.devices or bound.cuda.runtime.getDevice() != bound.device",
            "bound.device not in arguments.devices",
            f"{_LAUNCH}a_guard_is_entered_while_another_device_is_current",
        ),
        _fault(
            "first-call-of-a-thread",
            "bound.device not in arguments.devices or bound",
            "bound",
            f"{_LAUNCH}a_guard_is_entered_on_a_threads_first_launch_and_never_on_the_current_device",
        ),
        _fault(
            "stale-pointer-of-a-mask",
            'arrays = arrays | {"mask": None if mask is None else _aligned(mask)}',
            'arrays = arrays if mask is None else arrays | {"mask": _aligned(mask)}',
            f"{_LAUNCH}masks_of_any_layout",
            survives="a plan without a mask names the null slot, whatever lies in that of the mask",
        ),
        _fault(
            "one-thread-for-all",
            "_local = threading.local()",
            "_local = type('_Local', (), {})()",
            f"{_LAUNCH}a_thread_has_a_table_of_its_own",
        ),
        _fault(
            "fill-of-another-array",
            "data, num_bytes = dlpack.WORDS * SLOT[fill.array], fill.num_bytes",
            'data, num_bytes = dlpack.WORDS * SLOT["grad_value"], fill.num_bytes',
            f"{_LAUNCH}arrays_reach_the_kernels_and_results_come_back[driver-half]",
        ),
        _fault(
            "half-of-the-gradients-compiled-ahead",
            "((True, True), (True, False), (False, True)) if with_backward",
            "((True, True), (False, True)) if with_backward",
            "tests/test_warmup.py::test_calls_on_tensors_find_their_kernels_compiled",
        ),
    ),
    "cupy_msda/cpu/kernels.py": (
        _fault(
            "last-edge-included",
            "(y > real(-1)) & (x < width)",
            "(y > real(-1)) & (x <= width)",
            f"{_CPU}points_at_the_edges_of_the_level",
        ),
        _fault(
            "right-column-beyond-the-level",
            "near, far = column >= 0, column + 1 < columns\n                cell = row",
            "near, far = column >= 0, column + 1 <= columns\n                cell = row",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "first-row-not-counted",
            "if row >= 0:",
            "if row > 0:",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "mask-of-the-upper-row",
            "                position += columns\n",
            "",
            f"{_CPU}every_combination_of_rules",
            f"{_CPU}a_masked_position_is_a_zero_that_takes_no_gradient",
        ),
        _fault(
            "nearest-beyond-the-last-column",
            "width)), columns - 1)",
            "width)), columns)",
            f"{_CPU}nearest_at_the_edges_of_a_pixel_and_of_the_level",
        ),
        _fault(
            "levels-that-share-one-position",
            "if any(end > start for",
            "if any(end > start + 1 for",
            f"{_CPU}levels_that_share_one_position",
        ),
        _fault(
            "scratch-not-cleared",
            "                packed_by_value[: positions * head_dim] = 0\n",
            "",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "infinite-weight-of-a-masked-point",
            "if not touched:",
            "if False:",
            f"{_CPU}a_point_on_masked_positions_alone_is_outside[bilinear]",
        ),
        _fault(
            "sign-of-the-gradient-in-y",
            "by_y = height * weight * (left * (dots[2] - dots[0])",
            "by_y = height * weight * (left * (dots[0] - dots[2])",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "rows-of-the-next-image",
            "end = min(begin + stretch, rows) + image * rows",
            "end = begin + stretch + image * rows",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "head-of-the-first-row",
            "head = after = begin % num_heads",
            "head = after = 0",
            f"{_CPU}results_are_bitwise_identical_for_any_number_of_threads",
        ),
        _fault(
            "order-of-a-transpose",
            "([0, 2, 4, 6], [1, 3, 5, 7])",
            "([1, 3, 5, 7], [0, 3, 4, 6])",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "points-of-the-first-level",
            "            at += columns * pitch\n",
            "            at += pitch\n",
            f"{_CPU}shapes_of_models",
        ),
        _fault(
            "empty-levels",
            "if h * w else (-1, -1, 0, points)",
            "if True else (-1, -1, 0, points)",
            f"{_CPU}nearest_on_an_empty_level_contributes_nothing",
            f"{_CPU_FUSED}empty_levels",
        ),
        _fault(
            "divisor-of-no-channels",
            "if head_dim % lanes == 0)",
            "if True)",
            f"{_CPU}any_head_dim",
        ),
        _fault(
            "logits-beyond-the-range-of-a-power",
            "return real(0) if x < lowest else power",
            "return power",
            f"{_CPU_FUSED}logits_of_any_size",
        ),
        _fault(
            "low-part-of-a-logarithm",
            "r = x - octaves * high - octaves * low",
            "r = x - octaves * high",
            f"{_CPU_FUSED}logits_of_any_size",
        ),
        _fault(
            "gradient-of-a-logit-without-the-mean",
            "change = _get(by_weights, point + i) - mean",
            "change = _get(by_weights, point + i)",
            f"{_CPU_FUSED}the_rules_and_dtypes_of_models",
        ),
        _fault(
            "sums-of-the-query-before",
            "                sums[:] = 0\n",
            "",
            f"{_CPU_FUSED}the_rules_and_dtypes_of_models",
        ),
        _fault(
            "reference-points-of-one-image",
            "query = image % images * (rows",
            "query = image * (rows",
            f"{_CPU_FUSED}reference_points_of_any_shape",
        ),
        _fault(
            "no-wait-for-helpers",
            "while threads > 1 and not _settled(state):",
            "while False:",
            f"{_CPU}a_call_ends_when_its_helpers_have_left",
        ),
        _fault(
            "no-fork-hook",
            "    os.register_at_fork(after_in_child=_forget_helpers)",
            "    pass",
            f"{_CPU_PROCESSES}kernels_and_helpers_run_in_a_process_forked_after_they_ran",
        ),
        _fault(
            "little-work-shared-out",
            "    if useful < 2:\n        return 1\n",
            "",
            f"{_CPU}little_work_wakes_no_helper",
            survives="the limit by `useful` is 1, too: the early return only saves the call of limit()",
        ),
    ),
    "cupy_msda/cpu/backend.py": (
        _fault(
            "misaligned-arrays",
            "return array if array.flags.aligned else array.copy()",
            "return array",
            f"{_CPU}one_compilation_whatever_the_layout_of_the_inputs",
            survives="Numba takes such arrays, and x86 reads from any address; other processors may not",
        ),
        _fault(
            "mask-with-gaps",
            "mask = np.ascontiguousarray(_numpy(mask))",
            "mask = _numpy(mask)",
            f"{_CPU}one_compilation_for_an_interpolation_with_a_mask_or_without",
        ),
        _fault(
            "float32-for-float64",
            'np.float64 if problem.value_dtype == "float64" else np.float32',
            "np.float32",
            f"{_CPU}dtypes",
        ),
    ),
    "cupy_msda/cpu/cache.py": (
        _fault(
            "damaged-kernels-run",
            "if checksum != self._checksum(context.codegen(), text):",
            "if False:",
            f"{_CPU_PROCESSES}a_damaged_cache_costs_one_warning_and_is_replaced",
        ),
    ),
    "cupy_msda/cpu/threads.py": (
        _fault(
            "largest-limit",
            "return min(limits)",
            "return max(limits)",
            f"{_CPU_PROCESSES}limits_on_threads",
        ),
    ),
}
