"""Mesh: the ranks of a run on named axes, one Group per axis."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trainfleet.comm.environment import RankEnvironment
from trainfleet.comm.group import DEADLINE, Group
from trainfleet.errors import LaunchError
from trainfleet.plan import Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DATA_AXES = ("dp_replicate", "dp_shard")
"""Axes whose ranks see different data."""

EXPERT_AXES = ("ep_replicate", "ep")
"""The same ranks, and those of cp, where experts are dealt out: the first axis holds those with equal experts."""

# Making process groups costs threads, ports and, on GPUs, memory: meshes of equal degrees share theirs.
_made: dict[tuple[str, tuple[tuple[str, int], ...]], tuple[DeviceMesh, ProcessGroup]] = {}
_made_over: ProcessGroup | None = None


class Axes:
    """Ranks on named axes, one Group per axis: what every mesh is, whatever its ranks hold.

    `axes` are the degrees by name, in order; `groups` those of ranks that share this rank's place on every other axis;
    `data_axes` that of all ranks which see different data.
    """

    def __init__(
        self, axes: Mapping[str, int], groups: Mapping[str, Group], *, rank: int, world_size: int, data_axes: Group
    ) -> None:
        self.plan_axes = dict(axes)
        """Degree of each axis by name, in order."""
        self.rank = rank
        self.world_size = world_size
        self.data_axes = data_axes
        """The Group of all ranks that see different data: batches are dealt over it."""
        self._groups = dict(groups)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what is written once."""
        return self.rank == 0

    def __getitem__(self, axis: str) -> Group:
        if axis not in self._groups:
            raise KeyError(f"The mesh has no axis {axis!r}; it has {', '.join(self._groups)}.")
        return self._groups[axis]

    def __repr__(self) -> str:
        axes = " x ".join(f"{name}={degree}" for name, degree in self.plan_axes.items())
        return f"Mesh({axes}, rank {self.rank} of {self.world_size})"


