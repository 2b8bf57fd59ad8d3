"""A Hugging Face `config.json` to a `ModelConfig` and back, for Llama 3, Qwen 2 and Qwen 3.

What a config.json says that this model does not compute is refused by name and value.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phalanx.train.model.config import ModelConfig, RopeScalingConfig


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of checkpoints, and what its config.json means where it says nothing."""

    name: str
    """The class in transformers."""
    model_type: str
    """`model_type` of its config.json."""
    qk_norm: bool
    """Normed queries and keys."""
    attention_bias: bool
    """Biases on queries, keys and values."""
    kv_heads: int | None
    """num_key_value_heads where it is not given; None = num_attention_heads."""
    head_dim: int | None
    """head_dim where it is not given; None = hidden_size / num_attention_heads."""


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="LlamaForCausalLM",
            model_type="llama",
            qk_norm=False,
            attention_bias=False,
            kv_heads=None,
            head_dim=None,
        ),
        Architecture(
            name="Qwen2ForCausalLM",
            model_type="qwen2",
            qk_norm=False,
            attention_bias=True,
            kv_heads=32,
            head_dim=None,
        ),
        Architecture(
            name="Qwen3ForCausalLM",
            model_type="qwen3",
            qk_norm=True,
            attention_bias=False,
            kv_heads=32,
            head_dim=128,
        ),
    )
}

ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "use_sliding_window": False,
    "quantization_config": None,
}
"""Fields of which one value is computed here; it is also their default."""

NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def architecture_of(hf: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json names.

    Raises:
        ValueError: it is none of those that this model computes.
    """
    names = hf.get("architectures") or []
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ValueError(
            f"config.json: architectures={names} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[names[0]]


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a config.json.

    Raises:
        ValueError: a field is missing, or asks for what this model does not compute.
    """
    architecture = architecture_of(hf)
    for field in NEEDED:
        if hf.get(field) is None:
            raise ValueError(f"config.json: {field} is missing")
        if not isinstance(hf[field], int):
            raise ValueError(f"config.json: {field}={hf[field]!r} must be a whole number")
    for field, only in ONLY_VALUES.items():
        value = hf.get(field, only)
        if value != only:
            raise ValueError(f"config.json: {field}={value!r} is not supported; only {only!r} is")
    other = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    if other:
        raise ValueError(
            f"config.json: layer_types has {', '.join(other)}; only full_attention is supported"
        )
    heads = hf["num_attention_heads"]
    rope_theta, scaling = _rope(hf)
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or architecture.kv_heads or heads,
        head_dim=hf.get("head_dim") or architecture.head_dim,
        ffn_dim=hf["intermediate_size"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=scaling,
        qk_norm=architecture.qk_norm,
        attention_bias=architecture.attention_bias,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        init_std=hf.get("initializer_range", 0.02),
    )


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScalingConfig]:
    """Base and scaling, from transformers 5's rope_parameters or 4's rope_theta, rope_scaling."""
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    given = hf.get(field) or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"config.json: {field}={given!r}: must be an object")
    rope = dict(given)
    theta = _number("rope_theta", rope.pop("rope_theta", hf.get("rope_theta", 10000.0)))
    legacy_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", legacy_kind)
    partial = rope.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(
            f"config.json: {field}.partial_rotary_factor={partial} is not supported; only 1.0 is"
        )
    if kind == "default":
        return theta, RopeScalingConfig()
    if kind != "llama3":
        raise ValueError(
            f"config.json: {field}.rope_type={kind!r} is not supported; supported are default "
            "and llama3"
        )
    needed = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"config.json: {field} of type llama3 lacks {', '.join(missing)}")

    def number(key: str) -> float:
        return _number(f"{field}.{key}", rope[key])

    return theta, RopeScalingConfig(
        factor=number("factor"),
        low_freq_factor=number("low_freq_factor"),
        high_freq_factor=number("high_freq_factor"),
        original_max_seq_len=int(number("original_max_position_embeddings")),
    )


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"config.json: {field}={value!r}: must be a number")
    return float(value)


def to_hf_config(config: ModelConfig, *, dtype: str, max_seq_len: int) -> dict[str, Any]:
    """The config.json of a model, in the form that transformers 4 and 5 and others read.

    Args:
        dtype: the weights' type, by torch's name.
        max_seq_len: tokens of context that the model was trained for.

    Raises:
        ValueError: no architecture of transformers computes this model.
    """
    fitting = [
        architecture
        for architecture in ARCHITECTURES.values()
        if (architecture.qk_norm, architecture.attention_bias)
        == (config.qk_norm, config.attention_bias)
    ]
    if not fitting:
        raise ValueError(
            f"model.qk_norm={config.qk_norm} with model.attention_bias={config.attention_bias}: "
            f"none of {', '.join(ARCHITECTURES)} computes this"
        )
    hf = {
        "architectures": [fitting[0].name],
        "model_type": fitting[0].model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.size_of_head,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if not config.attention_bias:
        hf["attention_bias"] = False
    if config.rope_scaling.factor != 1:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_seq_len,
        }
    return hf
