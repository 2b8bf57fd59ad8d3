"""A verb run through `hydra.main`: overrides, --multirun, --cfg, --config-dir as Hydra has them.

The configuration is first composed and checked by `compose`, whose messages are clearer than
Hydra's, and only then handed to Hydra.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from phalanx.launch import env
from phalanx.launch.bad_input import refuse_option, user_input
from phalanx.launch.config.compose import CONFIG_MODULE, Source, check, compose, to_config
from phalanx.launch.config.schema import register_schema
from phalanx.launch.ranks.local import warm_up
from phalanx.train.config import Config, Launcher


@dataclass(frozen=True, kw_only=True)
class Job:
    """One composed run."""

    config: Config
    arguments: list[str]
    """What composes this configuration again on another command line."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, as Hydra reads it."""

    argv: list[str]
    source: Source
    overrides: list[str]
    sweep: bool
    """--multirun."""
    runs: bool
    """False where Hydra only shows something: --cfg, --info, ..."""

    @classmethod
    def parse(cls, argv: Sequence[str]) -> "Command":
        """Read a command line.

        Raises:
            BadInput: an option that neither Hydra nor this command knows.
        """
        parser = get_args_parser()
        parser.error = refuse_option  # type: ignore[method-assign]
        args = parser.parse_args(list(argv))
        path = args.config_path
        if path is not None and not path.startswith("pkg://"):
            path = str(Path(path).absolute())
        source = Source(
            config_dir=args.config_dir, config_path=path, config_name=args.config_name or "config"
        )
        shows = (args.cfg, args.info, args.hydra_help, args.shell_completion)
        return cls(
            argv=list(argv),
            source=source,
            overrides=list(args.overrides),
            sweep=args.multirun,
            runs=not any(shows),
        )

    def jobs(self) -> list[list[str]]:
        """Overrides of every job that a sweep is known to have; of the one job without a sweep."""
        if not self.sweep:
            return [self.overrides]
        parsed = OverridesParser.create().parse_overrides(self.overrides)
        try:
            batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        except Exception:  # another sweeper's syntax: its jobs are checked when they come
            return []
        return [job for batch in batches for job in batch]

    def fixes_folder(self) -> bool:
        """Whether a sweep's jobs would share a folder unless told apart."""
        for override in OverridesParser.create().parse_overrides(self.overrides):
            if override.key_or_group in ("run.dir", "run.name"):
                varies = override.is_sweep_override() or "${" in str(override.value())
                return not varies
        return True


def run(
    verb: str, argv: Sequence[str], job: Callable[[Job], Any], *, starts_ranks: bool = True
) -> None:
    """Compose and check, then let Hydra run `job` once, or once for each point of a sweep.

    Raises:
        BadInput: one line that says what is wrong on the command line or in the files.
    """
    command = Command.parse(argv)
    with user_input():
        configs = [compose(overrides, command.source) for overrides in command.jobs()]
    if command.runs and starts_ranks:
        local = any(config.launch.launcher is Launcher.local for config in configs)
        if local and env.torchrun_place() is None:
            warm_up()  # torch is imported while the files are checked
        with user_input():
            for config in configs:
                check(config)
    register_schema()
    main = partial(_job, command=command, job=job)
    app = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config")
    before = sys.argv
    sys.argv = [f"phalanx {verb}", *_absolute(command)]
    try:
        app(main)()
    except _JobError as error:
        raise error.error from None
    finally:
        sys.argv = before


class _JobError(BaseException):
    """Carries an exception past Hydra, which would print it and exit."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _job(composed: DictConfig, *, command: Command, job: Callable[[Job], Any]) -> Any:
    arguments = list(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        number = HydraConfig.get().job.num
        if command.fixes_folder():
            folder = f"{composed.run.dir}/{number}"
            arguments = [item for item in arguments if not item.startswith("run.dir=")]
            arguments.append(f"run.dir={folder}")
            OmegaConf.update(composed, "run.dir", folder)
        print(f"job {number}: {' '.join(arguments)}", flush=True)
    if command.source.config_dir is not None:
        arguments = ["--config-dir", str(Path(command.source.config_dir).absolute()), *arguments]
    if command.source.config_path is not None:
        arguments = ["--config-path", command.source.config_path, *arguments]
    arguments = ["--config-name", command.source.config_name, *arguments]
    try:
        with user_input():
            config = to_config(composed)
        return job(Job(config=config, arguments=arguments))
    except Exception as error:
        raise _JobError(error) from error


def _absolute(command: Command) -> list[str]:
    """The command line with --config-path absolute: Hydra takes it relative to this file."""
    argv = list(command.argv)
    for place, text in enumerate(argv):
        flag, equals, _ = text.partition("=")
        if flag in ("--config-path", "-cp"):
            value = str(command.source.config_path)
            if equals:
                argv[place] = f"{flag}={value}"
            else:
                argv[place + 1] = value
    return argv
