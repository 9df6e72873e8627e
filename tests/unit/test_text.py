"""Text: what its parts hold, that they are the same everywhere, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.datasets.base import TextPart, need_images, need_text
from lcsc.datasets.content import text_digest
from lcsc.datasets.tokenizer import encode


def rows(text, part):
    return [bytes(row.tolist()) for row in text.tokens(part)]


def test_every_stretch_is_in_one_part_and_held_out_ones_come_from_all_over(tmp_path):
    file = tmp_path / "a.txt"
    content = b"".join(b"%04d" % i for i in range(100)) + b"xy"
    file.write_bytes(content)
    text = build("dataset", "text", path=str(file), stretch=8, every=5)
    assert (text.name, text.vocab_size) == ("a", 256)
    search, report = rows(text, TextPart.SEARCH), rows(text, TextPart.REPORT)
    every = [*rows(text, TextPart.TRAIN), *search, *report]
    assert sorted(every) == [content[i : i + 8] for i in range(0, 400, 8)]  # all once, but for the rest of 2 bytes
    assert text.tokens(TextPart.TRAIN).dtype == torch.uint8
    for part in (search, report):  # one of every five neighbours
        assert [content.index(row) // 40 for row in part] == list(range(10))
    places = [content.index(row) % 40 // 8 for row in search]
    assert len(set(places)) > 2  # and not always the same one
    assert rows(build("dataset", "text", path=str(file), stretch=8, every=5), TextPart.SEARCH) == search
    other = build("dataset", "text", path=str(file), stretch=8, every=5, seed=1)
    assert rows(other, TextPart.SEARCH) != search
    assert text_digest(other) != text_digest(text)


def test_a_folder_is_its_files_in_order(tmp_path):
    for name, content in (("b/x.txt", b"world"), ("a.txt", b"hello"), ("c.md", b"none")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    text = build("dataset", "text", path=str(tmp_path), stretch=2, every=3)
    everything = sorted(row for part in TextPart for row in rows(text, part))
    assert everything == sorted([b"he", b"ll", b"ow", b"or", b"ld"])


def test_the_default_text_is_pythons_language_reference():
    from pydoc_data.topics import topics

    text = build("dataset", "text")
    together = b"".join(row for part in TextPart for row in rows(text, part))
    assert text.name == "python_reference"
    assert 200_000 < len(together) <= sum(len(topic.encode()) + 2 for topic in topics.values())
    assert b'The "assert" statement' in together
    sizes = {part: len(text.tokens(part)) for part in TextPart}
    assert sizes[TextPart.SEARCH] == sizes[TextPart.REPORT] == sum(sizes.values()) // 10
    assert text_digest(text) == text_digest(build("dataset", "text"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stretch": 1}, "`stretch` 1; it must be at least 2"),
        ({"every": 2}, "`every` 2; it must be at least 3"),
        ({"path": "nowhere.txt"}, "cannot read `nowhere.txt`: No such file or directory. Give a text file"),
        ({"path": "empty"}, "`path` `empty`, a folder without a `.txt` file"),
        ({"path": "short.txt"}, "has 5 bytes, and `every` 10 stretches of 2048 need 20480"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        build("dataset", "text", **fields).tokens(TextPart.TRAIN)


def test_images_and_text_are_not_mixed_up():
    text, digits = build("dataset", "text"), build("dataset", "digits")
    need_text(text, "x")
    need_images(digits, "x")
    with pytest.raises(ConfigError, match="x reads text, and data set `Digits` holds images. Choose dataset=text"):
        need_text(digits, "x")
    parts = {"model": build("model", "edm"), "dataset": text}
    more = {"sampler": build("sampler", "euler"), "metric": build("metric", "fid_pixels")}
    for name, given in (("denoising_loss", parts), ("sample_quality", parts | more), ("fid_nfe", parts | more)):
        with pytest.raises(ConfigError, match=r"objective `\w+` reads images, and data set `Text` holds text"):
            build("objective", name, **given)


@pytest.fixture
def tokenizer(tmp_path):
    """A byte-level tokenizer with a few merges, that would add a token in front if it were asked to."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(["the rain in the plain, the grain"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    (tmp_path / "tok").mkdir()
    tokenizer.save(str(tmp_path / "tok" / "tokenizer.json"))
    return tmp_path / "tok"


def test_a_tokenizers_tokens_and_the_bytes_that_they_stand_for(tmp_path, tokenizer):
    from tokenizers import Tokenizer

    content = "the rain — in the plain ♥ thé 👍 grain\n" * 20
    (tmp_path / "a.txt").write_text(content)
    text = build("dataset", "text", path=str(tmp_path / "a.txt"), tokenizer=str(tokenizer), stretch=10, every=3)
    raw = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    raw.no_truncation()
    ids = raw.encode(content, add_special_tokens=False).ids
    assert text.vocab_size == raw.get_vocab_size()
    stretches = {tuple(row) for part in TextPart for row in text.tokens(part).tolist()}
    assert stretches <= {tuple(ids[i : i + 10]) for i in range(0, len(ids), 10)}
    assert text.tokens(TextPart.TRAIN).dtype == torch.int32
    # a character of three tokens: the last one has its bytes
    assert encode("a♥b".encode(), tokenizer).bytes_N.tolist() == [1, 0, 0, 3, 1]
    total = sum(int(text.byte_counts(part).sum()) for part in TextPart)
    left = len(ids) % 10
    assert total == len(content.encode()) - sum(len(raw.id_to_token(i)) for i in ids[-left:]) * bool(left)
    plain = build("dataset", "text", path=str(tmp_path / "a.txt"), stretch=10, every=3)
    assert int(plain.byte_counts(TextPart.SEARCH).sum()) == plain.tokens(TextPart.SEARCH).numel()
    assert text_digest(text) != text_digest(plain)


def test_what_is_no_tokenizer_is_said(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the rain in the plain")
    here = {"path": str(tmp_path / "a.txt"), "stretch": 2, "every": 3}
    with pytest.raises(ConfigError, match=r"`dataset.tokenizer` is `.*`, which has no `tokenizer.json`"):
        build("dataset", "text", tokenizer=str(tmp_path), **here).tokens(TextPart.TRAIN)
    (tokenizer / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer.json` is no tokenizer"):
        build("dataset", "text", tokenizer=str(tokenizer), **here).tokens(TextPart.TRAIN)
