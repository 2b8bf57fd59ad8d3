"""Every YAML in configs/ composes into a valid run, and published models have published sizes."""

from functools import cache

import pytest
import torch

from phalanx.launch.config.compose import compose
from phalanx.train.config import Config
from phalanx.train.model.transformer import Transformer
from tests import ROOT

CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "experiment"
)

PUBLISHED = {
    "llama3_2_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
}


@cache
def composed(override: str) -> Config:
    """What `override` alone makes, composed once for all tests."""
    return compose([override])


def test_every_yaml_is_an_option_or_the_root() -> None:
    found = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    named = {f"{group}/{option}.yaml" for group, option in OPTIONS}
    named |= {f"experiment/{name}.yaml" for name in EXPERIMENTS}
    assert found == named | {"config.yaml"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes(group: str, option: str) -> None:
    assert isinstance(composed(f"{group}={option}"), Config)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_under_its_own_name(name: str) -> None:
    config = composed(f"experiment={name}")
    assert config.run.name == name
    assert config.run.dir == f"runs/{name}"
    assert config.checkpoint.dir == f"runs/{name}/checkpoints"


@pytest.mark.parametrize("name", sorted({*EXPERIMENTS} - {"tiny"}))
def test_experiment_takes_the_model_of_its_name(name: str) -> None:
    assert composed(f"experiment={name}").model == composed(f"model={name}").model


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_fits_the_machines_it_names(name: str) -> None:
    """Degrees, batch and microbatches agree on 8 ranks a machine (the demo: on its 4)."""
    config = composed(f"experiment={name}")
    world_size = 4 if name == "tiny" else config.launch.nodes * 8
    assert config.num_microbatches(world_size) >= config.parallel.pp


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_parameter_count(name: str) -> None:
    assert _num_parameters(name) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "about"), [("125m", 125e6), ("1b", 1.1e9)])
def test_parameter_count_is_near_the_name(name: str, about: float) -> None:
    assert _num_parameters(name) == pytest.approx(about, rel=0.05)


def _num_parameters(name: str) -> int:
    with torch.device("meta"):
        model = Transformer(composed(f"model={name}").model)
    return sum(parameter.numel() for parameter in model.parameters())
