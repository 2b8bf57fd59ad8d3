"""`phalanx --help` and `phalanx VERB --help [GROUP]`: groups, choices, keys, defaults, meaning."""

import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import phalanx.configs
from phalanx.launch.bad_input import BadInput
from phalanx.launch.config.keys import Key, all_keys, near, sections_of

if TYPE_CHECKING:
    from phalanx.launch.verbs.table import Verb

WIDTH = 96
HYDRA_OPTIONS = (
    (
        "--multirun, -m",
        "run once for each value of key=a,b or group=a,b; job n writes to run.dir/n",
    ),
    ("", "(unless run.dir or run.name is among what varies)"),
    ("--cfg job", "print the composed configuration and stop"),
    ("--config-dir DIR", "look for more YAML there: DIR/experiment/mine.yaml is experiment=mine"),
    ("--config-path DIR", "take the root config.yaml from there instead"),
    ("--config-name NAME", "take another root file"),
    ("--info [WHAT]", "how Hydra found and merged the files"),
    ("--hydra-help", "Hydra's own help, its further options among it"),
    ("-sc install=SHELL", 'completion for bash, zsh or fish: eval "$(phalanx -sc install=bash)"'),
)


def overview(verbs: Mapping[str, "Verb"]) -> str:
    """The answer to `phalanx --help`."""
    lines = [f"phalanx {version('phalanx-train')}: distributed training", ""]
    width = max(len(verb.usage) for verb in verbs.values())
    lines += [f"  {verb.usage:<{width}}  {verb.summary}" for verb in verbs.values()]
    lines += ["", "`phalanx VERB --help` says more; `phalanx train --help model` tells the keys"]
    lines += ["that begin with model. OVERRIDES are group=choice and key=value."]
    lines += ["Exit codes: 0 done, 1 failed or a difference was found, 2 bad input."]
    return "\n".join(lines)


def explain(verb: "Verb", topics: Sequence[str]) -> str:
    """The answer to `phalanx VERB --help [GROUP ...]`."""
    names = sections_of([key.name for key in all_keys()])
    topics = [topic for topic in topics if verb.takes_overrides and topic not in verb.usage]
    for topic in topics:
        if not _keys_under(topic) and topic not in choices():
            raise BadInput(f"--help {topic}: no such group or key; {near(topic)}")
    if topics:
        return "\n\n".join(_section(topic) for topic in topics)
    lines = [f"usage: {verb.usage}", f"       {verb.summary}"]
    if verb.examples:
        lines += ["", "Examples:", *(f"  {example}" for example in verb.examples)]
    options = (*verb.options, *(HYDRA_OPTIONS if verb.takes_overrides else ()))
    if options:
        lines += ["", "Options:", *(f"  {flag:<20} {text}".rstrip() for flag, text in options)]
    if verb.takes_overrides:
        lines += ["", "Groups, chosen as group=choice:"]
        lines += [f"  {group:<12} {', '.join(names)}" for group, names in choices().items()]
        lines += ["", "Keys, set as key=value:", ""]
        lines += ["\n\n".join(_section(name) for name in names)]
    return "\n".join(lines)


def choices() -> dict[str, list[str]]:
    """The YAML files of each group."""
    root = Path(str(phalanx.configs.__file__)).parent
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    found = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}
    return {group: names for group, names in found.items() if names}


def _keys_under(topic: str) -> list[Key]:
    return [key for key in all_keys() if f"{key.name}.".startswith(f"{topic}.")]


def _section(topic: str) -> str:
    lines = []
    if topic in choices():
        lines.append(f"{topic}=  {', '.join(choices()[topic])}")
    lines += [_entry(key) for key in _keys_under(topic)]
    return "\n".join(lines)


def _entry(key: Key) -> str:
    head = f"  {key.name} = {key.default}   ({key.type})"
    meaning = textwrap.fill(key.meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"{head}\n{meaning}"
