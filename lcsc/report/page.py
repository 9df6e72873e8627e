"""The HTML shell of every page: one file, no external resource, nothing executable, light and dark."""

from __future__ import annotations

import base64
import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --line: #d8dee4; --page: #ffffff; --card: #f6f8fa;
  --accent: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --faint: #9198a1; --line: #30363d; --page: #0d1117;
  --card: #161b22; --accent: #6cb6e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 948px; padding: 28px 24px 64px; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 2px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; padding-bottom: 5px; border-bottom: 1px solid var(--line); }
p { margin: 8px 0; }
.faint { color: var(--faint); overflow-wrap: anywhere; }
.result { margin: 20px 0 8px; padding: 14px 18px; background: var(--card); border: 1px solid var(--line);
  border-left: 5px solid var(--accent); border-radius: 6px; font-weight: 600; font-size: 17px;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 5px 16px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; font-size: 14px; vertical-align: bottom; }
th.left, td.left { text-align: left; }
tr.strong td { font-weight: 700; color: var(--accent); }
table.facts td { white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { color: var(--faint); white-space: nowrap; padding-right: 24px; }
img { display: block; width: 100%; height: auto; margin: 12px 0; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 12px 14px;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--faint); }
@media print { body { max-width: none; } details { display: none; } }
"""

SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
{% block body %}{% endblock %}
</body>
</html>
"""

REPORT = """{% extends "shell" %}
{% block body %}
<h1>{{ title }}</h1>
<p class="faint">{{ under }}</p>
<div class="result">{{ result }}</div>
{% if not finished %}<p>The search is not finished. What follows is its state when this page was written; the scores
are not those of the report seeds, and flatter whatever was chosen by them.</p>{% endif %}

<h2>Scores</h2>
{% if scores %}{{ scores }}
<p class="faint">Lower is better{{ words.beside }}. Value ± one standard error ({{ words.spread }}),
{{ words.half }} that neither the search nor the choice of the winner has seen. The ratio is to the best
baseline; each baseline was tuned on the same search seeds.</p>
{% else %}<p>The winner and the baselines are not scored on the report seeds yet.</p>{% endif %}
{% for line in vetoes %}<p class="faint">{{ line }}</p>
{% endfor %}
{% if pictures.scores %}<img src="{{ pictures.scores }}" alt="bar chart of the final scores">{% endif %}
{% if pictures.front %}<h2>Quality against network calls</h2>
<img src="{{ pictures.front }}" alt="scores against network calls an image, winner and baselines">{% endif %}
{% if pictures.size %}<h2>Loss against file</h2>
<img src="{{ pictures.size }}" alt="scores against bytes of a coded checkpoint, trials and baselines">{% endif %}
{% if pictures.cache %}<h2>Loss against cache</h2>
<img src="{{ pictures.cache }}" alt="scores against bytes of cache a token, trials and baselines">{% endif %}

<h2>Convergence</h2>
<img src="{{ pictures.convergence }}" alt="scores against number of trials, with the baselines as lines">

{% if pictures.coefficients %}<h2>Coefficients</h2>
<img src="{{ pictures.coefficients }}" alt="coefficient of each checkpoint against its training step">{% endif %}

{% if account %}<h2>How the search went</h2>
<ul>{% for line in account %}<li>{{ line }}</li>
{% endfor %}</ul>{% endif %}

{% if places %}<h2>Where the winner lies</h2>
{{ places }}
{% for note in notes %}<p class="faint">{{ note }}</p>
{% endfor %}
{% if pictures.geometry %}<img src="{{ pictures.geometry }}"
  alt="share of the slope or of the spread along each direction, and of the winner's way">{% endif %}
{% endif %}

{% if pictures.samples %}<h2>Samples</h2>
<img src="{{ pictures.samples }}" alt="real images, and samples of three models from the same noise">{% endif %}

<h2>Circumstances</h2>
<table class="facts"><tbody>
{% for name, value in facts %}<tr><td class="left">{{ name }}</td><td class="left">{{ value }}</td></tr>
{% endfor %}</tbody></table>

<h2>Configuration</h2>
<details><summary>everything this run was made from</summary><pre>{{ config }}</pre></details>
{% endblock %}
"""

COMPARISON = """{% extends "shell" %}
{% block body %}
<h1>{{ title }}</h1>
<p class="faint">{{ under }}</p>
{% for group in groups %}
<h2>{{ group.title }}</h2>
<p class="faint">{{ group.sentence }}</p>
{{ group.table }}
{% endfor %}
{% for front in fronts %}
<h2>Quality against network calls</h2>
<p class="faint">{{ front.subject }}{% if front.sentence %} · {{ front.sentence }}{% endif %}</p>
<img src="{{ front.picture }}" alt="scores against network calls an image, winners and baselines">
{% endfor %}
{% for picture in caches %}
<h2>Loss against cache</h2>
<img src="{{ picture }}" alt="scores against bytes of cache a token, winners and baselines">
{% endfor %}
{% for picture in sizes %}
<h2>Loss against file</h2>
<img src="{{ picture }}" alt="scores against bytes of a coded checkpoint, winners and baselines">
{% endfor %}
{% endblock %}
"""


@functools.cache
def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    pages = {"shell": SHELL, "report": REPORT, "comparison": COMPARISON}
    return Environment(loader=DictLoader(pages), autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def data_uri(png: bytes) -> str:
    """A picture as the text of an `src`, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def render(page: str, **values: Any) -> bytes:
    """The page `report` or `comparison` as UTF-8; every value that is not markup already is escaped."""
    from markupsafe import Markup

    return _environment().get_template(page).render(style=Markup(STYLE), **values).encode()
