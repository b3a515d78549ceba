"""The device mesh: replicate × shard."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tsumugu.config import ParallelConfig
from tsumugu.errors import UserError


def build_mesh(config: ParallelConfig, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh with axes (replicate, shard), whose degrees multiply to the world size.

    Raises:
        UserError: Degrees that do not.
    """
    shard = config.shard_degree or max(1, world_size // (config.replicate_degree or 1))
    replicate = config.replicate_degree or max(1, world_size // shard)
    if shard * replicate != world_size:
        raise UserError(
            f"parallel.shard_degree {shard} × parallel.replicate_degree {replicate} is not the world size {world_size}",
            "choose degrees whose product is the number of processes",
        )
    return init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
