"""Models of exactly the sizes of bert-base-uncased, gpt2 and roberta-base, drawn, in the files that are published."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from helpers_warm import live
from safetensors.torch import save_file
from test_warm_start_sizes import CONFIGS

from lcsc.bank import CheckpointBank
from lcsc.models.pairs import write_targets
from lcsc.operators.warm_start import WarmStart

pytestmark = pytest.mark.faults  # takes long: half a billion numbers

#: what the files call tensors that transformers calls otherwise
OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


def drawn(kind):
    name, config = CONFIGS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**config)).eval()


def published(net, kind, folder):
    """config.json and weights, named as on the hub."""
    ties = set(net.all_tied_weights_keys)
    tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items() if name not in ties}
    if kind == "gpt2":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 1024, 1024, dtype=torch.uint8).tril() for i in range(12)}
    if kind == "bert":
        for new, old in OLD.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        tensors |= {"cls.seq_relationship.weight": torch.zeros(2, 768), "cls.seq_relationship.bias": torch.zeros(2)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**net.config.to_dict(), "architectures": [type(net).__name__]}))
    return CheckpointBank.open(folder, storage="streamed")


@pytest.mark.parametrize(
    ("encoder", "decoder", "name"), [("bert", "gpt2", "bert2gpt"), ("roberta", None, "robertashare")]
)
def test_they_begin_an_encoder_decoder_that_reads_and_writes(tmp_path, encoder, decoder, name):
    first = drawn(encoder)
    bank, how = published(first, encoder, tmp_path / encoder), {}
    if decoder:
        second = drawn(decoder)
        published(second, decoder, tmp_path / decoder)
        how = {"decoder": str(tmp_path / decoder), "cross_attention": "zero"}
    candidate = WarmStart(combination=name, **how).apply(bank, {})
    net = live(candidate)
    base = getattr(first, first.base_model_prefix)
    mine = dict(net.encoder.named_parameters())
    for key, tensor in base.named_parameters():
        assert torch.equal(mine[key], tensor), key
    assert sum(p.numel() for p in net.parameters()) == candidate.recipe["counts"]["parameters"]
    ids = torch.randint(5, 30_000, (2, 9))
    with torch.no_grad():
        assert torch.equal(net.encoder(input_ids=ids).last_hidden_state, base(input_ids=ids).last_hidden_state)
        if decoder:
            wanted = second(input_ids=ids).logits
            assert torch.equal(net(input_ids=ids, decoder_input_ids=ids).logits, wanted)
        else:
            words = net.encoder.embeddings.word_embeddings.weight
            assert net.decoder.roberta.embeddings.word_embeddings.weight is words
    assert write_targets(net, ids, 3).shape == (2, 3)
