"""`phalanx checkpoint`: looks after checkpoints wherever they lie; see checkpoint/tool/."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.manifest import Manifest
from phalanx.checkpoint.storage.config import StorageConfig
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.places import INSIDE_RUN, CheckpointPlace, find
from phalanx.checkpoint.tool.report import Outcome
from phalanx.checkpoint.tool.restore.plan import Cutting
from phalanx.launch.bad_input import BadInput, user_input
from phalanx.launch.verbs.checkpoint.flags import USAGES, Flags, megabytes, pairs, parse, whole


def checkpoint(argv: Sequence[str]) -> None:
    """Run one action.

    Raises:
        BadInput: unknown action or flag, or a place where nothing of the kind is.
        SystemExit: 1, where something is broken or failed; it has been told.
    """
    action = argv[0] if argv else ""
    if action not in ACTIONS:
        raise BadInput(f"checkpoint {action}: unknown; choose one of {', '.join(ACTIONS)}")
    flags = parse(action, argv[1:])
    try:
        with user_input():
            outcome = ACTIONS[action](flags)
    except BadInput as error:
        if not isinstance(error.__cause__, BrokenCheckpointError):
            raise
        _fail(action, str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        advice = "; run the same command again and it goes on" if action == "restore" else ""
        _fail(action, f"{error}{advice}")
    try:
        _tell(outcome, flags)
    except BrokenPipeError:
        raise
    except OSError as error:
        _fail(action, str(error))
    if not outcome.fine:
        raise SystemExit(1)


def _ls(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.ls import ls

    if not flags.places:
        return ls(None)
    _count("ls", flags, 1)
    return ls(_place(flags.places[0], flags))


def _show(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.diff import diff
    from phalanx.checkpoint.tool.show import show

    if flags.given.diff:
        _count("show", flags, 2)
        a, b = (_place(text, flags) for text in flags.places)
        return diff(a, b, step=flags.step)
    if not flags.places:
        _count("show", flags, 1)
    place, *patterns = flags.places
    return show(_place(place, flags), step=flags.step, patterns=patterns, shards=flags.given.shards)


def _verify(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.check import verify

    _count("verify", flags, 1)
    other = flags.given.other
    if other is not None and not flags.given.repair:
        raise BadInput(f"--from {other}: is what to repair from; add --repair")
    return verify(
        _place(flags.places[0], flags),
        step=flags.step,
        repair=flags.given.repair,
        other=None if other is None else _place(other, flags),
    )


def _restore(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.restore.verb import restore

    _count("restore", flags, 2)
    given = flags.given
    cut: Callable[[Manifest], Cutting] | None = None
    if given.layout is not None:
        wanted = pairs("--layout", given.layout)

        def cut(manifest: Manifest) -> Cutting:
            return _cut_for(manifest, wanted)

    elif given.staging is not None:
        raise BadInput(f"--staging {given.staging}: has no effect without --layout")
    return restore(
        _place(flags.places[0], flags),
        flags.places[1],
        config=StorageConfig(options=flags.options),
        step=flags.step,
        cut=cut,
        staging=given.staging,
        limit_mb_s=megabytes("--limit", given.limit),
        dry_run=given.dry_run,
    )


def _cut_for(manifest: Manifest, wanted: dict[str, str]) -> Cutting:
    """How ranks of another layout hold the tensors of a checkpoint."""
    from phalanx.checkpoint.snapshot.shares import assign
    from phalanx.checkpoint.tool.reading import tensors_of
    from phalanx.train.plan.saved_layout import AXES, held_by_ranks, layout_config

    config = layout_config(manifest.meta, wanted)
    tables = tuple(assign(held_by_ranks(config, tensors_of(manifest))))
    return Cutting(
        text=",".join(f"{key}={value}" for key, value in sorted(wanted.items())),
        tables=tables,
        layout={axis: getattr(config.parallel, axis) for axis in AXES},
    )


def _convert(flags: Flags) -> Outcome:
    _count("convert", flags, 2)
    from phalanx.checkpoint.tool import convert

    source, target = flags.places
    if "://" not in target:
        _no_file("convert", Path(target))
    if "://" not in source and convert.is_dcp(Path(source)):
        storage = open_storage(target, StorageConfig(options=flags.options))
        return convert.convert_from_dcp(Path(source), storage, step=flags.step)
    if "://" in target:
        raise BadInput(f"checkpoint convert: {target}: torch's folder must be on this machine")
    return convert.convert_to_dcp(_place(source, flags), Path(target), step=flags.step)


def _gc(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.gc import gc

    _count("gc", flags, 1)
    if flags.given.memory:
        return _gc_memory(flags)
    keep = flags.given.keep
    return gc(
        _place(flags.places[0], flags),
        keep=None if keep is None else whole("--keep", keep, least=1),
        keep_every=whole("--keep-every", flags.given.keep_every, least=0),
        dry_run=flags.given.dry_run,
    )


def _gc_memory(flags: Flags) -> Outcome:
    from phalanx.checkpoint.tool.gc_memory import gc_memory

    for flag, value in (("--keep", flags.given.keep), ("--keep-every", flags.given.keep_every)):
        if value not in (None, "0"):
            raise BadInput(f"{flag} {value}: has no effect with --memory, which deletes no files")
    return gc_memory(_place(flags.places[0], flags, gone=True), dry_run=flags.given.dry_run)


def _import(flags: Flags) -> Outcome:
    source, target = _two_folders("import", flags)
    done = import_module("phalanx.train.model.hf").import_hf(source, target)
    tokenizer = f" data.tokenizer={done.tokenizer}" if done.tokenizer else ""
    lines = [
        f"wrote {done.checkpoint} and {done.model_file}",
        f"train from it: phalanx train --config-dir {target} model={done.model_file.stem} "
        f"checkpoint.dir={target}{tokenizer}",
    ]
    files = {"checkpoint": str(done.checkpoint), "model_file": str(done.model_file)}
    return Outcome(lines=lines, content=files)


def _export(flags: Flags) -> Outcome:
    source, target = _two_folders("export", flags)
    dtype = {} if flags.given.dtype is None else {"dtype": flags.given.dtype}
    done = import_module("phalanx.train.model.hf").export_hf(source, target, **dtype)
    return Outcome(lines=[f"wrote {done}"], content={"folder": str(done)})


def _two_folders(action: str, flags: Flags) -> tuple[Path, Path]:
    if len(flags.places) != 2:
        raise BadInput(f"checkpoint {action}: give two folders: SOURCE TARGET")
    source, target = map(Path, flags.places)
    if not source.is_dir():
        raise BadInput(f"checkpoint {action}: {source}: no such folder")
    _no_file(action, target)
    return source, target


def _no_file(action: str, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BadInput(f"checkpoint {action}: {target}: is a file, not a folder")


ACTIONS: dict[str, Callable[[Flags], Outcome]] = {
    "ls": _ls,
    "show": _show,
    "verify": _verify,
    "restore": _restore,
    "convert": _convert,
    "export": _export,
    "import": _import,
    "gc": _gc,
}


def _place(text: str, flags: Flags, *, gone: bool = False) -> CheckpointPlace:
    """Where a word points; a run whose checkpoints are elsewhere says so in its config.yaml.

    Args:
        gone: whether what stood there may be deleted.
    """
    config = StorageConfig(options=flags.options)
    inside = (Path(text) / INSIDE_RUN).is_dir()
    written = Path(text) / "config.yaml"
    if "://" not in text and written.is_file():
        try:
            where, options = _written_place(written)
        except BadInput:
            if not inside:
                raise
            where, options = "", {}  # the checkpoints stand here, and are what was asked for
        if "://" in where or (not inside and Path(where).is_dir()):
            return find(where, StorageConfig(options=options | flags.options))
    if gone and not Path(text).is_file() and not (storage := open_storage(text, config)).names():
        return CheckpointPlace(storage=storage, folder=None, text=text)
    return find(text, config)


def _written_place(written: Path) -> tuple[str, dict[str, Any]]:
    """A run's checkpoint.dir and checkpoint.storage.options, as its config.yaml has them.

    Raises:
        BadInput: it is damaged.
    """
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(written))
        there = saved.get("checkpoint") or {}
        options = (there.get("storage") or {}).get("options") or {}
        return str(there.get("dir", "")), dict(options)
    except (AttributeError, TypeError):
        why = "not a run's settings"
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        why = str(error).splitlines()[0]
    raise BadInput(f"{written}: cannot be read ({why}); mend it, or give the folder of checkpoints")


def _count(action: str, flags: Flags, count: int) -> None:
    if len(flags.places) != count:
        what = "one place" if count == 1 else "two places"
        raise BadInput(f"checkpoint {action}: give {what}: {USAGES[action]}")


def _tell(outcome: Outcome, flags: Flags) -> None:
    text = json.dumps(outcome.content, indent=2)
    if flags.json_file == "-":
        _print(text)
        return
    _print("\n".join(outcome.lines))
    if flags.json_file is not None:
        path = Path(flags.json_file)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text + "\n")
        partial.replace(path)
        print(f"wrote {path}", file=sys.stderr)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        raise OSError(error.errno, error.strerror, "standard output") from error


def _fail(action: str, message: str) -> NoReturn:
    print(f"phalanx: checkpoint {action}: {message}", file=sys.stderr)
    raise SystemExit(1)
