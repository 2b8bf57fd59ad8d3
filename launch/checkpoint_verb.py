"""`phalanx checkpoint import|export`: weights to and from Hugging Face safetensors."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from phalanx.launch.failure import BadInput, user_input

ACTIONS = {"import": "import_hf", "export": "export_hf"}
"""Action to function of phalanx.train.model.hf."""


def checkpoint(argv: Sequence[str]) -> None:
    """Run one action: import SOURCE TARGET, or export [--dtype TYPE] SOURCE TARGET.

    Raises:
        BadInput: unknown action, wrong number of folders, or a folder that does not fit.
    """
    action = argv[0] if argv else ""
    if action not in ACTIONS:
        raise BadInput(f"checkpoint {action}: unknown; choose one of {', '.join(ACTIONS)}")
    options, folders = _options(action, argv[1:])
    if len(folders) != 2:
        raise BadInput(f"checkpoint {action}: give two folders: SOURCE TARGET")
    source, target = Path(folders[0]), Path(folders[1])
    if not source.is_dir():
        raise BadInput(f"checkpoint {action}: {source}: no such folder")
    convert = getattr(import_module("phalanx.train.model.hf"), ACTIONS[action])
    with user_input():
        done = convert(source, target, **options)
    if action == "export":
        print(f"wrote {done}")
        return
    print(f"wrote {done.checkpoint} and {done.model_file}")
    tokenizer = f" data.tokenizer={done.tokenizer}" if done.tokenizer else ""
    print(
        f"train from it: phalanx train --config-dir {target} model={done.model_file.stem} "
        f"checkpoint.dir={target}{tokenizer}"
    )


def _options(action: str, argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    rest = list(argv)
    if action == "export" and rest and rest[0].startswith("--dtype"):
        flag, equals, value = rest.pop(0).partition("=")
        if flag == "--dtype" and (equals or rest):
            return {"dtype": value if equals else rest.pop(0)}, rest
    unknown = next((text for text in rest if text.startswith("-")), None)
    if unknown is not None:
        raise BadInput(f"checkpoint {action}: {unknown}: unknown option")
    return {}, rest
