"""Parameters spread over the ranks by FSDP2, and what has to know of it: norms, checkpoints, averages.

Every parameter is cut along its first axis into equal runs of rows, the last ones shorter or empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Sharding:
    """How one network is spread over the ranks.

    Attributes:
        mesh: the ranks; of two axes the first one holds copies.
        reshard_after_forward: let the whole parameters go after the forward pass, and gather them again for the
            backward pass. False keeps them until the backward pass is through.
        param_dtype: in which the parameters of `inner` modules are gathered and used; the shards stay as they are.
        reduce_dtype: in which gradients are summed over the ranks.
    """

    mesh: DeviceMesh
    reshard_after_forward: bool
    param_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32


def shard_(
    module: nn.Module, sharding: Sharding, *, inner: Iterable[nn.Module] = (), methods: Iterable[str] = ()
) -> None:
    """Spread the parameters of a module over the ranks, in place; every rank must call it.

    Names of parameters stay. A module without `inner` ones is gathered as a whole, and in `param_dtype`; with some,
    what does not belong to them is kept in its own number format.

    Args:
        module: its calls are the points at which parameters are gathered.
        sharding: how.
        inner: modules inside it that are gathered one at a time.
        methods: names of methods that are called beside `forward`.
    """
    blocks = list(inner)
    half = MixedPrecisionPolicy(
        param_dtype=sharding.param_dtype, reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False
    )
    whole = MixedPrecisionPolicy(reduce_dtype=sharding.reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=sharding.mesh, reshard_after_forward=sharding.reshard_after_forward, mp_policy=half)
    fully_shard(
        module,
        mesh=sharding.mesh,
        reshard_after_forward=sharding.reshard_after_forward,
        mp_policy=whole if blocks else half,
    )
    for name in methods:
        register_fsdp_forward_method(module, name)
    # Class and patch tokens are views of one tensor. What FSDP warns of, once a process, is to change them in place.
    warnings.filterwarnings("ignore", message=rf"FSDP2-wrapped module \({type(module).__name__}\) returned a view")


def keep_gathered_after_backward(module: nn.Module, is_kept: bool) -> None:
    """Say whether a module keeps its whole parameters after a backward pass, for a forward pass that follows at once.

    Gradients are shared out after every backward pass nevertheless: whole ones are what sharding spares.

    Args:
        module: sharded or not, just after its forward pass. One that let its parameters go there has not the memory to
            keep them, and does not.
        is_kept: say False before the last backward pass.
    """
    if not isinstance(module, FSDPModule):
        return
    holds_whole = not any(is_sharded(p) for p in module.parameters())
    module.set_reshard_after_backward(not (is_kept and holds_whole))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds a part of the tensor alone."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the rows of this rank, which share memory with the tensor; all of them where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a sharded one every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """Return the ranks that share a tensor, or None."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def rows_of_rank(tensor: Tensor) -> range:
    """Return which rows of a sharded tensor this rank holds."""
    assert isinstance(tensor, DTensor)
    axis = _sharded_axis(tensor)
    total, parts = tensor.shape[0], tensor.device_mesh.size(axis)
    length = -(-total // parts)
    start = min(total, length * tensor.device_mesh.get_local_rank(axis))
    rows = range(start, min(total, start + length))
    assert len(rows) == tensor.to_local().shape[0], "rows are shared out in another way than by torch.chunk"
    return rows


def is_first_copy(tensor: Tensor) -> bool:
    """Return whether no rank before this one holds the same rows of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    axis, mesh = _sharded_axis(tensor), tensor.device_mesh
    return all(mesh.get_local_rank(other) == 0 for other in range(mesh.ndim) if other != axis)


def _sharded_axis(tensor: DTensor) -> int:
    """Return the axis of the mesh along which the rows are shared out."""
    (axis,) = (index for index, placement in enumerate(tensor.placements) if placement == Shard(0))
    return axis


def sharded_like(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return a tensor sharded as `tensor` is, of which this rank holds `rows`."""
    assert isinstance(tensor, DTensor)
    result: Tensor = DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )
    return result
