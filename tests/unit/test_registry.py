"""Parts are found, built and refused by name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lcsc.core import registry
from lcsc.core.errors import ConfigError, UnknownPart
from lcsc.core.registry import build, discover, part, register


def test_unknown_name_offers_the_nearest():
    said = r"no searcher named `cmma`\. Did you mean `cma`\? Known: additive, additive_front, auto, "
    with pytest.raises(UnknownPart, match=said):
        part("searcher", "cmma")


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="no kind of part named `optimizer`"):
        discover("optimizer")


def test_presets_make_different_parts_of_one_class():
    assert build("searcher", "cma").optimizer == "CMA"
    assert build("searcher", "de").optimizer == "DE"
    assert build("searcher", {"name": "cma", "sigma0": 0.5}).sigma0 == 0.5


def test_unknown_field_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"searcher `cma` has no field `sigma`\. Did you mean `sigma0`\?"):
        build("searcher", "cma", sigma=1.0)


@pytest.mark.parametrize("kind", sorted(registry.ROOMS))
def test_every_part_has_source_summary_and_buildable_types(kind):
    parts = discover(kind)
    assert parts, kind
    for found in parts.values():
        assert found.source
        assert found.summary.endswith((".", "?")), f"{kind} {found.name}: {found.summary!r}"


def test_description_builds_the_same_part_again():
    for kind, name, fields in (
        ("searcher", "de", {"sigma0": 0.3}),
        ("sampler", "consistency", {"sigmas": [80.0, 1.0]}),
    ):
        made = build(kind, name, **fields)
        assert registry.describe(kind, made) == {"name": name, **registry.describe(kind, made), **fields}
        assert build(kind, registry.describe(kind, made)) == made


def test_registration_refuses_empty_source_and_taken_names():
    with pytest.raises(ConfigError, match="has no source"):
        register("sampler", "nobody", source="")

    @dataclass(frozen=True)
    class Other:
        """Another euler."""

    with pytest.raises(ConfigError, match="sampler `euler` is registered twice"):
        discover("sampler") and register("sampler", "euler", source="x")(Other)
    with pytest.raises(ConfigError, match="must be a dataclass"):
        register("sampler", "plain", source="x")(int)
