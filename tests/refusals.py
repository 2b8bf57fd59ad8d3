"""Wrong settings and the words that their refusals must hold; which refusals none of them reaches.

Every `raise` of every config.py has a case in the test module that looks at that file.
"""

import ast
import importlib
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from phalanx.parallel.config import ParallelConfig
from phalanx.train.config import Config, TrainingConfig
from phalanx.train.model.config import ModelConfig
from tests import ROOT

MODULES = [
    "parallel.config",
    "train.config",
    "train.data.config",
    "train.model.config",
    "train.optim.config",
]
"""Looked at by test_config.py."""
PIPELINE_MODULES = ["parallel.pipeline.config"]
"""By test_config_pipeline.py."""
ZERO_MODULES = ["parallel.zero.config"]
"""By test_config_zero.py."""

CHECKPOINT_MODULES = ["checkpoint.config", "checkpoint.storage.config"]
"""By test_config_checkpoint.py."""

NAN, INF = float("nan"), float("inf")
TINY = ModelConfig(vocab_size=300, dim=36, num_layers=5, num_heads=6, num_kv_heads=2, ffn_dim=52)
PP2 = ParallelConfig(pp=2, dp_shard=1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrong setting and the words that its refusal must hold."""

    make: Callable[[], object]
    words: tuple[str, ...]


def of(part: type, prefix: str, key: str, value: object, *words: str, **others: object) -> Case:
    """One wrong `value` of one key."""
    shown = getattr(value, "value", value)
    shown = str(shown).lower() if isinstance(shown, bool) else shown
    return Case(
        make=lambda: part(**{key: value}, **others), words=(f"{prefix}.{key}={shown}", *words)
    )


def whole(words: tuple[str, ...], **parts: object) -> Case:
    """A wrong combination of parts, each right in itself."""
    return Case(make=lambda: Config(**parts), words=words)  # type: ignore[arg-type]


def batches(words: tuple[str, ...], world_size: int, **parts: object) -> Case:
    """A batch that does not fit a world."""
    return Case(
        make=lambda: Config(**parts).num_microbatches(world_size),  # type: ignore[arg-type]
        words=words,
    )


def sized_batch(size: int) -> TrainingConfig:
    """A batch of `size` samples."""
    return TrainingConfig(global_batch_size=size, seq_len=32)


def refusal(case: Case) -> ValueError:
    """What a case is answered with."""
    with pytest.raises(ValueError, match="=") as caught:
        case.make()
    return caught.value


def check_refusal(case: Case) -> None:
    """It is one line with all the words."""
    message = str(refusal(case))
    assert [word for word in case.words if word not in message] == [], message
    assert "\n" not in message


def unreached(modules: Iterable[str], cases: Iterable[Case]) -> list[str]:
    """Each `raise` in these modules that no case comes to, as file:line."""
    reached = set()
    for case in cases:
        frame = traceback.extract_tb(refusal(case).__traceback__)[-1]
        reached.add((Path(frame.filename).resolve(), frame.lineno))
    return [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in map(_source_of, modules)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
        and not any((path, n) in reached for n in range(node.lineno, (node.end_lineno or 0) + 1))
    ]


def _source_of(name: str) -> Path:
    file = importlib.import_module(f"phalanx.{name}").__file__
    assert file is not None
    return Path(file).resolve()
