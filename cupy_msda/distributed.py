# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism for `MSDeformAttn`, and the operators' rule for DTensors.

Importing this module registers that rule (`cupy_msda.torch.dtensor` has its table). The first DTensor that reaches the
functions of `cupy_msda` registers it as well; code that calls ``torch.ops.cupy_msda`` itself has to import one of both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cupy_msda.modules import MSDeformAttn
from cupy_msda.torch import dtensor  # noqa: F401 - its import registers the rule

try:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )
except ImportError as error:
    raise ImportError(
        "DTensors and cupy_msda.distributed need torch 2.5 or later, built with torch.distributed; "
        f"this is torch {torch.__version__}"
    ) from error


__all__ = ["HeadwiseParallel"]

# Of the earlier ones that were tried, 2.9 cannot flip a DTensor, such as a level table, and 2.6 and
# 2.5 return wrong gradients of reference points with four coordinates.
_HEADWISE = "2.13"


class HeadwiseParallel(ParallelStyle):
    """Tensor parallelism for `MSDeformAttn`: each process has some of the heads and their parameters.

    The plan for ``torch.distributed.tensor.parallel.parallelize_module``, either alone, as in
    ``parallelize_module(attention, mesh, HeadwiseParallel())``, or for the entries of a larger
    module's plan that name an `MSDeformAttn`.

    The parameters become DTensors: those of `value_proj`, `sampling_offsets` and
    `attention_weights` sharded by rows, so that heads stay whole, `output_proj.weight` by columns,
    and `output_proj.bias` replicated. `forward` takes the same inputs on every process, plain
    tensors or DTensors, and returns the whole output on every process, a plain tensor; gradients of
    the inputs are whole, too. One forward communicates once, a sum of outputs.

    Raises
    ------
    RuntimeError
        From `parallelize_module`: torch is older than 2.13.
    TypeError
        From `parallelize_module`: the module is not an `MSDeformAttn`.
    ValueError
        From `parallelize_module`: `n_heads` is not a multiple of the number of processes.

    Examples
    --------
    >>> mesh = init_device_mesh("cuda", (4,))
    >>> plan = {"encoder.layers.*.self_attn": HeadwiseParallel()}
    >>> parallelize_module(model, mesh, plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Distribute the parameters, and the inputs of every forward from now on."""
        if TorchVersion(torch.__version__) < _HEADWISE:
            raise RuntimeError(
                f"HeadwiseParallel needs torch {_HEADWISE} or later, whose DTensors have all that "
                f"MSDeformAttn asks of them; this is torch {torch.__version__}"
            )
        if not isinstance(module, MSDeformAttn):
            raise TypeError(
                f"module must be an MSDeformAttn for HeadwiseParallel, got {type(module).__name__}"
            )
        size = device_mesh.size()
        if module.n_heads % size:
            raise ValueError(
                f"n_heads must be a multiple of the {size} processes of device_mesh, "
                f"got {module.n_heads}"
            )
        # DTensors all the way, so that the sum over heads in the gradient of reference_points, say,
        # is one over processes.
        by_head = ("value_proj", "sampling_offsets", "attention_weights")
        plan: dict[str, ParallelStyle] = {
            name: ColwiseParallel(use_local_output=False) for name in by_head
        }
        plan["output_proj"] = RowwiseParallel()
        parallelize_module(module, device_mesh, plan, src_data_rank=self.src_data_rank)
        module.register_forward_pre_hook(partial(_replicate_inputs, device_mesh), with_kwargs=True)
        return module


def _replicate_inputs(
    mesh: DeviceMesh, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with every tensor as a replicated DTensor."""
    everywhere = [Replicate()] * mesh.ndim

    def replicated(given: Any) -> Any:
        if isinstance(given, DTensor):
            return given.redistribute(placements=everywhere)
        # A level table on the host stays there, where it can be read without waiting.
        if isinstance(given, Tensor) and given.device.type == mesh.device_type:
            return DTensor.from_local(given, mesh, everywhere, run_check=False)
        return given

    return tuple(map(replicated, inputs)), {k: replicated(v) for k, v in keywords.items()}
