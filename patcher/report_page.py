"""The page of ``patcher report``, as a jinja2 template without scripts or external resources."""

from __future__ import annotations

__all__ = ["PAGE"]

PAGE = """<!DOCTYPE html>
{% set line = report.entry.lineage %}
{% set details = line.details %}
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.classifier }}, version {{ line.version }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #212529; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #ced4da; } td.n, th.n { text-align: right; }
tbody th { border: 0; font-weight: 400; color: #495057; white-space: nowrap; }
.verdict { border-left: 4px solid #2f9e44; padding: .4rem .9rem; background: #f1f3f5; }
.forced { border-color: #e8590c; } .quiet { color: #495057; } code { font-size: .9em; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em; }
svg { border: 1px solid #dee2e6; max-width: 100%; height: auto; }
</style>
</head>
<body>
<h1>{{ report.classifier }}, version {{ line.version }}</h1>
<p class="quiet">{{ report.entry.what() }} · {{ report.entry.labels }} labels ·
{% if line.created %}{{ line.created }}{% endif %}{% if line.author %} by {{ line.author }}{% endif %} ·
{{ "serves" if report.entry.serving else "does not serve" }}</p>

{% if details.get("verdict") %}
<p class="verdict{{ " forced" if line.gate == "forced" }}">{{ details.get("verdict") }}
{% if line.gate == "forced" %}<strong>Published anyway (<code>--force</code>).</strong>{% endif %}</p>
{% endif %}

<h2>The patch</h2>
<table><tbody>
<tr><th>parent</th><td>{{ line.parent or "none" }}\
{{ ", not on disk any more" if line.parent and not report.parent }}</td></tr>
<tr><th>method</th><td>{{ line.method }}</td></tr>
<tr><th>gate</th><td>{{ line.gate }}</td></tr>
{% if details.get("examples") %}<tr><th>examples</th><td>{{ details.get("examples") }}</td></tr>{% endif %}
{% if details.get("calibration") %}
<tr><th>old inputs that flip</th><td>{{ details.get("flips")|percent }}\
{% if details.get("bound") %} ({{ details.get("bound") }})\
{% else %}, with 95 % confidence at most {{ details.get("flips_upper_bound")|percent(up=True) }}
(counted on: {{ details.get("calibration") }}){% endif %}</td></tr>
{% endif %}
{% for label, recall in (details.get("estimated_recall") or {}).items() %}
<tr><th>expected recall</th><td>{{ label }}: {{ recall|percent }}\
{% if (details.get("recall_lower_bound") or {}).get(label) is not none %}, with 95 % confidence at least \
{{ details["recall_lower_bound"][label]|at_least }} of texts like those it was counted on{% endif %}</td></tr>
{% endfor %}
{% if report.difference %}
<tr><th>rows of labels in both</th><td>{{ report.difference.same_rows }} identical,
{{ report.difference.changed_rows|length }} changed</td></tr>
{% endif %}
<tr><th>data</th><td><code>{{ line.data_hash or "—" }}</code></td></tr>
<tr><th>backbone</th><td><code>{{ line.backbone }}</code></td></tr>
<tr><th>patcher</th><td>{{ line.tool_version }}</td></tr>
</tbody></table>

{% if report.after %}
<h2>On {{ report.after.examples }} labelled texts</h2>
<table>
<thead><tr><th></th>{% if report.before %}<th class="n">version {{ report.before.version }}</th>{% endif %}\
<th class="n">version {{ report.after.version }}</th></tr></thead>
<tbody>
<tr><th>accuracy</th>{% if report.before %}<td class="n">{{ report.before.accuracy|percent }}</td>{% endif %}\
<td class="n">{{ report.after.accuracy|percent }}</td></tr>
<tr><th>macro F1</th>{% if report.before %}<td class="n">{{ report.before.macro_f1|percent }}</td>{% endif %}\
<td class="n">{{ report.after.macro_f1|percent }}</td></tr>
</tbody>
</table>
{% for old, new in report.after.renamed %}
<p>Texts labelled {{ old }} count as {{ new }}, its name in this version.</p>
{% endfor %}
{% for old, new in report.after.merged %}
<p>Texts labelled {{ old }} count as {{ new }}, into which it was merged.</p>
{% endfor %}
{% if report.after.unknown %}
<p>Labels of the file that the version lacks, counted as wrong: {{ report.after.unknown|count_and_some }}.</p>
{% endif %}
{% if changes %}
<h2>Labels whose figures changed</h2>
<table>
<thead><tr><th>label</th><th class="n">texts</th><th class="n">precision</th><th class="n">recall</th>\
<th class="n">F1 before</th><th class="n">F1 now</th></tr></thead>
<tbody>
{% for change in changes[:shown] %}
{% set now = change.after or change.before %}
<tr><td>{{ change.label }}</td><td class="n">{{ now.support }}</td><td class="n">{{ now.precision|percent }}</td>\
<td class="n">{{ now.recall|percent }}</td>\
<td class="n">{{ (change.before.f1 if change.before else None)|percent }}</td>\
<td class="n">{{ (change.after.f1 if change.after else None)|percent }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% for title, flips in (("Right before, wrong now", report.difference and report.difference.flips),
                        ("Wrong before, right now", report.difference and report.difference.gains)) %}
{% if flips is sequence %}
<h2>{{ title }}: {{ flips|length }}</h2>
{% if flips %}
<table>
<thead><tr><th>text</th><th>label</th><th>before</th><th>now</th></tr></thead>
<tbody>
{% for flip in flips[:shown] %}
<tr><td>{{ flip.text|truncate(300) }}</td><td>{{ flip.label }}</td>\
<td>{{ flip.before }}</td><td>{{ flip.after }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if flips|length > shown %}<p class="quiet">The first {{ shown }} are shown.</p>{% endif %}
{% endif %}
{% endif %}
{% endfor %}
{% if report.after.confusions %}
<h2>Most frequent confusions now</h2>
<table>
<thead><tr><th>text of</th><th>answered</th><th class="n">times</th></tr></thead>
<tbody>
{% for label, answered, count in report.after.confusions[:20] %}
<tr><td>{{ label }}</td><td>{{ answered }}</td><td class="n">{{ count }}</td></tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% else %}
<p class="quiet">With <code>--eval FILE</code>, labelled texts, this page also shows accuracy, confusions and flips.</p>
{% endif %}

{% if picture %}
<h2>Among its neighbours</h2>
<p class="quiet">Remembered inputs in the plane in which these labels' means differ most. Labels that overlap here may
still be apart in the other directions; what lies apart here is apart.</p>
<svg viewBox="0 0 {{ picture.width }} {{ picture.height }}" width="{{ picture.width }}" height="{{ picture.height }}"
 role="img" aria-label="A map of the remembered inputs by label">
{% for dot in picture.dots %}
<circle cx="{{ dot.x }}" cy="{{ dot.y }}" r="{{ dot.radius }}" fill="{{ dot.colour }}" fill-opacity="0.75">\
<title>{{ dot.label }}</title></circle>
{% endfor %}
</svg>
<p>{% for label, colour in picture.legend %}<span class="swatch" style="background: {{ colour }}"></span>{{ label }}\
&ensp;{% endfor %}</p>
{% endif %}
</body>
</html>
"""
