"""The `phalanx` command: finds the verb, and turns its end into output and exit code.

0: done. 1: the run failed, or a difference was found. 2: bad input, told in one line.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from phalanx.launch.bad_input import BadInput
from phalanx.launch.config.completion import FLAGS, complete
from phalanx.launch.help import explain, overview
from phalanx.launch.ranks.failure import RankFailed, Stopped
from phalanx.launch.verbs.table import VERBS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        print(overview(VERBS))
        return 0
    if name == "--version":
        print(f"phalanx {version('phalanx-train')}")
        return 0
    verb = VERBS.get(name)
    if verb is None and name not in FLAGS:
        return _refuse(f"{name}: unknown verb; choose one of {', '.join(VERBS)}")
    rest = arguments[1:]
    try:
        if verb is None or set(rest) & set(FLAGS):
            asked = rest if verb is None else [word for word in rest if word not in FLAGS]
            complete(asked, {name: verb.takes_overrides for name, verb in VERBS.items()})
            return 0
        if "--help" in rest or "-h" in rest:
            topics = [item for item in rest if not item.startswith("-")]
            print(explain(verb, topics), flush=True)
            return 0
        verb.run(rest)
    except BadInput as error:
        return _refuse(str(error))
    except RankFailed as error:
        print(error.last_words, file=sys.stderr)
        return 1
    except Stopped as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def train_main() -> int:
    """`python -m phalanx.train`, which torchrun starts on every rank."""
    return main(["train", *sys.argv[1:]])


def _refuse(message: str) -> int:
    print(f"phalanx: {message}", file=sys.stderr)
    return 2


def _fail(message: str) -> int:
    print(f"phalanx: {message}", file=sys.stderr)
    return 1
