"""`lcsc generate music`: tunes as files, what is refused and what is missing."""

from __future__ import annotations

import json

import pytest
import torch

from lcsc.export.tunes import _Draft
from lcsc.models.network import build_network, save_network
from lcsc.music.check import problems
from lcsc.music.files import abc2midi_version
from lcsc.music.tokens import END, PAD, VOCAB_SIZE, decode, encode, prompt_tokens
from lcsc.music.tokens import TUNE as TUNE_MARK
from lcsc.report.run import SCHEMA

TEXT, TUNE = "a jig in D, 6/8", "M:6/8\nL:1/8\nK:D\n|:d2f efg|d3 A3:|\n"
WIDTH = 128


def knowing(*tunes):
    """A network of one idle layer whose places know the tokens of the tunes, equally likely where they differ."""
    config = {"vocab_size": VOCAB_SIZE, "n_embd": WIDTH, "n_positions": WIDTH, "n_layer": 1, "n_head": 1}
    net = build_network({"class": "GPT2LMHeadModel", "config": {**config, "tie_word_embeddings": False}})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net.transformer.ln_f.weight.fill_(1)
        net.transformer.wpe.weight.copy_(torch.eye(WIDTH))
        first = len(prompt_tokens(TEXT)) - 1
        for tune in tunes:
            for place, token in enumerate([*encode(tune), END]):
                net.lm_head.weight[token, first + place] = 3.0
    return net.eval()


@pytest.fixture
def no_tools(monkeypatch):
    monkeypatch.setenv("PATH", "")
    abc2midi_version.cache_clear()
    yield
    abc2midi_version.cache_clear()


def test_a_tune_is_written_and_what_is_missing_is_said(here, lcsc, no_tools):
    save_network(knowing(TUNE), here / "banks" / "text_to_music_small" / "checkpoint-9")
    save_network(knowing("K:D\nd#"), here / "banks" / "text_to_music_small" / "checkpoint-1")
    code, out, err = lcsc("generate", "music", TEXT, "--to", "out/")
    assert code == 0, err
    assert out.splitlines() == [
        "model: banks/text_to_music_small/checkpoint-9",
        "tune: out/tune-1.abc, out/tune-1.mid",
        "missing: no picture of the score: `abcm2ps` is not installed (Debian: apt install abcm2ps)",
    ]
    assert (here / "out" / "tune-1.abc").read_text() == f"X:1\nT:{TEXT}\n{TUNE}"
    assert (here / "out" / "tune-1.mid").read_bytes()[:4] == b"MThd"
    told = json.loads((here / "out" / "tunes.json").read_text())
    assert told["tunes"] == [{"files": ["tune-1.abc", "tune-1.mid"], "tries": 1}]
    assert (told["wish"]["text"], told["checked_by"]) == (TEXT, ["lcsc"])
    code, _, err = lcsc("generate", "music", TEXT, "to=out")
    assert code == 2
    assert "output `out` exists already" in err


def test_tunes_that_are_not_valid_are_written_again_or_refused(here, lcsc, no_tools):
    # the last note of the first bar is right, or too long for it
    save_network(knowing(TUNE, TUNE.replace("efg|", "ef3|")), here / "model")
    code, out, err = lcsc("generate", "music", TEXT, "to=out", "model=model", "num=6", "tries=20")
    assert code == 0, err
    told = json.loads((here / "out" / "tunes.json").read_text())
    tries = [tune["tries"] for tune in told["tunes"]]
    assert len(tries) == 6
    assert max(tries) > 1
    assert f"(try {max(tries)})" in out
    for number in range(1, 7):
        abc = (here / "out" / f"tune-{number}.abc").read_text()
        assert problems(abc.split("\n", 2)[2]) == []
    # tune i is the same however many there are, and other draws need other tries
    lcsc("generate", "music", TEXT, "to=two", "model=model", "num=2", "tries=20")
    assert [tune["tries"] for tune in json.loads((here / "two" / "tunes.json").read_text())["tunes"]] == tries[:2]
    code, out, _ = lcsc("generate", "music", TEXT, "to=few", "model=model", "num=6", "tries=1")
    assert code == 0
    assert out.count("refused: a tune that was not valid in 1 tries; at last bar 1 is") == 6 - tries.count(1)

    save_network(knowing(TUNE.replace("d3", "d4")), here / "bad")
    code, _, err = lcsc("generate", "music", TEXT, "to=none", "model=bad", "tries=2")
    assert code == 2
    assert f"no valid tune for `{TEXT}` in 2 tries; the last was refused because bar 2 is 7/8 long instead of" in err
    code, _, err = lcsc("generate", "music", TEXT, "to=none", "model=model", "tries=1", "max_tokens=5")
    assert "it has no end after 5 tokens" in err
    assert not (here / "none").exists()


