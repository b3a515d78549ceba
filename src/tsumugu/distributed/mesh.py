"""The device mesh: replicate × shard × tensor."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tsumugu.config import ParallelConfig
from tsumugu.errors import UserError


def build_mesh(config: ParallelConfig, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh with axes (replicate, shard), whose degrees multiply to the world size.

    With parallel.tensor_degree above 1 it has a third axis, tensor, whose processes follow one another in rank: they
    are on one host where the degree divides its processes.

    Raises:
        UserError: Degrees that do not.
    """
    found = degrees(config, world_size)
    return init_device_mesh(device_type, tuple(found.values()), mesh_dim_names=tuple(found))


def degrees(config: ParallelConfig, world_size: int) -> dict[str, int]:
    """The degree of every axis; raises as `build_mesh` does."""
    tensor = config.tensor_degree
    rows = max(1, world_size // tensor)
    shard = config.shard_degree or max(1, rows // (config.replicate_degree or 1))
    replicate = config.replicate_degree or max(1, rows // shard)
    if shard * replicate * tensor != world_size:
        split = f" × parallel.tensor_degree {tensor}" if tensor > 1 else ""
        raise UserError(
            f"parallel.shard_degree {shard} × parallel.replicate_degree {replicate}{split} is not the world size "
            f"{world_size}",
            "choose degrees whose product is the number of processes",
        )
    return {"replicate": replicate, "shard": shard} | ({"tensor": tensor} if tensor > 1 else {})
