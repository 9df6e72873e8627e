"""Text: what its parts hold, that they are the same everywhere, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lcsc.core.errors import ConfigError
from lcsc.core.registry import build
from lcsc.datasets.base import TextPart, need_images, need_text
from lcsc.datasets.content import text_digest


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
