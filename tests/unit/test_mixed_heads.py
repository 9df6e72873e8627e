"""Networks whose layers keep different numbers of key/value heads: built, saved, loaded, cached."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_text import LLAMA, MIXTURE
from transformers import AutoModelForCausalLM

from lcsc.core.errors import ConfigError
from lcsc.models.causal_lm import kv_cache_bytes
from lcsc.models.network import build_network, check_typed, load_network, save_network
from lcsc.recycling.attention import heads_settings

IDS = torch.arange(24).reshape(2, 12)


@pytest.mark.parametrize("arch", [LLAMA, MIXTURE])
@torch.no_grad()
def test_what_is_saved_loads_with_its_own_heads_and_their_cache(arch, tmp_path):
    arch = {**arch, "config": {**arch["config"], **heads_settings([1, 4])}}
    check_typed(arch)
    torch.manual_seed(0)
    net = build_network(arch).eval()
    d = 8 if "head_dim" in arch["config"] else 4
    assert [tuple(layer.self_attn.k_proj.weight.shape) for layer in net.model.layers] == [(d, 16), (4 * d, 16)]
    save_network(net, tmp_path / "net")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["per_layer_config"]) == (4, {"0": {"num_key_value_heads": 1}})
    again = load_network(tmp_path / "net")
    assert type(again).__name__ == arch["class"]
    out = again(IDS, use_cache=True)
    assert torch.equal(out.logits, net(IDS).logits)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert held == IDS.numel() * kv_cache_bytes(again.config) == IDS.numel() * 2 * 5 * d * 4
    # one token after the other, by the cache
    before = net(IDS[:, :-1], use_cache=True).past_key_values
    step = net(IDS[:, -1:], past_key_values=before).logits[:, -1]
    torch.testing.assert_close(step, out.logits[:, -1], rtol=0, atol=1e-5)
    assert net.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 14)


def test_transformers_own_classes_refuse_it_today(tmp_path):
    """When this fails, transformers can hold such models itself, and `repeat_heads` need not be the default."""
    arch = {**LLAMA, "config": {**LLAMA["config"], **heads_settings([1, 4])}}
    save_network(build_network(arch), tmp_path / "net")
    with pytest.raises(RuntimeError, match="`num_key_value_heads|'num_key_value_heads' is a per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "net")


def test_only_heads_may_differ():
    config = {**LLAMA["config"], "per_layer_config": {"0": {"intermediate_size": 8}}}
    with pytest.raises(ConfigError, match="`per_layer_config` varies `intermediate_size` between layers"):
        build_network({"class": "LlamaForCausalLM", "config": config})
