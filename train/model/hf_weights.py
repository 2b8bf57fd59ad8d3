"""The tensors of a Hugging Face folder: names, and reading and writing safetensors files."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phalanx.checkpoint.chunks import plain_chunk
from phalanx.checkpoint.errors import BrokenCheckpointError, CheckpointError
from phalanx.checkpoint.load.reads import stored_tensors
from phalanx.checkpoint.load.reshard import load
from phalanx.checkpoint.load.sources import Source
from phalanx.checkpoint.peers import Peers
from phalanx.train.model.config import ModelConfig
from phalanx.train.model.transformer import Transformer, parameter_name

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Most bytes of tensors in one exported file."""

TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of a parameter."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's saved parameters."""
    with torch.device("meta"):
        model = Transformer(config)
    return {
        parameter_name(name, config): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }


def mapped_tensors(
    src: Path, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, mapped from their files: no memory is taken until they are read.

    Raises:
        ValueError: the folder has not the tensors that the model needs.
        BrokenCheckpointError: a file is damaged, or one that the index names is missing.
    """
    places = _places(src)
    wanted = {hf_name(name): name for name in shapes}
    missing = [name for name in wanted if name not in places]
    if missing:
        raise ValueError(f"{src}: {len(missing)} tensors are missing: {', '.join(missing[:5])}")
    ignored = {"lm_head.weight"} if "head.weight" not in shapes else set()
    unknown = [
        name
        for name in places
        if name not in wanted and name not in ignored and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown:
        raise ValueError(
            f"{src}: {len(unknown)} tensors have no place in the model that config.json "
            f"describes: {', '.join(unknown[:5])}"
        )
    for file in sorted(set(places.values())):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dict)
                if name not in wanted:
                    continue
                tensor = tensors.get_tensor(name)
                shape = shapes[wanted[name]]
                if tuple(tensor.shape) != shape:
                    raise ValueError(
                        f"{file}: {name} has shape {list(tensor.shape)}; config.json asks for "
                        f"{list(shape)}"
                    )
                yield wanted[name], tensor


def _places(src: Path) -> dict[str, Path]:
    """The file of every tensor of a Hugging Face folder."""
    index = src / INDEX
    if index.is_file():
        files = {src / name for name in _indexed(index)}
    else:
        files = {src / "model.safetensors"}
    places: dict[str, Path] = {}
    for file in sorted(files):
        if not file.is_file():
            if index.is_file():
                raise BrokenCheckpointError(f"{file} is missing; {INDEX} names it")
            raise ValueError(f"{src}: {file.name} is missing; only safetensors can be imported")
        with _opened(file) as tensors:
            places |= dict.fromkeys(tensors.keys(), file)
    return places


def _indexed(index: Path) -> list[str]:
    """The files that an index names."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise BrokenCheckpointError(f"{index} is damaged: no weight_map of tensors to files")
    return list(found.values())


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds an object.

    Raises:
        BrokenCheckpointError: it is damaged; names it.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise BrokenCheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise BrokenCheckpointError(f"{path} is damaged: it holds no object")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, to read from.

    Raises:
        BrokenCheckpointError: it is damaged; names it.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise BrokenCheckpointError(f"{file} is damaged: {error}") from None


def write_weights(source: Source, dst: Path, config: ModelConfig, *, dtype: torch.dtype) -> None:
    """Read and write the model one output file at a time.

    Raises:
        ValueError: tensors are missing or differ in shape; names them.
        BrokenCheckpointError: one is damaged; names file and shard.
        OSError: something cannot be read or written.
    """
    shapes = parameter_shapes(config)
    stored = stored_tensors(source.parts())
    missing = [name for name in shapes if f"model.{name}" not in stored]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors of its model: {', '.join(missing[:5])}"
        )
    files = _split(shapes, dtype.itemsize)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = (
            "model.safetensors"
            if len(files) == 1
            else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        tensors = {name: torch.empty(shapes[name], dtype=dtype) for name in names}
        chunks = {f"model.{name}": plain_chunk(tensor) for name, tensor in tensors.items()}
        try:
            load(source, chunks, peers=Peers(None))
        except CheckpointError as error:  # it says which rank, and here is one alone
            raise (error.__cause__ or error) from None
        save_file(
            {hf_name(name): tensor for name, tensor in tensors.items()},
            dst / file,
            metadata={"format": "pt"},
        )
        weight_map |= {hf_name(name): file for name in names}
    if len(files) > 1:
        total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (dst / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _split(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Parameters into files of at most SHARD_BYTES, in order."""
    files: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = prod(shape) * itemsize
        if files[-1] and filled + size > SHARD_BYTES:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files
