"""Whether a run goes on from the checkpoint that its folder holds.

Torch-free: the launching process refuses before it writes anything, and every rank asks again.
"""

from collections.abc import Iterable
from dataclasses import asdict
from enum import Enum
from typing import Any

from phalanx.checkpoint.config import CheckpointConfig
from phalanx.checkpoint.errors import BrokenCheckpointError
from phalanx.checkpoint.format.folders import complete_folders
from phalanx.checkpoint.format.manifest import Manifest, read_manifest
from phalanx.checkpoint.storage.open import open_storage
from phalanx.parallel.zero.config import ZeroConfig
from phalanx.train.config import Config
from phalanx.train.optim.config import OptimizerName

ROUNDING = ("quantize_weights", "quantize_gradients", "error_feedback")
"""Settings of `zero` that change what is computed; the others say where."""

KIND = "training"
"""meta["kind"] of a checkpoint that a run can go on from; "weights" holds parameters alone."""


def check_resume(config: Config) -> None:
    """Look for a checkpoint, and refuse a run that does not continue it.

    Only manifests are read. Where a file of the newest checkpoint is broken, the ranks go back to
    an older one of the same run.

    Raises:
        ValueError: one line that says which setting, and what would be right.
    """
    try:
        newest = _newest(config.checkpoint)
    except NotADirectoryError:  # nothing to go on from; told where the folder is to be made
        return
    except OSError as error:
        raise ValueError(
            f"checkpoint.dir={config.checkpoint.dir}: cannot be read ({error.strerror or error})"
        ) from error
    if newest is None:
        return
    check_wanted(newest.step, config)
    if newest.meta.get("kind") == KIND:
        check_continues(newest.meta, config)


def _newest(config: CheckpointConfig) -> Manifest | None:
    """The newest manifest that holds; the ranks report those that do not."""
    storage = open_storage(config.dir, config.storage)
    for folder in reversed(complete_folders(storage).values()):
        try:
            return read_manifest(storage, folder)
        except BrokenCheckpointError:
            continue
    return None


def check_wanted(step: int, config: Config) -> None:
    """Refuse to mix a new run with the one whose checkpoint of `step` is there.

    Raises:
        ValueError: checkpoint.resume=false.
    """
    if not config.checkpoint.resume:
        raise ValueError(
            f"checkpoint.resume=false: {config.checkpoint.dir} holds a run's checkpoint of step "
            f"{step} (or its job.json leads to a snapshot in memory), which a new run would mix "
            "with its own; choose another run.dir, or remove it"
        )


def changed_settings(meta: dict[str, Any], config: Config) -> list[str]:
    """What differs from the saved run among settings that change what is computed.

    Layout, launch and checkpoint settings may differ freely.
    """
    before, now = meta.get("config", {}), plain_settings(config)
    sections: Iterable[str] = ("training", "data", "model", "optim", "precision")
    changed = [
        f"{section}.{key}: {old!r} -> {now[section].get(key)!r}"
        for section in sections
        for key, old in before.get(section, {}).items()
        if now[section].get(key) != old and key not in ("prefetch", "eval_every", "eval_batches")
    ]
    rounded = _plain(asdict(ZeroConfig())) | before.get("zero", {})
    return changed + [
        f"zero.{key}: {rounded[key]!r} -> {now['zero'][key]!r}"
        for key in ROUNDING
        if now["zero"][key] != rounded[key]
    ]


def check_continues(meta: dict[str, Any], config: Config) -> int:
    """The step that a run goes on from.

    Raises:
        ValueError: the samples seen so far are no whole number of this run's batches, the order of
            samples would not be the one that the saved run followed, or its optimizer was another.
    """
    step, samples = int(meta["step"]), int(meta["samples"])
    size = config.training.global_batch_size
    if samples != step * size:
        raise ValueError(
            f"training.global_batch_size={size}: the checkpoint was made with "
            f"{samples // max(1, step)}; keep it, or start a new run.dir from the weights alone "
            "(phalanx checkpoint export, then import)"
        )
    saved = meta.get("config", {}).get("training", {})
    for key in ("seed", "seq_len"):
        value = getattr(config.training, key)
        if saved.get(key, value) != value:
            raise ValueError(
                f"training.{key}={value}: the checkpoint was made with {saved[key]}, and another "
                "value would repeat or skip samples; keep it, or start a new run.dir"
            )
    name = config.optim.name.name
    before = meta.get("config", {}).get("optim", {}).get("name", OptimizerName.adamw.name)
    if before != name:
        raise ValueError(
            f"optim.name={name}: the checkpoint was made with {before}, whose states have another "
            "form; keep it, or start a new run.dir from the weights alone (phalanx checkpoint "
            "export, then import)"
        )
    return step


def plain_settings(config: Config) -> dict[str, Any]:
    """A configuration as JSON holds it."""
    settings: dict[str, Any] = _plain(asdict(config))
    return settings


def _plain(value: Any) -> Any:
    """Enums as their names, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value
