"""Hugging Face weights both ways: equal logits, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from phalanx.checkpoint.chunks import plain_chunk
from phalanx.checkpoint.format.manifest import read_manifest
from phalanx.checkpoint.format.writer import write_tensors
from phalanx.checkpoint.load.reshard import load
from phalanx.checkpoint.load.sources import StorageSource
from phalanx.checkpoint.peers import Peers
from phalanx.checkpoint.storage.open import open_storage
from phalanx.launch.config.compose import Source, compose
from phalanx.train.model import hf_weights
from phalanx.train.model.config import ModelConfig, RopeScalingConfig
from phalanx.train.model.hf import export_hf, import_hf
from phalanx.train.model.hf_config import from_hf_config, to_hf_config
from phalanx.train.model.transformer import Transformer, parameter_name

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama3() -> Any:
    return transformers.LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3), rms_norm_eps=1e-5)


def llama3_tied() -> Any:
    return transformers.LlamaConfig(**SMALL, rope_parameters=dict(LLAMA3), tie_word_embeddings=True)


def qwen3() -> Any:
    return transformers.Qwen3Config(**SMALL, head_dim=16)


def qwen3_tied() -> Any:
    return transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True)


def qwen2() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return transformers.Qwen2Config(**SMALL, rope_parameters=rope)


FAMILIES = [llama3, llama3_tied, qwen3, qwen3_tied, qwen2]


def random_peer(config: Any) -> Any:
    """transformers' model with every weight random, norms and biases too."""
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in peer.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if bool((parameter == 1).all()) else 0.0, 0.3)
    return peer.eval()


def tokens_of(vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (2, 100), generator=torch.Generator().manual_seed(1))


def peer_logits(peer: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return peer(tokens).logits


def our_logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens, positions_BS=torch.arange(tokens.shape[1]).expand_as(tokens))


def load_weights(model: Transformer, folder: Path) -> None:
    chunks = {
        f"model.{parameter_name(name, model.config)}": plain_chunk(parameter)
        for name, parameter in model.named_parameters()
    }
    storage = open_storage(folder.parent)
    source = StorageSource(storage, folder.name, read_manifest(storage, folder.name))
    load(source, chunks, peers=Peers(None))


def assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    """Equal up to the rounding of fp32: the order of sums differs between the two programs."""
    assert theirs.std() > 0.1
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 2e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_imported_logits_equal_transformers(family: Callable[[], Any], tmp_path: Path) -> None:
    peer = random_peer(family())
    peer.save_pretrained(tmp_path / "their-Model", max_shard_size="20KB")
    assert len(list((tmp_path / "their-Model").glob("*.safetensors"))) > 1
    result = import_hf(tmp_path / "their-Model", tmp_path / "c")
    assert result.tokenizer is None
    config = compose(
        [f"model={result.model_file.stem}"], Source(config_dir=str(tmp_path / "c"))
    ).model
    assert result.model_file.stem == "their_model"
    model = Transformer(config)
    load_weights(model, result.checkpoint)
    tokens = tokens_of(config.vocab_size)
    assert_equal_logits(our_logits(model, tokens), peer_logits(peer, tokens))
    storage = open_storage(tmp_path / "c")
    assert read_manifest(storage, result.checkpoint.name).meta["kind"] == "weights"


OURS = {
    "llama3": ModelConfig(
        vocab_size=96,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=48,
        rope_theta=1000.0,
        rope_scaling=RopeScalingConfig(factor=4.0, original_max_seq_len=32),
    ),
    "mha": ModelConfig(vocab_size=96, dim=32, num_layers=2, num_heads=4, ffn_dim=48),
    "qwen3": ModelConfig(
        vocab_size=96, dim=32, num_layers=2, num_heads=4, head_dim=16, ffn_dim=48, qk_norm=True
    ),
    "qwen3_tied": ModelConfig(
        vocab_size=96,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=1,
        ffn_dim=48,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "qwen2": ModelConfig(
        vocab_size=96, dim=32, num_layers=2, num_heads=4, ffn_dim=48, attention_bias=True
    ),
}


def save_ours(model: Transformer, root: Path, meta: dict[str, Any]) -> None:
    chunks = {
        f"model.{parameter_name(name, model.config)}": plain_chunk(parameter)
        for name, parameter in model.named_parameters()
    }
    write_tensors(open_storage(root), 30, chunks, meta)


def as_meta(config: ModelConfig, **other: Any) -> dict[str, Any]:
    return {
        "kind": "training",
        "config": {"model": json.loads(json.dumps(vars_of(config))), **other},
    }


def vars_of(config: ModelConfig) -> dict[str, Any]:
    return {**vars(config), "rope_scaling": vars(config.rope_scaling)}


def random_ours(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.2)
    return model


@pytest.mark.parametrize("name", OURS)
def test_transformers_logits_equal_exported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_weights, "SHARD_BYTES", 20_000)
    model = random_ours(OURS[name])
    save_ours(model, tmp_path / "c", as_meta(OURS[name], training={"seq_len": 128}))
    export_hf(tmp_path / "c", tmp_path / "hf", dtype="fp32")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert peer.config.max_position_embeddings == 128
    tokens = tokens_of(96)
    assert_equal_logits(our_logits(model, tokens), peer_logits(peer.eval(), tokens))


