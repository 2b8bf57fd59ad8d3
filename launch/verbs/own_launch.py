"""Verbs that start ranks several times over: by themselves, and on one kind of device."""

from dataclasses import replace

from phalanx.launch import env
from phalanx.launch.bad_input import BadInput
from phalanx.launch.ranks.start import resolve_device
from phalanx.train.config import Config, Launcher


def on_one_device(config: Config, size: int) -> Config:
    """launch.device=auto decided once, by the largest launch: what is compared runs on one kind."""
    device = resolve_device(config.launch, size)
    return replace(config, launch=replace(config.launch, device=device))


def need_own_launch(verb: str, config: Config) -> None:
    """verify and bench start ranks several times over: not as one worker of torchrun."""
    if env.torchrun_place() is not None or config.launch.launcher is Launcher.torchrun:
        raise BadInput(
            f"launch.launcher=torchrun: `phalanx {verb}` starts its ranks several times; "
            "use launch=local or launch=ray"
        )
