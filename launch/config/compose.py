"""Overrides to a checked `Config`, through Hydra; every mistake becomes one line that names it.

Torch-free, so that a mistake is answered at once.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from phalanx.launch import env
from phalanx.launch.config.keys import near
from phalanx.launch.config.schema import register_schema
from phalanx.train.config import Config, Device, Launcher

CONFIG_MODULE = "phalanx.configs"
"""Where the YAML files lie."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where Hydra looks, as its own command-line options say it."""

    config_dir: str | None = None
    """--config-dir: searched after the built-in YAML."""
    config_path: str | None = None
    """--config-path: searched instead of it."""
    config_name: str = "config"
    """--config-name: the root file."""


def compose(overrides: Sequence[str], source: Source | None = None) -> Config:
    """The configuration that `overrides` describe.

    Raises:
        ValueError: one line that says which key, which value, and what would be right.
    """
    source = source or Source()
    register_schema()
    overrides = list(overrides)
    if source.config_dir is not None:
        folder = Path(source.config_dir).absolute()
        if not folder.is_dir():
            raise ValueError(f"--config-dir {source.config_dir}: no such folder")
        overrides.append(f"hydra.searchpath=[file://{folder}]")
    GlobalHydra.instance().clear()
    if source.config_path is None:
        opened: Any = initialize_config_module(CONFIG_MODULE, version_base="1.3")
    elif source.config_path.startswith("pkg://"):
        module = source.config_path.removeprefix("pkg://")
        opened = initialize_config_module(module, version_base="1.3")
    else:
        folder = Path(source.config_path).absolute()
        opened = initialize_config_dir(str(folder), version_base="1.3")
    with opened:
        _check_groups(overrides)
        try:
            composed = hydra_compose(source.config_name, overrides)
        except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
            raise ValueError(_explain(error)) from error
    return to_config(composed)


def to_config(composed: DictConfig) -> Config:
    """Hydra's composition as the typed configuration.

    Raises:
        ValueError: as `compose`.
    """
    _refuse_appended(composed)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from error
    if not isinstance(config, Config):
        raise ValueError("config: the root file's defaults must begin with `schema`")
    return config


def world_size(config: Config) -> int:
    """Ranks of the run."""
    place = env.torchrun_place()
    if place is not None:
        return place.world_size
    launch, parallel = config.launch, config.parallel
    if launch.ranks_per_node is not None:
        return launch.nodes * launch.ranks_per_node
    if parallel.dp_shard > 0:
        return parallel.fixed_degree * parallel.dp_shard
    gpus = 0 if launch.device is Device.cpu else env.gpu_count()
    return launch.nodes * gpus or parallel.fixed_degree


def ranks_per_node(config: Config) -> int | None:
    """Ranks that share a node; None where Ray is free to place them.

    Raises:
        ValueError: launch.nodes does not divide the ranks.
    """
    place, launch = env.torchrun_place(), config.launch
    if place is not None:
        return place.ranks_per_node
    if launch.launcher is Launcher.ray and launch.nodes == 1:
        return None
    world = world_size(config)
    if world % launch.nodes:
        raise ValueError(
            f"launch.nodes={launch.nodes}: does not divide the {world} ranks that the parallel "
            "degrees ask for"
        )
    return world // launch.nodes


def check(config: Config) -> None:
    """Every check that needs several parts, the machine or the files; before any rank starts.

    Raises:
        ValueError: one line that says what is wrong and what would be right.
    """
    from phalanx.train.data.check import check_data, check_prompt
    from phalanx.train.plan.pipeline import check_pipeline

    world = world_size(config)
    check_pipeline(config, config.num_microbatches(world))
    per_node = ranks_per_node(config)
    if config.launch.launcher is not Launcher.ray:  # Ray's machines are not this one
        env.device_type(config.launch, env.ranks_here(config.launch, world))
    if per_node is not None:
        config.check_nodes(world, per_node)
    check_data(config.data, vocab_size=config.model.vocab_size, seq_len=config.training.seq_len)
    sample = config.monitor.sample
    if sample.tokens > 0:
        check_prompt(config.data, prompt=sample.prompt, num_tokens=sample.tokens)