def test_export_writes_one_file_in_bf16_with_its_tokenizer(tmp_path: Path) -> None:
    model = random_ours(OURS["qwen3_tied"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_text("{}")
    meta = as_meta(
        OURS["qwen3_tied"],
        training={"seq_len": 128},
        data={"tokenizer": None, "dir": str(tmp_path / "data")},
    )
    save_ours(model, tmp_path / "c", meta)
    export_hf(tmp_path / "c" / "step_00000030", tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(
        tensors["model.layers.1.mlp.gate_proj.weight"],
        model.layers["1"].feed_forward.w1.weight.bfloat16(),
    )
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert hf["architectures"] == ["Qwen3ForCausalLM"]
    assert hf["torch_dtype"] == "bfloat16"


def test_import_then_export_returns_the_same_files(tmp_path: Path) -> None:
    config = llama3()
    config.eos_token_id = 7
    peer = random_peer(config)
    peer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    assert import_hf(tmp_path / "theirs", tmp_path / "c").tokenizer is not None
    export_hf(tmp_path / "c", tmp_path / "back", dtype="fp32")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hf = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (hf["eos_token_id"], hf["max_position_embeddings"]) == (7, 256)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"


def hf_dict(**changed: Any) -> dict[str, Any]:
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SMALL} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures=.'MambaForCausalLM'.*LlamaFor"),
        ({"architectures": None}, "architectures="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has sliding_attention"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_scaling.rope_type='yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"rope_scaling": 5}, "config.json: rope_scaling=5: must be an object"),
        ({"rope_parameters": [1]}, "rope_parameters=.1.: must be an object"),
        (
            {"rope_parameters": LLAMA3 | {"factor": "8"}},
            "rope_parameters.factor='8': must be a num",
        ),
        ({"rope_parameters": LLAMA3 | {"rope_theta": None}}, "rope_theta=None: must be a number"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_unsupported_fields_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(hf_dict(**changed))


def test_configs_of_both_generations_mean_the_same() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old = from_hf_config(hf_dict(rope_theta=1000.0, rope_scaling=scaling))
    new = from_hf_config(hf_dict(rope_parameters=LLAMA3))
    assert old == new
    assert old.rope_scaling.factor == 4.0
    assert from_hf_config(to_hf_config(old, dtype="float32", max_seq_len=64)).rope_scaling == (
        old.rope_scaling
    )


def test_model_without_an_architecture_is_refused() -> None:
    config = ModelConfig(qk_norm=True, attention_bias=True)
    with pytest.raises(ValueError, match=r"model.qk_norm=True with model.attention_bias=True"):
        to_hf_config(config, dtype="float32", max_seq_len=64)


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    peer = random_peer(qwen3())
    peer.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    good = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for bad, message in (
        ({**good, name: torch.zeros(3, 4)}, rf"{name} has shape \[3, 4\].*asks for \[48, 32\]"),
        (
            {key: value for key, value in good.items() if key != name},
            rf"1 tensors are missing.*{name}",
        ),
        ({**good, "model.extra": torch.zeros(1)}, "1 tensors have no place.*model.extra"),
    ):
        save_file(bad, file)
        with pytest.raises(ValueError, match=message):
            import_hf(tmp_path / "hf", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    file.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        import_hf(tmp_path / "hf", tmp_path / "c")


def test_folders_in_use_and_damage_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json"):
        import_hf(tmp_path, tmp_path / "c")
    with pytest.raises(ValueError, match="no such folder, or an empty one"):
        export_hf(tmp_path / "c", tmp_path / "hf")
    random_peer(qwen2()).save_pretrained(tmp_path / "theirs")
    result = import_hf(tmp_path / "theirs", tmp_path / "c")
    with pytest.raises(ValueError, match="holds checkpoints already"):
        import_hf(tmp_path / "theirs", tmp_path / "c")
    with pytest.raises(ValueError, match="is not empty"):
        export_hf(tmp_path / "c", tmp_path / "theirs")
    with pytest.raises(ValueError, match="dtype=int4: choose one of fp32"):
        export_hf(tmp_path / "c", tmp_path / "hf", dtype="int4")
    data = result.checkpoint / "part-00000.safetensors"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"part-00000.safetensors is damaged: model\..* has checksum"
    ):
        export_hf(tmp_path / "c", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
