"""Networks of transformers: built, saved, loaded, filled from a bank, and what their cache takes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers_text import CONFIG, LLAMA, MIXTURE, TIED, language_bank
from safetensors.torch import load_file

from lcsc.bank import CheckpointBank, Layout
from lcsc.core.errors import BankError, ConfigError
from lcsc.export.model import _load_back as load_back
from lcsc.export.weights import write_weights
from lcsc.models.causal_lm import CAUSAL_LMS, kv_cache_bytes
from lcsc.models.flat import LiveModel
from lcsc.models.network import build_network, check_typed, load_network, save_network, saved_config
from lcsc.objectives.command import _write as write_for_command
from lcsc.operators.base import Candidate
from lcsc.recycling.experts import MIXTURES

IDS = torch.arange(40).reshape(2, 20) * 5 % 256
SMALL = {
    "GPT2LMHeadModel": {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPTForCausalLM": {
        **{"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 32},
        "word_embed_proj_dim": 16,
    },
    "Qwen3MoeForCausalLM": MIXTURE["config"],
    "MixtralForCausalLM": {**CONFIG, "num_local_experts": 4},
    "OlmoeForCausalLM": {**CONFIG, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": {
        **{**CONFIG, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4},
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("head_dim", [None, 8])
@pytest.mark.parametrize("name", CAUSAL_LMS)
def test_every_class_comes_back_with_its_bits_and_its_cache_is_the_formulas(tmp_path, name, head_dim):
    if name == "OlmoeForCausalLM":
        head_dim = None  # has heads of one size only
    config = {"pad_token_id": 0, **SMALL.get(name, CONFIG), **({"head_dim": head_dim} if head_dim else {})}
    torch.manual_seed(0)
    net = build_network({"class": name, "config": config}).eval()
    save_network(net, tmp_path)
    if name not in MIXTURES:
        assert set(load_file(tmp_path / "model.safetensors")) <= set(net.state_dict())
    with torch.no_grad():
        out = net(input_ids=IDS[:1], use_cache=True)
        for again in (load_network(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()):
            assert type(again) is type(net)
            assert torch.equal(again(input_ids=IDS[:1]).logits, out.logits)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert kv_cache_bytes(net.config) * IDS.shape[1] == held


def test_a_cache_takes_less_with_fewer_heads_or_bytes_and_believes_no_key_that_means_nothing():
    def llama(**config):
        return kv_cache_bytes(transformers.LlamaConfig(**{**CONFIG, **config}))

    assert llama() == 2 * 2 * 2 * 4 * 4
    assert llama(num_key_value_heads=1) == llama() // 2
    assert llama(dtype="bfloat16") == llama() // 2
    assert llama(head_dim=8) == 2 * llama()
    assert llama(per_layer_config={1: {"num_key_value_heads": 1}}) == llama() * 3 // 4
    assert kv_cache_bytes(transformers.GPTNeoXConfig(**CONFIG)) == 2 * llama()  # has no grouped heads, keeps the key
    assert kv_cache_bytes(transformers.MambaConfig()) is None


def row_writer(row):
    return lambda out: out.copy_(row)


@pytest.mark.parametrize("arch", [LLAMA, TIED, MIXTURE], ids=["llama", "tied", "mixture"])
def test_a_bank_is_a_live_network(tmp_path, arch):
    """Each row written into the network's memory computes what transformers computes from the folder."""
    bank = CheckpointBank.open(language_bank(tmp_path, arch))
    assert bank.arch["class"] == arch["class"]
    live = LiveModel(bank.arch, bank.layout, bank.constants, torch.device("cpu"))
    for row, step in zip(bank.matrix(), bank.steps, strict=True):
        live.fill(row_writer(row))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}").eval()
        with torch.no_grad():
            assert torch.equal(live.net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert live.intact
    if arch is TIED:
        assert live.net.lm_head.weight is live.net.model.embed_tokens.weight
        assert "lm_head.weight" not in bank.layout.shapes


def test_half_precision_checkpoints_are_run_in_single(tmp_path):
    bank = CheckpointBank.open(language_bank(tmp_path, dtype=torch.bfloat16))
    assert bank.arch["config"]["dtype"] == "bfloat16"
    live = LiveModel(bank.arch, bank.layout, bank.constants, torch.device("cpu"))
    live.theta_P.copy_(bank.matrix()[0])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(live.net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert {tensor.dtype for tensor in load_network(tmp_path / "checkpoint-1").parameters()} == {torch.float32}
    assert saved_config(bank.arch)[1]["dtype"] == "float32"


def test_mistyped_and_hostile_settings(tmp_path):
    with pytest.raises(ConfigError, match="`LlamaForCausalLM` has no argument `hidden_sise`. Did you mean `hidden_siz"):
        check_typed({"class": "LlamaForCausalLM", "config": {**CONFIG, "hidden_sise": 8}})
    check_typed({"class": "GPT2LMHeadModel", "config": SMALL["GPT2LMHeadModel"]})
    with pytest.raises(ConfigError, match="network `LlamaForCausalLM` cannot be built from `arch.config`"):
        build_network({"class": "LlamaForCausalLM", "config": {**CONFIG, "hidden_size": "wide"}})
    with pytest.raises(ConfigError, match="`LlamaForCausalLM` describes quantized weights"):
        build_network({"class": "LlamaForCausalLM", "config": {**CONFIG, "quantization_config": {"bits": 4}}})
    save_network(build_network(LLAMA), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    hostile = {**config, "attn_implementation": "someone/kernel", "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(hostile))
    assert load_network(tmp_path).config._attn_implementation in ("sdpa", "eager")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BankError, match=r"weights in .* do not fit `LlamaForCausalLM`: .*missing_keys.*layers\.2"):
        load_network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    with pytest.raises(ConfigError, match="no network class named `BertModel`"):
        load_network(tmp_path)


def test_a_command_is_given_a_folder_that_transformers_opens(tmp_path):
    bank = CheckpointBank.open(language_bank(tmp_path / "bank", TIED, dtype=torch.bfloat16))
    candidate = Candidate(bank.arch, bank.layout, lambda out: out.copy_(bank.matrix()[3]), {}, bank.constants)
    (tmp_path / "out").mkdir()
    write_for_command(candidate, tmp_path / "out")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}
    last = tmp_path / "bank" / "checkpoint-4"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(net(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_a_network_that_only_the_users_command_can_run_is_exported_too(tmp_path):
    """Its class is not one that lcsc builds, so its tensors are read back by themselves."""
    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    theirs = transformers.BertModel(transformers.BertConfig(**small, intermediate_size=8)).eval()
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    layout = Layout.of({name: tuple(tensor.shape) for name, tensor in weights.items()})
    arch = {"class": "BertModel", "config": theirs.config.to_dict()}
    candidate = Candidate(arch, layout, lambda out: layout.flatten(weights, out), {})
    write_weights(weights, arch, {"operator": "linear"}, tmp_path)
    loaded = load_back(tmp_path, tmp_path, candidate, weights, "diffusers")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ids = IDS % 16
        assert torch.equal(again(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)