def _check_groups(overrides: list[str]) -> None:
    """Answer what Hydra answers without naming the key: bad syntax, a group without a name."""
    loader = GlobalHydra.instance().config_loader()
    groups = loader.list_groups("")
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, ValueError) as error:
            key, _, value = text.partition("=")
            if re.fullmatch(r"\w+\(.*\)", value):  # Hydra takes it for a call
                raise ValueError(
                    f"{text}: a value with parentheses needs quotes within the shell's: "
                    f"'{key}=\"{value}\"'"
                ) from error
            raise ValueError(
                f"{text}: not an override; write group=choice or key=value, as in model=tiny "
                f"training.steps=10 'data.text=[a.txt, b.txt]' ({_first_line(error)})"
            ) from error
        key = override.key_or_group
        is_choice = override.is_sweep_override() or isinstance(override.value(), (str, list))
        if key in groups and key != "hydra" and not override.is_delete() and not is_choice:
            names = ", ".join(loader.get_group_options(key))
            raise ValueError(
                f"{text}: {key} takes the name of a choice: {names} (~{key} leaves the group out)"
            )


def _refuse_appended(composed: DictConfig, prefix: str = "") -> None:
    """`+key=value` gets past Hydra's check of names; no key outside the schema has an effect."""
    for name in map(str, composed):
        key = f"{prefix}{name}"
        value = composed._get_node(name)
        if OmegaConf.is_missing(composed, name) or not isinstance(value, DictConfig):
            value = None
        kind = OmegaConf.get_type(composed)
        if kind is not None and hasattr(kind, "__dataclass_fields__"):
            if name not in kind.__dataclass_fields__:
                raise ValueError(f"{key}: unknown key; {near(key)}")
            if value is not None:
                _refuse_appended(value, f"{key}.")


def _explain(error: Exception) -> str:
    """One line out of Hydra's or OmegaConf's message."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not an override ({_first_line(error)})"
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    text = str(error)
    where = re.match(r"In '([^']+)'", text)
    place = f" (in configs {where[1]})" if where else ""
    source = error
    if isinstance(error.__cause__, OmegaConfBaseException):
        source = error.__cause__
    reason = str(source)
    full_key = re.search(r"full_key: (\S+)", reason)
    outer = re.match(r"Could not override '([^']+)'", text)
    key = full_key[1] if full_key else outer[1] if outer else ""
    if outer and not key.startswith(outer[1].split(".")[0]):  # inside a list, named without it
        return f"{outer[1]}: unknown key {key}; `phalanx train --help` lists the keys"
    if re.search(r"Key '.*' (is )?not in ", reason):
        whole = outer[1] if outer else key
        appended = re.search(r"use \+(.*)", text)
        return f"{appended[1] if appended else whole}: unknown key{place}; {near(whole)}"
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'", text)
    if ambiguous:
        key, _, value = ambiguous[1].partition("=")
        return f"{key}={value}: write {key}=[{value}] for a list, or add --multirun to try each"
    if not key:
        return _first_line(error)
    return f"{key}{_given(text)}: {_plain(reason)}{place}"


def _explain_missing(error: MissingConfigException) -> str:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return f"{_first_line(error)}; is --config-dir or --config-path right?"
    options = ", ".join(error.options or [])
    where = re.match(r"In '([^']+)'", str(error))
    place = f" (in configs {where[1]})" if where and where[1] != "config" else ""
    return f"{group}={choice}: no such choice{place}; choose one of {options}"


def _given(text: str) -> str:
    """`=value` where Hydra repeats the override."""
    match = re.match(r"Error merging override [^=\s]+(=.*)", text)
    return match[1] if match else ""


def _plain(reason: str) -> str:
    """OmegaConf's complaint about a value, in words of the user's."""
    lines = [line for line in reason.splitlines() if "raised while composing" not in line]
    first = lines[0].strip()
    match = re.match(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", first)
    if match:
        wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
        return f"'{match[1]}' is not {wanted.get(match[2], match[2])}"
    match = re.match(r"Value '(.*)' is not a valid bool", first)
    if match:
        return f"'{match[1]}' is neither true nor false"
    match = re.match(r"Invalid value '(.*)', expected one of \[(.*)\]", first)
    if match:
        return f"'{match[1]}' is not known; choose one of {match[2]}"
    if first.startswith("Invalid type assigned"):
        return "this is a group of keys, not a value; set its keys, as in group.key=value"
    if "missing mandatory value" in first:
        return "needs a value"
    return first


def _first_line(error: BaseException) -> str:
    """A message without Hydra's further paragraphs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("See https", "Error parsing"))]
    return " ".join(kept)
