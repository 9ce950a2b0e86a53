"""Groups of ranks over which parameters are sharded."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dinov2_equi.distributed.env import get_local_world_size, get_world_size

REPLICATE, SHARD = "replicate", "shard"
"""Names of the two axes of a hybrid mesh: across machines, and inside one."""


def whole_mesh(device_type: str) -> DeviceMesh:
    """Return one axis over all ranks. Every rank must call it.

    Args:
        device_type: `cuda` or `cpu`.
    """
    return init_device_mesh(device_type, (get_world_size(),), mesh_dim_names=(SHARD,))


def hybrid_mesh(device_type: str) -> DeviceMesh:
    """Return two axes: machines, which hold copies, and the ranks of a machine, which share one.

    Every rank must call it.
    One machine has nothing to copy: the mesh is that of `whole_mesh` then.

    Args:
        device_type: `cuda` or `cpu`.

    Raises:
        ValueError: if the machines run different numbers of ranks.
    """
    world, local = get_world_size(), get_local_world_size()
    if local == world:
        return whole_mesh(device_type)
    if world % local:
        raise ValueError(
            f"HYBRID_SHARD needs the same number of processes on every machine, got {world} in all and {local} on this "
            "one: set LOCAL_WORLD_SIZE, start as many on each, or use SHARD_GRAD_OP"
        )
    return init_device_mesh(device_type, (world // local, local), mesh_dim_names=(REPLICATE, SHARD))
