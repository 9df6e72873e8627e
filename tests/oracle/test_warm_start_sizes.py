"""Warm starts of bert-base-uncased, roberta-base and gpt2 as they are published, against the numbers of the paper.

Rothe et al., arXiv:1907.12461, Table 1, in millions: all, embeddings, from checkpoints, random. What is left between
its numbers and these: it counts 26 for attention to the encoder, and 12 layers of 4 (d^2 + d) + 2 d are 28.4; it cuts
GPT-2's 1,024 positions to 512; and each of its numbers is rounded.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers_warm import hollow

from lcsc.bank import CheckpointBank
from lcsc.models.flat import check_bijection, distinct_tensors
from lcsc.models.network import build_network
from lcsc.operators.warm_start import WarmStart
from lcsc.recycling.composite import COMBINATIONS

#: as their config.json on the hub says
CONFIGS = {
    "bert": ("BertForMaskedLM", {"vocab_size": 30522, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "roberta": (
        "RobertaForMaskedLM",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
}
WORDS = ("word_embeddings.weight", "wte.weight")
PAPER = {
    "rnd2rnd": (221, 23, 0, 221),
    "bert2rnd": (221, 23, 109, 112),
    "rnd2bert": (221, 23, 109, 112),
    "bert2bert": (221, 23, 195, 26),
    "bertshare": (136, 23, 109, 26),
    "robertashare": (152, 39, 125, 26),
    "gpt": (125, 39, 125, 0),
    "rnd2gpt": (238, 39, 125, 114),
    "bert2gpt": (260, 62, 234, 26),
    "roberta2gpt": (276, 78, 250, 26),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hollow")
    for kind, (arch, config) in CONFIGS.items():
        hollow(folder / kind, arch, config)
    return folder


def planned(folders, name, **settings):
    encoder, decoder, _ = COMBINATIONS[name]
    first = next((kind for kind in (encoder, decoder) if kind in CONFIGS), "bert")
    second = str(folders / decoder) if decoder not in ("random", first) else None
    bank = CheckpointBank.open(folders / first, storage="streamed")
    return WarmStart(combination=name, decoder=second, **settings).plan(bank)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_counts_are_the_papers(folders, name):
    plan = planned(folders, name)
    counts, shapes = plan.recipe["counts"], plan.shapes({})
    words = sum(math.prod(shape) for key, shape in shapes.items() if key.endswith(WORDS))
    told = (counts["parameters"], words, counts["copied"], counts["random"])
    for mine, paper in zip(told, PAPER[name], strict=True):
        assert abs(mine / 1e6 - paper) <= 3.0, (told, PAPER[name])


@pytest.mark.parametrize("name", ["bert2gpt", "rnd2gpt", "robertashare"])
def test_tensors_are_those_of_transformers_own_network(folders, name):
    """Of the last layer alone, because the others are like it."""
    gpt = {} if name == "robertashare" else {"decoder_layers": [11]}
    plan = planned(folders, name, encoder_layers=[11], **gpt)
    with torch.device("meta"):
        net = build_network(plan.arch)
    groups = [names for _, names in distinct_tensors(net) if set(names) & set(net.state_dict())]
    check_bijection(net, groups, plan.shapes({}))
    assert sum(p.numel() for p in net.parameters()) == plan.recipe["counts"]["parameters"]


def test_attention_to_the_encoder_is_all_that_is_drawn(folders):
    crosses = 12 * (4 * (768**2 + 768) + 2 * 768)
    assert crosses == 28_366_848  # 28.37 million
    shared = planned(folders, "bert2bert").recipe["counts"]
    assert shared["random"] == crosses
    assert planned(folders, "bertshare").recipe["counts"]["random"] == crosses
    # transformers' own: the embedding matrix twice, and a pooler that was not in the file
    apart = planned(folders, "bert2bert", share="none").recipe["counts"]
    assert round(apart["parameters"] / 1e6, 2) == 247.36
    assert apart["parameters"] - shared["parameters"] == 30522 * 768 + 768**2 + 768
    assert round((apart["parameters"] - 30522 * 768) / 1e6, 1) == 223.9
