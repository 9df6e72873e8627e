"""The model card that travels with exported weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from lcsc.core.words import IMAGES, Words, words_of
from lcsc.export.folder import NOT_SETTINGS, USE_MIXED, lora_text, plain_text
from lcsc.models.network import NETWORKS, saved_config

_USE = """```python
from {library} import {cls}

net = {cls}.from_pretrained("path/to/this/folder").eval()
```"""
#: by library; both with the base model that the checkpoints were trained on
_USE_ADAPTER = {
    "peft": """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()
```""",
    "diffusers": """```python
pipe.load_lora_weights("path/to/this/folder")
```""",
}


def model_card(
    info: Mapping[str, Any],
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
    export: str,
    adapter: str | None = None,
) -> str:
    """README.md of an exported model: YAML front matter, scores, coefficients and the command that made it.

    Args:
        info: run.json of the search.
        recipe: the candidate's recipe with its parents.
        report: the `report` section of summary.json.
        export: one sentence about the score of this very artefact.
        adapter: the library that loads it where it is an adapter, else None.
    """
    metric, evaluator = info["metric"], info["fingerprints"]["evaluator"]
    best, words = report["best"], words_of(evaluator)
    lines = [
        "---",
        yaml.safe_dump(_front(info, recipe, report, adapter), sort_keys=False).strip(),
        "---",
        f"# {info['name']}: {_made(info, recipe)}",
        "",
        f"{metric} **{best['value']:.4g}{_se(best, ' ± ')}**{_calls(info, words)}. {export}",
        "",
        "| model | " + metric + " | ± SE | setting |",
        "|---|---|---|---|",
        f"| **lcsc** | **{best['value']:.4g}** | {_se(best)} | {best['label']} |",
        *(f"| {who} | {row['value']:.4g} | {_se(row)} | {row['label']} |" for who, row in report["baselines"].items()),
        "",
        *_scored(words),
        *_places(report),
        *(["", lora_text(recipe["rank"], recipe["error"])] if "error" in recipe else []),
        "",
        *_settings(recipe),
        *_use(recipe["arch"], adapter),
        *_levels(evaluator, recipe["evaluator"].get("levels") or {}),
        "## How it was made",
        "",
        f"    {info['command'] or 'lcsc.run_search(...)'}",
        "",
        "| circumstance | value |",
        "|---|---|",
        *(f"| {key} | `{value}` |" for key, value in evaluator.items()),
        *(f"| {key} | {value} |" for key, value in info["fingerprints"]["versions"].items() if value),
        "",
    ]
    if "coef" in recipe:
        copied = [f"{recipe['copied']}.", ""] if recipe.get("copied") else []
        lines += ["## Coefficients", "", *copied, *_coefficients(recipe), ""]
    return "\n".join(lines)


def _front(
    info: Mapping[str, Any], recipe: Mapping[str, Any], report: Mapping[str, Any], adapter: str | None
) -> dict[str, Any]:
    """What model hubs read."""
    arch = recipe["arch"]
    return {
        "library_name": adapter or ("pytorch" if arch is None else saved_config(arch)[0]),
        "tags": ["lcsc", recipe["operator"]] if _remade(recipe) else ["lcsc", "merge", "checkpoint-averaging"],
        "lcsc": {
            "run_id": info["run_id"],
            "metric": info["metric"],
            "value": report["best"]["value"],
            "se": report["best"]["se"],
            "nfe": info["nfe"],
            "version": info["fingerprints"]["versions"]["lcsc"],
        },
    }


def _remade(recipe: Mapping[str, Any]) -> bool:
    """Whether the model was made of one checkpoint, piece by piece, and not combined of several."""
    return "pieces" in recipe


def _made(info: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    if _remade(recipe):
        return f"one checkpoint after `{recipe['operator']}`, chosen by lcsc"
    return f"{len(info['bank']['steps'])} checkpoints combined by lcsc"


def _calls(info: Mapping[str, Any], words: Words) -> str:
    """At which price; text is read once, which goes without saying."""
    return f" at {info['nfe']} network evaluations an image" if words is IMAGES else ""


def _scored(words: Words) -> list[str]:
    if words is IMAGES:
        return [
            "Scored on report seeds and reference images that the search never used; the baselines were tuned on the",
            "same search seeds as the winner. The standard error covers the sampling of the generated images.",
        ]
    return [
        f"Scored {words.half} that neither training nor search used; the baselines were tuned on the same",
        f"{words.whole} as the winner. The standard error covers which {words.drawn} these are.",
    ]


def _settings(recipe: Mapping[str, Any]) -> list[str]:
    """A table of what was decided, for models that are no combination; plain numbers and words only."""
    if not _remade(recipe):
        return []
    hidden = {*NOT_SETTINGS, "arch", "run_id", "evaluator", "score", "steps"}
    rows = [f"| {key} | {plain_text(value)} |" for key, value in recipe.items() if key not in hidden]
    return ["| setting | value |", "|---|---|", *rows, ""]


def _use(arch: Mapping[str, Any] | None, adapter: str | None) -> list[str]:
    """How to load it; nothing for tensors that no library knows."""
    if adapter is None and arch is None:
        return []
    if arch is None:
        text = _USE_ADAPTER[str(adapter)]
    else:
        library = NETWORKS.get(arch["class"]) or saved_config(arch)[0]
        text = _USE.format(library=library, cls=arch["class"])
        text = USE_MIXED if arch["config"].get("per_layer_config") else text
    return ["## Use", "", text, ""]


def _places(report: Mapping[str, Any]) -> list[str]:
    """A table of where the models lie; nothing where the run does not say."""
    points = (report.get("geometry") or {}).get("points") or {}
    rows = [
        f"| {'lcsc' if who == 'best' else who} | {p['from_last']:.4g} | {p['sum_abs']:.2f} | {p['max_abs']:.3f} |"
        for who, p in points.items()
        if {"from_last", "sum_abs"} <= set(p)
    ]
    head = ["", "| model | distance from last | sum of abs(coef) | max abs(coef) |", "|---|---|---|---|"]
    return [*head, *rows] if rows else []


def _levels(evaluator: Mapping[str, Any], levels: Mapping[str, Sequence[float]]) -> list[str]:
    """How to sample where the noise levels were searched with the weights; nothing where the sampler has its own."""
    if not levels:
        return []
    calls, names = str(evaluator["nfe"]).split("+"), evaluator["sampler"]
    samplers = dict(zip(calls, names if isinstance(names, list) else [names], strict=True))
    lines = [
        "The noise levels were searched with the weights, and the scores above hold with them only. In place of its",
        "own levels the sampler gets these (a sampler of lcsc as the first argument of `run`):",
    ]
    for nfe, found in levels.items():
        row = ", ".join(repr(float(level)) for level in found)
        lines += ["", f"- {nfe} network evaluations, `{samplers[nfe]}`: `levels = [{row}]`"]
    return [*lines, ""]


def _se(row: Mapping[str, Any], before: str = "") -> str:
    """A row's standard error, nothing where the objective gives none."""
    return "" if row["se"] is None else f"{before}{row['se']:.2g}"


def _coefficients(recipe: Mapping[str, Any]) -> list[str]:
    """A table with one row a checkpoint and one column for each layer group."""
    heads, columns = ["coefficient"], [recipe["coef"]]
    if "groups" in recipe:
        heads = [f"`{''.join(c for c in name if c not in '`|')}`" for name in recipe["groups"]["names"]]
        columns = recipe["coef"]
    rows = [
        f"| {step} | {' | '.join(f'{coef:+.6f}' for coef in coefs)} |"
        for step, *coefs in zip(recipe["steps"], *columns, strict=True)
    ]
    return [f"| step | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|", *rows]
