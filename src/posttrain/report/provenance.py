"""The provenance section: time and tokens, settings, hashes, versions and the recipe.

Input: manifests and recipe.toml. Details are collapsed.
"""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from posttrain.report import formatting
from posttrain.report.markup import Content, details, el, facts, scroll, section
from posttrain.report.run import RunRecord

# Fields shown elsewhere in the report or in a group below.
_GROUPED_FIELDS = frozenset({"settings", "metrics", "files", "libraries", "warnings", "inputs", "data", "rows", "base"})


def provenance(run: RunRecord) -> Markup:
    """The section of times, settings, versions and hashes."""
    stages = [(stage.name, stage.manifest) for stage in run.stages if stage.manifest]
    scored = [(f"evaluate {policy.name}", policy.manifest) for policy in run.policies]
    manifests = sorted([*stages, *scored], key=lambda pair: _order(run, pair[0]))
    parts: list[Markup] = [_times(manifests)] if manifests else []
    parts += [_manifest(name, manifest) for name, manifest in manifests]
    parts.append(details("recipe.toml", el("pre", run.recipe_text)))
    lead = "A fingerprint covers everything that determines a result: settings, inputs, data, base, seed, code version."
    return section("provenance", "Settings, versions, hashes, time", *parts, lead=lead)


def _order(run: RunRecord, name: str) -> tuple[int, bool]:
    """The sort key: each stage followed by its evaluation, the base first."""
    names = ["base", *(stage.name for stage in run.stages)]
    return names.index(name.removeprefix("evaluate ")), name.startswith("evaluate ")


def _times(manifests: list[tuple[str, dict[str, Any]]]) -> Markup:
    head = el("tr", *(el("th", title) for title in ("step", "kind", "time", "steps", "tokens", "tokens/s", "fingerprint")))
    rows = [el("tr", *(el("td", cell) for cell in _time_row(name, manifest))) for name, manifest in manifests]
    total = formatting.duration(sum(m.get("seconds", 0.0) for _, m in manifests))
    foot = el("tr", el("td", "total"), el("td", ""), el("td", total), *(el("td", "") for _ in range(4)))
    return scroll(el("table.times", el("thead", head), el("tbody", *rows, foot)), label="time and tokens")


def _time_row(name: str, manifest: Mapping[str, Any]) -> list[Content]:
    tokens, seconds = manifest.get("tokens"), manifest.get("train_seconds")
    rate = f"{tokens / seconds:,.0f}" if tokens and seconds else "–"
    return [
        name, str(manifest.get("stage", "")), formatting.duration(manifest.get("seconds")),
        formatting.plain(manifest.get("steps")),
        formatting.plain(tokens), rate, el("code", manifest["fingerprint"]),
    ]  # fmt: skip


def _manifest(name: str, manifest: Mapping[str, Any]) -> Markup:
    plain = [
        (key, formatting.plain(value))
        for key, value in manifest.items()
        if key not in _GROUPED_FIELDS and not isinstance(value, dict | list)
    ]
    groups: list[Content] = [_group("artifact", plain)]
    for key in ("settings", "base", "inputs", "data", "rows", "libraries", "metrics", "files"):
        rows = flat(manifest.get(key) or {})
        if rows:
            groups.append(_group(key, rows))
    return details(name, *groups)


def _group(title: str, rows: list[tuple[str, str]]) -> Markup:
    return el("div.group", el("h4", title), facts((key, el("code", value)) for key, value in rows))


def flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Flatten nested tables to dotted names and short texts."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in flat(item, f"{path}.{key}".lstrip("."))]
    if isinstance(value, list):
        return [
            (
                path,
                ", ".join(formatting.plain(item) if not isinstance(item, dict | list) else str(item) for item in value) or "–",
            )
        ]
    return [(path, formatting.plain(value))]
