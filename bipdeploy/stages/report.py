"""Stage `report`: Markdown and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import yaml

from bipdeploy.planning.job import Job
from bipdeploy.reporting import summary, templates
from bipdeploy.running import artifacts, machine
from bipdeploy.stages.score import read_scores

PAGES = ("report.md", "report.html")


def run(job: Job) -> None:
    """Write `report.md`, `report.html`, the plots and `summary.json`."""
    job.reporter.total(2, "pages")
    collected = summary.collect(job.inputs)
    plots = draw(job, collected)
    for name, data in plots.items():
        (job.out / f"{name}.png").write_bytes(data)
    manifests = {name: manifest for name, path in job.inputs.items()
                 if (manifest := artifacts.read_manifest(path))}
    context = {
        "recipe": job.recipe, "environment": machine.environment(), "stages": manifests,
        "plots": {n: base64.b64encode(d).decode() for n, d in plots.items()},
        "recipe_yaml": yaml.safe_dump(job.recipe.model_dump(mode="json"), sort_keys=False),
        "notes": [f"{name}: {note}" for name, m in manifests.items() for note in m["notes"]],
        **collected}
    for name in PAGES:
        (job.out / name).write_text(templates.render(name, **context), "utf-8")
        job.reporter.advance()
    job.write("summary.json", {"figures": collected["figures"], "gates": collected["gates"],
                               "recipe": json.loads(job.recipe.model_dump_json())})


def draw(job: Job, collected: dict[str, Any]) -> dict[str, bytes]:
    """The plots as PNG: kept widths, importance by block, quality and speed."""
    plots = {}
    if collected["kept"]:
        plots["widths"] = _widths(collected["kept"]["blocks"])
    if (job.inputs["score"] / "scores.safetensors").is_file():
        plots["importance"] = _importance(job, collected)
    if any(row.figure.startswith(("perplexity", "prefill")) for row in collected["rows"]):
        plots["comparison"] = _comparison(collected["figures"])
    return plots


def _figure(columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(4.6 * columns, 3.2), dpi=110, layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _widths(blocks: list[dict[str, Any]]) -> bytes:
    figure, axes = _figure(2)
    heads = (("heads", "query heads kept") if any("kept_queries" in b for b in blocks)
             else ("kv_heads", "KV heads kept"))
    for axis, key, title in ((axes[0], *heads), (axes[1], "intermediate", "FFN channels kept")):
        axis.bar(range(len(blocks)), [b[key] for b in blocks], color="#3b6ea5")
        axis.set(title=title, xlabel="block", ylim=(0, None))
    return _png(figure)


def _importance(job: Job, collected: dict[str, Any]) -> bytes:
    """Each group's score, by block; crosses left with the pruning."""
    figure, axes = _figure(2)
    scores = read_scores(job.inputs["score"])
    kept = _kept(collected)
    for axis, part, key, title in ((axes[0], "heads", "groups", "Importance of KV groups"),
                                   (axes[1], "ffn", "channels", "Importance of channels")):
        for index, block in enumerate(scores):
            values = getattr(block, part)
            staying = set(kept[index][key]) if kept else set(range(len(values)))
            for chosen, marker, colour in ((True, "o", "#3b6ea5"), (False, "x", "#c44e52")):
                shown = [v for i, v in enumerate(values) if (i in staying) is chosen]
                axis.scatter([index + (0 if chosen else 0.25)] * len(shown), shown, marker=marker,
                             s=9, alpha=0.5, color=colour, linewidths=0.8)
        lowest = min((v for block in scores for v in getattr(block, part)), default=0)
        axis.set(title=f"{title} (x: removed)", xlabel="block",
                 yscale="log" if lowest > 0 else "linear")
    return _png(figure)


def _kept(collected: dict[str, Any]) -> list[dict[str, list[int]]]:
    """The groups and channels that stay in each block: as chosen again by the repair, where so."""
    repaired = (collected["recover"] or {}).get("blocks", [])
    if repaired and all("groups" in block for block in repaired):
        return repaired
    return [{"groups": block["kept_groups"], "channels": block["kept_channels"]}
            for block in (collected["kept"] or {}).get("blocks", [])]


def _comparison(figures: dict[str, float]) -> bytes:
    panels = [(name, title) for name, title in (
        ("perplexity", "Perplexity (lower is better)"), ("prefill", "Prefill, ms"),
        ("decode", "Decode, tokens/s")) if f"{name}.dense" in figures]
    figure, axes = _figure(len(panels))
    for axis, (name, title) in zip(axes, panels, strict=True):
        values = [figures[f"{name}.dense"], figures[f"{name}.pruned"]]
        bars = axis.bar(["dense", "pruned"], values, color=["#8c8c8c", "#3b6ea5"])
        axis.bar_label(bars, fmt="%.4g")
        axis.margins(y=0.12)
        axis.set(title=title)
    return _png(figure)
