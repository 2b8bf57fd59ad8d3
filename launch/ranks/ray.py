"""Ranks as actors of a Ray cluster, one each, placed by a placement group."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from phalanx.launch import env
from phalanx.launch.bad_input import BadInput
from phalanx.launch.ranks.failure import GRACE_S, Failure, RankFailed, Stopped, first_failure
from phalanx.train.config import Device, LaunchConfig

try:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

    from phalanx.launch.ranks.ray_actor import ActorPlace, Rank, send_sigterm
except ImportError as error:
    raise BadInput(
        "launch=ray: Ray is not installed; `pip install 'phalanx-train[ray]'`"
    ) from error

_POLL_S = 0.2


def launch_ray(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    config: LaunchConfig,
    log_dir: Path | None = None,
) -> list[Any]:
    """`launch.ranks.start.launch` on a Ray cluster; on a local one where none is in reach."""
    with ExitStack() as stack:
        _connect(config, world_size, stack)
        device = _device(config, world_size)
        actors = _actors(world_size, config=config, gpu=device == "cuda", stack=stack)
        places = ray.get([actor.place.remote() for actor in actors])
        nodes = [place.node for place in places]
        together = sorted(range(world_size), key=lambda index: nodes.index(nodes[index]))
        actors, places = ([part[index] for index in together] for part in (actors, places))
        nodes = [place.node for place in places]
        # Nodes of unequal size: each rank counts as one.
        sizes = {nodes.count(node) for node in nodes}
        node_size = sizes.pop() if len(sizes) == 1 else 1
        init_method = ray.get(actors[0].open_store.remote(places[0].address))
        work = ray.cloudpickle.dumps((fn, args))
        around = (os.getcwd(), list(sys.path), None if log_dir is None else log_dir.absolute())
        pending = {}
        for rank, actor in enumerate(actors):
            plan = {
                "rank": rank,
                "world_size": world_size,
                "local_rank": 0 if device == "cuda" else nodes[:rank].count(nodes[rank]),
                "local_world_size": nodes.count(nodes[rank]),
                "node_size": node_size,
                "init_method": init_method,
                "device_type": device,
            }
            pending[actor.run.remote(work, plan, config, around)] = rank
        return _Watch(places, pending, stack).wait(world_size)


def cluster_device(config: LaunchConfig, world_size: int) -> str:
    """`cpu` or `cuda`: where `launch_ray` would run `world_size` ranks."""
    with ExitStack() as stack:
        _connect(config, world_size, stack)
        return _device(config, world_size)


def _connect(config: LaunchConfig, world_size: int, stack: ExitStack) -> None:
    """Join the cluster that is named or in reach; start a local one otherwise."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {
        "logging_level": "error",
        "log_to_driver": True,
        "include_dashboard": False,
    }
    # Ray takes a worker's environment from the node: keep it from warning about accelerators.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        address = config.address or os.environ.get("RAY_ADDRESS", "auto")
        del options["include_dashboard"]
        ray.init(address=address, **options)
    except ConnectionError as error:
        if config.address is not None:
            raise BadInput(
                f"launch.address={config.address}: no Ray cluster answers there ({error})"
            ) from error
        cpus = max(world_size, env.cpu_count())
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=env.gpu_count(),
            include_dashboard=False,
            **options,
        )
    stack.callback(ray.shutdown)


def _device(config: LaunchConfig, world_size: int) -> str:
    if config.device is Device.cpu:
        return "cpu"
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if gpus >= world_size:
        return "cuda"
    if config.device is Device.cuda:
        raise BadInput(
            f"launch.device=cuda: the Ray cluster has {gpus} GPUs for {world_size} ranks"
        )
    return "cpu"


def _actors(world_size: int, *, config: LaunchConfig, gpu: bool, stack: ExitStack) -> list[Any]:
    """One actor a rank, held by a placement group."""
    per_node = world_size // config.nodes
    need = {"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})
    # One bundle a node keeps its ranks together; without nodes, Ray packs them as it can.
    if config.nodes > 1:
        bundles = [{name: count * per_node for name, count in need.items()}] * config.nodes
        group = placement_group(bundles, strategy="STRICT_SPREAD")
    else:
        bundles = [need] * world_size
        group = placement_group(bundles, strategy="PACK")
    stack.callback(remove_placement_group, group)
    if not group.wait(config.timeout_s):
        raise BadInput(
            f"launch: the Ray cluster cannot place {len(bundles)} x {bundles[0]}; it has "
            f"{ray.cluster_resources()}"
        )
    kind = ray.remote(max_restarts=0)(Rank)
    actors: list[Any] = []
    for index in range(world_size):
        bundle = index // per_node if config.nodes > 1 else index
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        options = {"num_cpus": 1, "num_gpus": 1 if gpu else 0, "scheduling_strategy": strategy}
        actors.append(kind.options(**options).remote())
    for actor in actors:
        stack.callback(ray.kill, actor)
    return actors


class _Watch:
    """The launching process's view of the ranks, from start to end."""

    def __init__(self, places: list[ActorPlace], pending: dict[Any, int], stack: ExitStack) -> None:
        self.places = places
        self.pending = pending
        self.results: dict[int, Any] = {}
        self.failures: list[Failure] = []
        self.signals: list[int] = []
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(signum, lambda signum, _: self.signals.append(signum))
                stack.callback(signal.signal, signum, before)

    def wait(self, world_size: int) -> list[Any]:
        """Every rank's result, by rank."""
        told, left_s = 0, GRACE_S
        while self.pending and left_s > 0:
            done, _ = ray.wait(list(self.pending), timeout=_POLL_S)
            for reference in done:
                self._collect(reference)
            if self.failures and not done:
                left_s -= _POLL_S
            if len(self.signals) > told:
                told = len(self.signals)
                if told > 1:
                    break
                self._ask_to_stop()
        if self.signals and (self.failures or self.pending):
            killed = any("ActorDiedError" in failure.text for failure in self.failures)
            if killed or self.pending:
                raise Stopped(self.signals[0])
        if self.failures:
            raise first_failure(self.failures)
        return [self.results[rank] for rank in range(world_size)]

    def _ask_to_stop(self) -> None:
        alive = [self.places[rank] for rank in self.pending.values()]
        for node in {place.node for place in alive}:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(send_sigterm).options(num_cpus=0, scheduling_strategy=strategy)
            task.remote([place.pid for place in alive if place.node == node])

    def _collect(self, reference: Any) -> None:
        rank = self.pending.pop(reference)
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            host = self.places[rank].host
            self.failures.append(Failure(rank=rank, host=host, text=_told(error)))
            return
        if "result" in answer:
            self.results[rank] = answer["result"]
        else:
            self.failures.append(answer["failure"])


def _told(error: Exception) -> str:
    """A lost actor in one line: Ray's own text runs over a page."""
    if isinstance(error, ray.exceptions.ActorDiedError):
        return f"its process was killed or crashed ({type(error).__name__})"
    return f"{type(error).__name__}: {error}"


__all__ = ["RankFailed", "launch_ray"]
