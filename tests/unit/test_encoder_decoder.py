"""Encoder-decoders by class: what a stranger's config.json may ask for, and the tokens of a model's files."""

from __future__ import annotations

import json

import pytest
import torch
from helpers_warm import GPT, SIZES

from lcsc.core.errors import BankError, ConfigError
from lcsc.models.network import build_network, load_network, save_network
from lcsc.recycling.vocabulary import find_rows, find_vocabulary

BERT = {**SIZES, "model_type": "bert"}
DECODER = {**GPT, "model_type": "gpt2", "is_decoder": True, "add_cross_attention": True}


def arch(share=None, **more):
    config = {"encoder": BERT, "decoder": DECODER, "decoder_start_token_id": 1, "pad_token_id": 0, **more}
    shared = {"model_type": "lcsc-encoder-decoder", "share": share}
    name = "SharedEncoderDecoderModel" if share else "EncoderDecoderModel"
    return {"class": name, "config": {**config, **(shared if share else {"model_type": "encoder-decoder"})}}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (arch(encoder={**BERT, "model_type": "llama"}), "the encoder is `llama`, or quantized; plain ones of bert"),
        (arch(decoder={**DECODER, "quantization_config": {}}), "the decoder is `gpt2`, or quantized"),
        (arch(encoder=None), "the encoder is `None`"),
        (arch(encoder="bert"), "the encoder is `bert`"),
    ],
)
def test_only_plain_parts_of_known_kinds_are_built(tmp_path, made, message):
    with pytest.raises(ConfigError, match=message):
        build_network(made)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [made["class"]], **made["config"]}))
    with pytest.raises(BankError, match=message):
        load_network(tmp_path)


def test_what_is_shared_is_one_of_two():
    with pytest.raises(ConfigError, match="`share` is `some`; it must be one of embeddings, all"):
        build_network(arch("some"))


def test_kernels_and_code_of_a_hub_are_not_asked_for():
    hub = {"attn_implementation": "somebody/kernels", "_attn_implementation": "somebody/kernels"}
    net = build_network(arch(encoder={**BERT, **hub, "auto_map": {"AutoModel": "code.Model"}}))
    assert net.encoder.config._attn_implementation == "sdpa"
    assert not hasattr(net.config.encoder, "auto_map")


@pytest.mark.parametrize("share", [None, "embeddings"])
def test_a_network_comes_back(tmp_path, share):
    torch.manual_seed(0)
    net = build_network(arch(share)).eval()
    save_network(net, tmp_path)
    again = load_network(tmp_path)
    assert type(again) is type(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    words = again.encoder.embeddings.word_embeddings.weight
    assert (words is again.decoder.transformer.wte.weight) == (share is not None)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        made = [one(input_ids=ids, decoder_input_ids=ids).logits for one in (net, again)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("name", "text", "ids", "special"),
    [
        ("vocab.txt", "[PAD]\n[CLS]\n[SEP]\nthe\n##s\n", {"the": 3, "##s": 4}, (1, 2, 0)),
        ("vocab.json", '{"<s>": 0, "</s>": 1, "\\u0120the": 2, "s": 3}', {"Ġthe": 2, "s": 3}, (0, 1, None)),
        (
            "tokenizer.json",
            json.dumps(
                {
                    "model": {"vocab": [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["▁the", -1.0], ["s", -2.0]]},
                    "added_tokens": [{"id": 5, "content": "<mask>"}],
                }
            ),
            {"▁the": 3, "s": 4, "<mask>": 5},
            (0, 2, 1),
        ),
    ],
)
def test_tokens_are_read_from_what_models_have(tmp_path, name, text, ids, special):
    assert find_vocabulary(tmp_path) is None
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = find_vocabulary(tmp_path)
    assert {word: found.ids[word] for word in ids} == ids
    assert tuple(found.special(purpose) for purpose in ("start", "end", "pad")) == special
    surfaces = found.surfaces()
    by_word = {word.lstrip("Ġ▁#"): number for word, number in ids.items()}
    assert (surfaces[b" the"], surfaces[b"s"]) == (by_word["the"], by_word["s"])
    rows = find_rows(found, found, spell=True)
    assert [len(ids) for ids in (*rows.same, *rows.spelled)] == [found.size, found.size, 0, 0]


@pytest.mark.parametrize("text", ["[]", '{"a": -1}', '{"a": "b"}', "{}"])
def test_what_is_no_vocabulary_is_refused(tmp_path, text):
    (tmp_path / "vocab.json").write_text(text)
    with pytest.raises(BankError, match=r"vocab\.json`"):
        find_vocabulary(tmp_path)
