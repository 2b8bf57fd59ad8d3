"""Weights from and to Hugging Face folders: `phalanx checkpoint import | export`.

Both run in one process, without ranks, and hold no more than one output file's tensors.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from phalanx.checkpoint.chunks import plain_chunk
from phalanx.checkpoint.format.folders import complete_folders
from phalanx.checkpoint.format.writer import write_tensors
from phalanx.checkpoint.load.sources import StorageSource
from phalanx.checkpoint.storage.open import open_storage
from phalanx.checkpoint.tool.places import find
from phalanx.train.model.config import ModelConfig, RopeScalingConfig
from phalanx.train.model.hf_config import from_hf_config, to_hf_config
from phalanx.train.model.hf_weights import (
    mapped_tensors,
    parameter_shapes,
    read_json,
    write_weights,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

KEPT_FIELDS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""What of config.json goes through an import to a later export."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import wrote."""

    checkpoint: Path
    """The checkpoint's folder, of step 0."""
    model_file: Path
    """YAML of the config group `model`: `--config-dir DST model=NAME`."""
    tokenizer: Path | None
    """The tokenizer.json, where there was one."""


def import_hf(src: Path, dst: Path) -> Imported:
    """Write the Hugging Face folder `src` as a checkpoint of step 0 under `dst`.

    `phalanx train --config-dir DST model=NAME checkpoint.dir=DST` then starts from these weights.

    Raises:
        ValueError: a folder, file, field or tensor is missing or not what this model computes.
        BrokenCheckpointError: a file of `src` is damaged; names it.
        OSError: something cannot be read or written.
    """
    if not (src / "config.json").is_file():
        raise ValueError(f"{src}: no config.json there; give a folder of Hugging Face weights")
    storage = open_storage(dst)
    if complete_folders(storage):
        raise ValueError(f"{dst}: holds checkpoints already; give a new folder")
    hf = read_json(src / "config.json")
    config = from_hf_config(hf)
    chunks = {
        f"model.{name}": plain_chunk(tensor)
        for name, tensor in mapped_tensors(src, parameter_shapes(config))
    }
    meta = {
        "kind": "weights",
        "step": 0,
        "config": {"model": asdict(config)},
        "hf": {key: hf[key] for key in KEPT_FIELDS if key in hf},
    }
    folder = write_tensors(storage, 0, chunks, meta)
    model_file = _write_model_file(src, dst, config)
    for file in TOKENIZER_FILES:
        if (src / file).is_file():
            shutil.copyfile(src / file, dst / file)
    tokenizer = dst / "tokenizer.json"
    return Imported(
        checkpoint=dst / folder,
        model_file=model_file,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def export_hf(src: Path | str, dst: Path, *, dtype: str = "bf16") -> Path:
    """Write the checkpoint `src` (a step's folder, or the newest in a folder of them; or a URL) for
    Hugging Face: config.json, safetensors files with an index, and the tokenizer if it is found.

    Raises:
        ValueError: the checkpoint is missing, `dst` is in use, or no architecture of transformers
            computes the model.
        BrokenCheckpointError: the checkpoint is damaged; names file and shard.
        OSError: something cannot be read or written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    if dst.exists() and any(dst.iterdir()):
        raise ValueError(f"{dst}: is not empty; give a new folder")
    place = find(str(src))
    folder = place.one()
    where = place.url(folder)
    manifest = place.manifest(folder)
    config = _model_config(where, manifest.meta)
    hf = to_hf_config(
        config,
        dtype=str(DTYPES[dtype]).removeprefix("torch."),
        max_seq_len=_max_seq_len(config, manifest.meta),
    )
    hf |= {key: value for key, value in manifest.meta.get("hf", {}).items() if key not in hf}
    dst.mkdir(parents=True, exist_ok=True)
    try:
        source = StorageSource(place.storage, folder, manifest)
        write_weights(source, dst, config, dtype=DTYPES[dtype])
    except BaseException:
        shutil.rmtree(dst)  # it was empty: half a model is of no use
        raise
    root = place.storage.local
    tokenizer = _tokenizer_folder([root / folder, root] if root else [], manifest.meta)
    for file in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, dst / file)
    (dst / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
    return dst


def _write_model_file(src: Path, dst: Path, config: ModelConfig) -> Path:
    name = re.sub(r"[^a-z0-9]+", "_", src.resolve().name.lower()).strip("_") or "imported"
    path = dst / "model" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# Imported from {src.resolve().name}: --config-dir {dst} model={name} "
        f"checkpoint.dir={dst}\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
    )
    return path


def _model_config(where: str, meta: Mapping[str, Any]) -> ModelConfig:
    try:
        fields = dict(meta["config"]["model"])
        return ModelConfig(**fields | {"rope_scaling": RopeScalingConfig(**fields["rope_scaling"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: its manifest does not describe a model ({error!r})") from None


def _max_seq_len(config: ModelConfig, meta: Mapping[str, Any]) -> int:
    """Tokens of context: as imported, else as trained."""
    imported = meta.get("hf", {}).get("max_position_embeddings")
    trained = meta["config"].get("training", {}).get("seq_len")
    scaling = config.rope_scaling
    return int(imported or trained or scaling.factor * scaling.original_max_seq_len)


def _tokenizer_folder(beside: Sequence[Path], meta: Mapping[str, Any]) -> Path | None:
    """Where the tokenizer.json lies: by the checkpoint, or where the run read it."""
    data = meta["config"].get("data", {})
    places = [*beside]
    if data.get("tokenizer"):
        places.append(Path(data["tokenizer"]).parent)
    elif data.get("dir"):
        places.append(Path(data["dir"]))
    return next((place for place in places if (place / "tokenizer.json").is_file()), None)