class Mesh(Axes):
    """The ranks of a run, laid out row by row over the axes: the last axis varies fastest.

    `mesh["dp_shard"]` is the Group of those that share this rank's place on every other axis, `mesh.data_axes` the
    Group over which batches are dealt, `mesh.gradient_axes` that over which gradients are averaged, `mesh.world` the
    Group of all ranks, `mesh.torch` what DTensors take, `mesh.sharding` what FSDP2 takes. The axes pp (the first),
    cp and tp (the last two) are there where the plan uses them.
    """

    def __init__(
        self,
        *,
        axes: dict[str, int],
        rank: int,
        local_rank: int,
        device: str,
        torch: DeviceMesh,
        groups: dict[str, Group],
        data_axes: Group,
        world: Group | None = None,
        sharding: DeviceMesh | None = None,
        shard_axes: Group | None = None,
        gradient_axes: Group | None = None,
        experts: DeviceMesh | None = None,
        owns_process_group: bool,
    ) -> None:
        self.world = world or data_axes
        """The Group of all ranks: what votes, agrees and saves goes over it."""
        super().__init__(axes, groups, rank=rank, world_size=self.world.size, data_axes=data_axes)
        self.local_rank = local_rank
        self.device = device
        """`cpu`, or `cuda:0` and so on: the GPU of this rank."""
        self.torch = torch
        """The DeviceMesh, with all axes, also those of degree 1."""
        self.sharding = sharding or torch
        """The DeviceMesh over which parameters lie: as `torch`, but its dp_shard holds the ranks of cp too."""
        self.shard_axes = shard_axes or groups["dp_shard"]
        """The Group over which ZeRO shards: dp_shard x cp, for ranks that share a sequence may share parameters too."""
        self.gradient_axes = gradient_axes or data_axes
        """The Group of all ranks that hold the same parameters, whole or sharded: gradients are averaged over it."""
        self.experts = experts
        """The ranks that see other tokens (dp_replicate x dp_shard x cp) on the axes ep_replicate and ep, where plan.ep
        deals out experts."""
        self._owns_process_group = owns_process_group

    @classmethod
    def from_env(cls, plan: Plan | None = None, *, device: str | None = None, timeout: timedelta = DEADLINE) -> Mesh:
        """The mesh of `plan` over the ranks that a launcher started; one rank if none did.

        `device` is `cpu` or `cuda`; None takes GPUs where there are any. Torch's default process group is made
        here and ended by `close`, unless the program already has one: then that is used and left alone.
        PlanError where the plan does not fit the number of ranks; PeerError where a rank did not come in time.
        """
        plan = plan or Plan()
        import torch.distributed as dist

        from trainfleet.comm.torch_group import TorchGroup, init_process_group

        owns = not dist.is_initialized()
        environment = RankEnvironment.from_env() if owns else _environment_of_process_group()
        plan = plan.for_world(environment.world_size)
        degrees = {
            "pp": plan.pp,
            **{axis: getattr(plan, axis) or 1 for axis in DATA_AXES},
            "cp": plan.cp,
            "tp": plan.tp,
        }
        axes = {axis: degree for axis, degree in degrees.items() if degree > 1 or axis in DATA_AXES}
        device = _device(device, environment, None if owns else dist.get_backend_config())
        if owns:
            init_process_group(environment, device=device, timeout=timeout)
        device_type = device.split(":")[0]
        device_mesh, of_data = _device_mesh(device_type, axes, timeout)
        sharding, of_gradients = device_mesh, of_data
        if plan.cp > 1:
            folded = {axis: degree * (plan.cp if axis == "dp_shard" else 1) for axis, degree in axes.items()}
            del folded["cp"]
            sharding, of_gradients = _device_mesh(device_type, folded, timeout)
        groups: dict[str, Group] = {name: TorchGroup(device_mesh.get_group(name), name=name) for name in axes}
        experts = None
        if plan.ep > 1:
            replicas = plan.data_ranks(environment.world_size) * plan.cp // plan.ep
            stages = {axis: degree for axis, degree in axes.items() if axis == "pp"}
            inner = {axis: degree for axis, degree in axes.items() if axis == "tp"}
            dealt_out = dict(zip(EXPERT_AXES, (replicas, plan.ep)))
            whole, _ = _device_mesh(device_type, stages | dealt_out | inner, timeout)
            experts = whole[EXPERT_AXES]
            groups |= {name: TorchGroup(whole.get_group(name), name=name) for name in EXPERT_AXES}
        world = dist.group.WORLD
        assert world is not None
        return cls(
            axes=axes,
            rank=environment.rank,
            local_rank=environment.local_rank,
            device=device,
            torch=device_mesh,
            groups=groups,
            data_axes=TorchGroup(of_data, name=" x ".join(DATA_AXES)),
            world=TorchGroup(world, name="world") if len(axes) > len(DATA_AXES) else None,
            sharding=sharding,
            shard_axes=TorchGroup(sharding.get_group("dp_shard"), name="dp_shard x cp") if plan.cp > 1 else None,
            gradient_axes=TorchGroup(of_gradients, name="dp_replicate x dp_shard x cp") if plan.cp > 1 else None,
            experts=experts,
            owns_process_group=owns,
        )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]} on {self.device})"

    def close(self) -> None:
        """End the process group if this mesh made it. May be called twice."""
        if self._owns_process_group:
            import torch.distributed as dist

            self._owns_process_group = False
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_device_meshes()

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _environment_of_process_group() -> RankEnvironment:
    """The ranks of the process group that the program made itself."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        environment = RankEnvironment.from_env()
    except LaunchError:
        environment = RankEnvironment()
    if (environment.rank, environment.world_size) == (rank, world_size):
        return environment
    return RankEnvironment(rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)


def _device(wanted: str | None, environment: RankEnvironment, backends: Any) -> str:
    """The device of this rank. `backends` are those of a process group that stands already."""
    if wanted not in (None, "cpu", "cuda"):
        raise LaunchError(f"The device is {wanted!r}; use 'cpu', or 'cuda' (each rank takes its own GPU), or none.")
    if wanted == "cpu":
        return "cpu"
    import torch

    reachable = backends is None or "cuda" in str(backends)
    if wanted is None and not (torch.cuda.is_available() and reachable):
        return "cpu"
    if not torch.cuda.is_available():
        raise LaunchError("The device is 'cuda', but torch sees no GPU here. Use device 'cpu', or look at the driver.")
    if environment.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"Rank {environment.rank} is number {environment.local_rank} on its host, which has "
            f"{torch.cuda.device_count()} GPU(s). Start at most one process a GPU, or use device 'cpu'."
        )
    torch.cuda.set_device(environment.local_rank)
    return f"cuda:{environment.local_rank}"


def _device_mesh(device_type: str, axes: dict[str, int], timeout: timedelta) -> tuple[DeviceMesh, ProcessGroup]:
    """The DeviceMesh of `axes`, and the process group of all ranks that see different data.

    What spans all ranks uses the default process group itself.
    """
    global _made_over
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if dist.group.WORLD is not _made_over:
        _forget_device_meshes()
        _made_over = dist.group.WORLD
    degrees = tuple(axes.values())
    key = (device_type, tuple(axes.items()))
    if key not in _made:
        ranks = torch.arange(dist.get_world_size(), dtype=torch.int).view(degrees)
        rows = [ranks.movedim(dim, -1).reshape(-1, degree).tolist() for dim, degree in enumerate(degrees)]
        groups = [_own_group(ranks_of_groups, timeout) for ranks_of_groups in rows]
        mesh = DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=tuple(axes))
        of_data = [list(axes).index(axis) for axis in (DATA_AXES if "dp_shard" in axes else EXPERT_AXES)]
        together = ranks.movedim(of_data, [-2, -1]).flatten(-2)
        data_ranks = together.reshape(-1, together.shape[-1]).tolist()
        same = next((group for group, row in zip(groups, rows) if sorted(row) == sorted(data_ranks)), None)
        _made[key] = mesh, same or _own_group(data_ranks, timeout)
    return _made[key]


def _own_group(rows: list[list[int]], timeout: timedelta) -> ProcessGroup:
    """Of groups of ranks, the one that this rank is in; every rank makes all of them in the same order."""
    import torch.distributed as dist

    own = dist.group.WORLD
    assert own is not None
    if len(rows) > 1:
        for ranks in rows:
            made = dist.new_group(ranks, timeout=timeout)
            if dist.get_rank() in ranks:
                own = made
    return own


def _forget_device_meshes() -> None:
    global _made_over
    from trainfleet.comm.torch_group import forget_layouts

    if _made:
        forget_layouts()
    _made.clear()
    _made_over = None
