"""Keys that are true or false take nothing else; OmegaConf alone would take 2 for true."""

from pathlib import Path

import pytest

from phalanx.launch.config.compose import Source, compose
from phalanx.launch.config.keys import all_keys

KEYS = [key for key in all_keys() if key.type == "true | false"]


def refused(override: str, source: Source | None = None) -> str:
    with pytest.raises(ValueError, match="neither true nor false") as caught:
        compose([override], source)
    return str(caught.value)


@pytest.mark.parametrize("key", [key.name for key in KEYS])
def test_a_number_is_neither_true_nor_false(key: str) -> None:
    assert refused(f"{key}=2") == f"{key}=2: '2' is neither true nor false"


@pytest.mark.parametrize("value", ["0", "1", "-1", "1.0", "'2'", "maybe", "[true]"])
def test_nor_is_anything_else(value: str) -> None:
    key = "checkpoint.async_save"
    said = value.strip("'").replace("true", "True")
    assert refused(f"{key}={value}") == f"{key}={value}: '{said}' is neither true nor false"


def test_a_users_file_is_held_to_it_too(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ncheckpoint: {async_save: 2}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    said = refused("experiment=mine", Source(config_dir=str(tmp_path)))
    assert said == (
        "checkpoint.async_save: '2' is neither true nor false (in configs experiment/mine)"
    )


def test_true_and_false_are_taken() -> None:
    assert len(KEYS) > 10
    compose([f"{key.name}={key.default}" for key in KEYS])
    for text, value in (("true", True), ("false", False), ("True", True), ("off", False)):
        assert compose([f"checkpoint.async_save={text}"]).checkpoint.async_save is value
