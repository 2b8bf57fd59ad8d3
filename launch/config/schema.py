"""The schema that Hydra merges every file and override into, stricter than OmegaConf's own."""

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import BooleanNode, DictConfig, OmegaConf, ValidationError

from phalanx.train.config import Config


def register_schema() -> None:
    """Make the schema known to Hydra as `schema`, the first of configs/config.yaml's defaults."""
    schema = OmegaConf.structured(Config)
    _refuse_numbers(schema)
    # Hydra closes every node against new keys; these are mappings that the user fills.
    OmegaConf.set_struct(schema.verify.resume_in, False)
    OmegaConf.set_struct(schema.checkpoint.storage.options, False)
    ConfigStore.instance().store(name="schema", node=schema)


class TrueOrFalse(BooleanNode):
    """A value that is true or false, and no number: OmegaConf takes 2 for true."""

    def _validate_and_convert_impl(self, value: Any) -> bool:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValidationError("Value '$VALUE' is not a valid bool (type $VALUE_TYPE)")
        return super()._validate_and_convert_impl(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrueOrFalse":
        copy = TrueOrFalse()
        self._deepcopy_impl(copy, memo)
        return copy


def _refuse_numbers(node: DictConfig) -> None:
    """Make every true-or-false key below refuse numbers."""
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig):
            _refuse_numbers(child)
        elif isinstance(child, BooleanNode):
            child.__class__ = TrueOrFalse
