"""Every key that a user may set, with type, default and meaning, read from the schema itself."""

import ast
import difflib
import inspect
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from typing import Any, Union, get_args, get_origin, get_type_hints

from phalanx.train.config import Config


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of the schema."""

    name: str
    """Full path, such as training.steps."""
    type: str
    default: str
    meaning: str


@cache
def all_keys() -> tuple[Key, ...]:
    """The schema's keys, in the order that they are declared."""
    return tuple(_walk(Config, ""))


def near(key: str) -> str:
    """What the user may have meant by an unknown key."""
    names = [item.name for item in all_keys()]
    leaf = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.75)
    same = [name for name in names if name.rpartition(".")[2] == leaf]
    leaves = {name.rpartition(".")[2]: name for name in names}
    similar = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.75)]
    sections = difflib.get_close_matches(key, sections_of(names), n=1, cutoff=0.7)
    found = list(dict.fromkeys(same + close + similar + sections))[:3]
    if found:
        return f"did you mean {' or '.join(found)}?"
    return "`phalanx train --help` lists the keys"


def sections_of(names: list[str]) -> list[str]:
    """The first parts of key names."""
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def docstrings(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass, on one line."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            texts[statement.target.id] = " ".join(str(following.value.value).split())
    return texts


def _walk(kind: type, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(kind)
    meanings = docstrings(kind)
    for item in fields(kind):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{item.name}.")  # type: ignore[arg-type]
            continue
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        yield Key(
            name=f"{prefix}{item.name}",
            type=_type_name(hint),
            default=_shown(default),
            meaning=meanings.get(item.name, ""),
        )


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(part) for part in get_args(hint))
    if hint is type(None):
        return "empty"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(hint.__members__)
    if get_origin(hint) is list:
        return f"list of {_type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    if is_dataclass(hint):
        return "{" + ", ".join(item.name for item in fields(hint)) + "}"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}.get(
        hint.__name__, hint.__name__
    )


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", [], {}):
        return "empty"
    return repr(value)[1:-1] if isinstance(value, str) else str(value)
