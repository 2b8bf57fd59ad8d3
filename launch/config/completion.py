"""Completion in a shell: Hydra's, behind `phalanx` and a verb.

`eval "$(phalanx -sc install=bash)"` makes the shell ask `phalanx -sc query=bash`, with the line so
far in COMP_LINE.
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence

import hydra

from phalanx.launch.bad_input import BadInput
from phalanx.launch.config.compose import CONFIG_MODULE
from phalanx.launch.config.schema import register_schema

FLAGS = ("-sc", "--shell-completion")


def complete(argv: Sequence[str], verbs: Mapping[str, bool]) -> None:
    """Print what the shell asks for: its script, or words that may come next.

    Args:
        argv: behind one of FLAGS.
        verbs: every verb, and whether it takes overrides.

    Raises:
        BadInput: it is none of what Hydra answers.
    """
    if len(argv) != 1 or not re.fullmatch(r"(install|uninstall|query)=(bash|zsh|fish)", argv[0]):
        raise BadInput(
            f"-sc {' '.join(argv)}: takes install=SHELL or uninstall=SHELL, of bash, zsh and fish; "
            'for bash: eval "$(phalanx -sc install=bash)"'
        )
    if argv[0].startswith("query="):
        program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
        verb, space, rest = rest.lstrip().partition(" ")
        if not space:
            print(" ".join(verbs))
            return
        if not verbs.get(verb):
            return
        *before, last = rest.split(" ")
        overrides = [word for word in before if "=" in word]  # not a bench's name, say
        os.environ["COMP_LINE"] = " ".join([program, *overrides, last])
    register_schema()
    main = hydra.main(
        version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name="config"
    )
    shown = sys.argv
    sys.argv = ["phalanx", FLAGS[0], *argv]
    try:
        main(lambda _: None)()
    finally:
        sys.argv = shown
