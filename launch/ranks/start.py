"""One call that runs a function on every rank, whoever starts the ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from phalanx.launch import env
from phalanx.launch.env import device_type, ranks_here
from phalanx.launch.ranks.failure import RankFailed, Stopped
from phalanx.launch.ranks.local import launch_local, warm_up
from phalanx.train.config import Device, LaunchConfig, Launcher

__all__ = ["RankFailed", "Stopped", "launch", "warm_up"]


def launch(
    fn: Callable[..., Any],
    *args: Any,
    world_size: int,
    config: LaunchConfig,
    log_dir: Path | None = None,
) -> list[Any]:
    """Run `fn(ranks, *args)` on `world_size` ranks; return each rank's result, by rank.

    `fn` is a top-level function; it joins the process group itself, through
    `phalanx.parallel.ranks.process_group(ranks)`. SIGTERM and SIGINT are passed on to every rank
    as SIGTERM, once; a second one ends them. With `log_dir`, rank r writes `log_dir/rank{r}.log`
    and rank 0 to the terminal too.

    Raises:
        RankFailed: a rank raised or died; it names the one that failed first.
        Stopped: a signal ended ranks that had not set a handler for SIGTERM.
    """
    if config.launcher is Launcher.ray:
        from phalanx.launch.ranks.ray import launch_ray

        return launch_ray(fn, *args, world_size=world_size, config=config, log_dir=log_dir)
    if env.torchrun_place() is not None:
        from phalanx.launch.ranks.torchrun import run_as_worker

        return [run_as_worker(fn, *args, config=config, log_dir=log_dir)]
    return launch_local(fn, *args, world_size=world_size, config=config, log_dir=log_dir)


def resolve_device(config: LaunchConfig, world_size: int) -> Device:
    """cpu or cuda for every one of several launches, of which the largest has `world_size` ranks.

    Raises:
        ValueError: launch.device=cuda without a GPU for each of this machine's ranks.
    """
    if config.launcher is not Launcher.ray:
        return Device(device_type(config, ranks_here(config, world_size)))
    if config.device is not Device.auto:
        return config.device
    from phalanx.launch.ranks.ray import cluster_device  # Ray is not always installed

    return Device(cluster_device(config, world_size))
