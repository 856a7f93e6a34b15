"""Texts planted in every field of a run that data or a user can fill."""

import json
from pathlib import Path
from typing import Any


def edit(path: Path, change: Any) -> None:
    """Change a JSON file in place."""
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "' onmouseover='alert(1)",
    "</style><script>1</script>", "</title></head><body onload=alert(1)>", "<a href=javascript:alert(1)>x</a>",
    "&lt;b&gt; &#60;i&#62;", "</svg></text></details><iframe src=//x>", "<!--", "]]><script>", "{style}{body}", "\x00<b\x00>",
    "<\u202escript>", "$x_1$ \\frac{<b>}",
)  # fmt: skip


def planted(run: Path, texts: tuple[str, ...]) -> Path:
    """The texts in every place of a run that data or a user can fill: one by one where it holds many, else end to end."""
    whole = " ".join(texts)
    for policy in ("base", "sft"):
        rows = [{"prompt": f"{i} {text}", "answer": text, "ended": False, "tokens": 3} for i, text in enumerate(texts)]
        (run / "evaluate" / policy / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def manifest(m: dict[str, Any]) -> None:
        m |= {"warnings": list(texts), "commit": whole, "version": whole, "metrics": dict.fromkeys(texts, 1.0)}
        m |= {"data": {whole: whole}, "rows": {whole: 3}, "stage": whole, "device": whole, "libraries": {whole: whole}}
        m["settings"]["stage"][whole] = list(texts)

    def report(r: dict[str, Any]) -> None:
        pieces = [{"label": text, "text": text, "trained": True} for text in texts]
        r |= {"dropped": dict.fromkeys(texts, 2), "examples": [{"id": whole, "pieces": pieces}], whole: whole}
        r["sources"] = [{"path": text, "layout": text, "rows": 3, "sha256": text} for text in texts]

    def card(s: dict[str, Any]) -> None:
        for stage in s["stages"]:
            for entry in stage["measures"].values():
                entry["title"] = whole

    edit(run / "sft" / "manifest.json", manifest)
    edit(run / "sft" / "data_report.json", report)
    edit(run / "scorecard.json", card)
    rows = [{"step": i, f"x/{whole}": i} for i in (1, 2)]
    (run / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("model", "kind", "data"):  # written as TOML strings, which JSON's are but for the escapes of NUL
        recipe = (run / "recipe.toml").read_text()
        line = next(line for line in recipe.splitlines() if line.startswith(f"{name} = "))
        (run / "recipe.toml").write_text(recipe.replace(line, f"{name} = {json.dumps(whole)}"))
    return run
