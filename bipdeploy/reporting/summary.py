"""The table a person reads at the end: figures as rows, with units. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bipdeploy.recipe.figures import CHANCE, text_suffix
from bipdeploy.reporting.portability import of_export, table
from bipdeploy.running import artifacts


class Row(NamedTuple):
    """One line of the comparison; all but `figure` are formatted for reading."""

    figure: str
    label: str
    dense: str
    pruned: str
    change: str
    spread: str


def as_count(value: float) -> str:
    """`2.02 M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def as_bytes(value: float) -> str:
    """`3.85 MiB`."""
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f} B"


def _ms(value: float) -> str:
    return f"{value:.2f} ms"


def _rate(value: float) -> str:
    return f"{value:.1f} tok/s" if value < 1000 else f"{value:.0f} tok/s"


# Figure → label and format. Rows appear where the figure was measured.
_ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "parameters": ("Parameters", as_count),
    "block_parameters": ("  of which in blocks", as_count),
    "weights_bytes": ("Weights, 16 bit", as_bytes),
    "kv_bytes_per_token": ("KV cache/token, 16 bit", as_bytes),
    "prefill": ("Prefill", _ms),
    "ttft": ("Time to first token", _ms),
    "decode": ("Decode", _rate),
    "memory": ("Peak memory", as_bytes),
}


def rows(figures: Mapping[str, float], spread: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The comparison of dense and pruned. `spread`: quartiles by figure name, where measured; of
    accuracies half the width of the 95% interval."""
    wanted = {**_quality(figures), **_accuracy(figures), **_ROWS, **_onnx(figures),
              **_vllm(figures)}
    found = _table(wanted, figures, spread)
    order = ["parameters", "block_parameters", "weights_bytes", "kv_bytes_per_token"]
    return sorted(found, key=lambda r: r.figure.rsplit(".", 1)[0] not in order)


def _table(wanted: Mapping[str, tuple[str, Callable[[float], str]]],
           figures: Mapping[str, float],
           spread: Mapping[str, Mapping[str, float]]) -> list[Row]:
    found = []
    for name, (label, shown) in wanted.items():
        if f"{name}.dense" not in figures:
            continue
        factor = "speedup" if f"{name}.speedup" in figures else "ratio"
        found.append(Row(
            f"{name}.{factor}", label, shown(figures[f"{name}.dense"]),
            shown(figures[f"{name}.pruned"]),
            (f"{figures[f'{name}.{factor}']:.2f}x" if f"{name}.{factor}" in figures else "")
            + (" as fast" if factor == "speedup" else ""),
            _spread(spread.get(f"{name}.{factor}"))))
    return found


def _spread(measured: Mapping[str, float] | None) -> str:
    if not measured:
        return ""
    if "half_width_95" in measured:
        return f"±{measured['half_width_95']:.2f} (95%)"
    return f"{measured['low']:.2f} to {measured['high']:.2f}"


def _quality(figures: Mapping[str, float]) -> dict[str, tuple[str, Callable[[float], str]]]:
    """Perplexity and bits per byte on each text, at each window that was measured."""
    found: dict[str, tuple[str, Callable[[float], str]]] = {}
    for base, label, shown in (("perplexity", "Perplexity", "{:.2f}".format),
                               ("bits_per_byte", "Bits/byte", "{:.3f}".format)):
        for name in (f.removesuffix(".dense") for f in figures if f.endswith(".dense")):
            text, _, window = name.removeprefix(f"{base}.").rpartition(".")
            # Without a window it is the first one once more.
            if name.startswith(f"{base}.") and (window.isdigit() or window == "max"):
                # Short where there is a name: rows are to fit 80 columns.
                found[name] = (f"{label}, {text}, {window}" if text else
                               f"{label}, window {window}", shown)
    return found


def _accuracy(figures: Mapping[str, float]) -> dict[str, tuple[str, Callable[[float], str]]]:
    """Accuracy on each task, and the mean where there are several."""
    found: dict[str, tuple[str, Callable[[float], str]]] = {}
    for name in figures:
        if name.startswith("accuracy.") and name.endswith(f".{CHANCE}") and name.count(".") > 1:
            base = name.removesuffix(f".{CHANCE}")
            found[base] = (f"Accuracy, {base.removeprefix('accuracy.')}", "{:.1%}".format)
    if len(found) > 1:
        found["accuracy"] = (f"Accuracy, mean of {len(found)}", "{:.1%}".format)
    return found


def _onnx(figures: Mapping[str, float]) -> dict[str, tuple[str, Callable[[float], str]]]:
    """The ONNX graph and its quantised copies: size, quality, speed."""
    found: dict[str, tuple[str, Callable[[float], str]]] = {}
    for prefix in sorted({f.rpartition(".bytes.")[0] for f in figures
                          if f.startswith("onnx.") and ".bytes." in f}):
        title = "ONNX" + prefix.removeprefix("onnx").replace(".", " ")
        found |= {f"{prefix}.bytes": (f"{title}: weights", as_bytes),
                  **{f"{prefix}.perplexity{text_suffix(text)}": (
                      f"{title}: perplexity{text and f', {text}'}", "{:.2f}".format)
                     for text in ["", *_further(figures)]},
                  f"{prefix}.prefill": (f"{title}: prefill", _ms),
                  f"{prefix}.decode": (f"{title}: decode", _rate)}
    return found


def _further(figures: Mapping[str, float]) -> list[str]:
    """The names of the texts that perplexity was measured on besides the first."""
    middle = [name.split(".")[1] for name in figures
              if name.startswith("perplexity.") and name.count(".") == 3]
    return list(dict.fromkeys(middle))


def _vllm(figures: Mapping[str, float], *, whole: bool = False
          ) -> dict[str, tuple[str, Callable[[float], str]]]:
    """What vLLM's tools measured: of the server at each load one rate and, if `whole`, all."""
    found: dict[str, tuple[str, Callable[[float], str]]] = {}
    for name in (f.removesuffix(".dense") for f in figures if f.endswith(".dense")):
        if not name.startswith("vllm.serve."):
            continue
        load, measure = name.removeprefix("vllm.serve.").rsplit(".p", 1)[0].rsplit(".", 1)
        title = f"vLLM, {load[1:]} in flight" if load[0] == "c" else f"vLLM, {load[1:]} requests/s"
        if measure == "output_tokens":
            found[name] = (f"{title}: output", _rate)
        elif whole and measure == "requests":
            found[name] = (f"{title}: answered", "{:.2f} req/s".format)
        elif whole:
            found[name] = (f"{title}: {measure.upper()} p{name.rsplit('.p', 1)[1]}", _ms)
    return {"vllm.throughput": ("vLLM, offline throughput", _rate),
            "vllm.latency": ("vLLM, latency of a batch", _ms), **found,
            "vllm.kv_tokens": ("vLLM, KV cache, tokens", as_count),
            **({"vllm.startup": ("vLLM, start (once each)", "{:.1f} s".format)} if whole else {})}


def vllm_rows(figures: Mapping[str, float],
              spread: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Everything that vLLM's tools measured, for the report."""
    return _table(_vllm(figures, whole=True), figures, spread)


def collect(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that the final table and the report show, from stage folders by name."""
    figures = artifacts.figures(list(folders.values()))
    details = {name: _optional(folders.get(stage), file) for name, stage, file in (
        ("scores", "score", "scores.json"), ("kept", "prune", "kept.json"),
        ("recover", "recover", "recover.json"), ("tune", "tune", "tune.json"),
        ("export", "export", "export.json"),
        ("evaluate", "evaluate", "evaluate.json"), ("bench", "bench", "bench.json"),
        ("gates", "gate", "gates.json"))}
    zero_shot = (details["evaluate"] or {}).get("zero_shot", {})
    spread = {name: measured for part in (*(details["bench"] or {}).values(), zero_shot)
              for name, measured in part.get("spread", {}).items()}
    portability = table(of_export(details["export"])) if details["export"] else []
    return {"figures": figures, "rows": rows(figures, spread),
            "vllm_rows": vllm_rows(figures, spread), "portability": portability,
            "tune_said": tune_said(details["tune"]), **details}


def tune_said(record: Mapping[str, Any] | None) -> str | None:
    """One sentence about the training, from `tune.json`; None where none was asked for."""
    if not (record and record["enabled"]):
        return None
    data, loss = record["data"], record["loss"]
    kept = (f"best at step {record['best_step']}" if record["best_step"]
            else "no step was better, so the model is as it was")
    early = ", stopped early" if record["stopped_early"] else ""
    method, written = (("LoRA", "merging") if record["method"] == "lora" else
                       ("All weights trained", "writing"))
    return (f"{method}: {record['steps']} steps{early}, {record['tokens']:,} tokens of "
            f"{data['data']} ({data['split']}); validation loss {loss['before']:.3f} to "
            f"{loss['after']:.3f} nats, {kept}; {written} moved no logit by more than "
            f"{record['largest_logit_difference']:.2g}")


def _optional(folder: Path | None, file: str) -> Any:
    if folder is None or not (folder / file).is_file():
        return None
    return artifacts.read_json(folder / file)