def test_a_draft_goes_on_from_its_first_wrong_bar(no_tools):
    def kept(body, most=999):
        draft.judge([*encode(f"M:6/8\nL:1/8\nK:D\n{body}"), END], most)
        return decode(draft.kept).removeprefix("M:6/8\nL:1/8\nK:D\n")

    draft = _Draft()
    assert kept("|:d2f efg|d3 A3|d3 A2|d6:|") == "|:d2f efg|d3 A3|"
    assert draft.wrong == "bar 3 is 5/8 long instead of 3/4"
    # no further: 1, 3 and so on bars earlier, and from the last one again when it got further
    assert kept("|:d2f efg|d3 A3|d3 A2|d6:|") == "|:d2f efg|"
    assert kept("|:d2f efg|d3 A4|d3 A2|d6:|") == ""
    assert kept("|:d2f efg|d3 A3|d3 A3|d5|d6:|") == "|:d2f efg|d3 A3|d3 A3|"
    five = "|:d2f efg|d3 A3|d3 A3|d6|d6|"  # its repeat has no end
    assert kept(five) == five
    assert kept(five) == "|:d2f efg|d3 A3|d3 A3|d6|"
    assert kept(five) == "|:d2f efg|d3 A3|"
    kept("|:d2f efg|d6|", most=20)
    assert draft.wrong == "it has no end after 20 tokens"
    kept("|:d2f efg|d3 A3:|\n")
    assert draft.wrong == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), 'nothing is asked for. Write: lcsc generate music "a jig in D, 6/8" to=out/'),
        (("musik",), "`musik` cannot be generated. Did you mean `music`?"),
        (("music",), "no text says which tune is wanted"),
        (("music", "to=out"), "no text says which tune is wanted"),
        (("music", "a jig"), "`to` is not set"),
        (("music", "a jig", "--to"), "`to=` is not understood"),
        (("music", "é̃ゑ", "to=out"), "there is no model that writes tunes here yet. Give one with model=DIR, or make"),
        (("music", "ゑ", "to=out"), "has 0 characters in ASCII; it must have 1 to 400"),
        (("music", "a jig", "to=out", "num=x"), "`num` is `x`; it must be a whole number"),
        (("music", "a jig", "to=out", "num=0"), "`num` is 0 and `tries` 16; they must be from 1 to 1000"),
        (("music", "a jig", "to=out", "top_p=nan"), "`top_p`, `temperature`, `max_tokens` are nan, 1.0, 1024"),
        (("music", "a jig", "to=out", "model=."), "`model` is `.`, which holds no network"),
    ],
)
def test_mistakes_are_said_in_a_sentence(here, lcsc, words, said):
    code, _, err = lcsc("generate", *words)
    assert code == 2
    assert said in err
    assert list(here.iterdir()) == []


def finished(folder, net, **objective):
    """What of a finished run on tunes is looked at."""
    save_network(net, folder / "best")
    info = {"schema": SCHEMA, "name": "x", "metric": "music", "bank": {"steps": []}}
    info["config"] = {"dataset": {"name": "tunes"}, "objective": objective}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "summary.json").write_text("{}")


def test_a_model_that_is_still_to_be_trained_is_not_asked(here, lcsc, no_tools):
    finished(here / "runs" / "b", knowing(TUNE))
    finished(here / "runs" / "a", knowing("K:D\nd#"), num_steps=40)
    code, out, err = lcsc("generate", "music", TEXT, "to=out")
    assert code == 0, err
    assert "model: runs/b/best" in out
    code, _, err = lcsc("generate", "music", TEXT, "to=two", "model=runs/a")
    assert code == 2
    assert "`model` is `runs/a`, whose winner was scored behind a fine-tuning and is saved as it was before" in err
    assert "trainer.start=runs/a/best" in err


def listening(text, tune):
    """An encoder-decoder that is drawn but for a decoder whose places know the tokens of a tune."""
    side = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "num_attention_heads": 1, "num_hidden_layers": 1}
    encoder = {**side, "model_type": "bert", "intermediate_size": 8, "max_position_embeddings": WIDTH}
    decoder = {"model_type": "gpt2", "vocab_size": VOCAB_SIZE, "n_embd": WIDTH, "n_positions": WIDTH, "n_layer": 1}
    decoder |= {"n_head": 1, "is_decoder": True, "add_cross_attention": True, "tie_word_embeddings": False}
    tokens = {"decoder_start_token_id": TUNE_MARK, "eos_token_id": END, "pad_token_id": PAD}
    config = {"encoder": encoder, "decoder": decoder, **tokens, "is_encoder_decoder": True}
    net = build_network({"class": "EncoderDecoderModel", "config": config})
    known = knowing(tune)
    with torch.no_grad():
        for name, tensor in known.state_dict().items():
            net.decoder.state_dict()[name].copy_(tensor)
        for parameter in net.decoder.transformer.h[0].crossattention.parameters():
            parameter.zero_()
        shift = len(prompt_tokens(text)) - 1  # its first place is the tune's, not behind a text
        net.decoder.lm_head.weight.copy_(torch.roll(known.lm_head.weight, -shift, 1))
    return net.eval()


def test_an_encoder_decoder_writes_and_goes_on_from_its_first_wrong_bar(here, lcsc, no_tools):
    net = listening(TEXT, TUNE)
    with torch.no_grad():  # the last note of the first bar may be too long for it
        place = len(encode(TUNE[: TUNE.index("g|")])) + 1
        net.decoder.lm_head.weight[encode("3")[0], place] = 3.0
    save_network(net, here / "model")
    code, _, err = lcsc("generate", "music", TEXT, "to=out", "model=model", "num=6", "tries=20")
    assert code == 0, err
    told = json.loads((here / "out" / "tunes.json").read_text())
    assert max(tune["tries"] for tune in told["tunes"]) > 1
    for number in range(1, 7):
        assert (here / "out" / f"tune-{number}.abc").read_text() == f"X:{number}\nT:{TEXT}\n{TUNE}"
    code, _, err = lcsc("generate", "music", "x" * 200, "to=two", "model=model")
    assert code == 2
    assert f"a prompt has 202 tokens, and the network reads at most {WIDTH}" in err


def test_networks_of_other_tokens_are_refused(here, lcsc):
    config = {"vocab_size": 256, "n_embd": 8, "n_positions": 64, "n_layer": 1, "n_head": 1}
    save_network(build_network({"class": "GPT2LMHeadModel", "config": config}), here / "bytes")
    code, _, err = lcsc("generate", "music", TEXT, "to=out", "model=bytes")
    assert code == 2
    assert "the network has 256 tokens, and the text 128: they would not mean the same" in err
