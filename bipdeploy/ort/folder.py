"""An ONNX folder: two graphs over one file of weights, what describes them, and the tokenizer.

`model.onnx` gives logits for every token, `model_last.onnx` for the last one of each row; they
share `model.onnx.data`. `genai_config.json` makes the folder one of onnxruntime-genai, and
`bipdeploy.json` says what is in it. Importing this module loads no heavy library.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model.checkpoint import Checkpoint, write_companions
from bipdeploy.model.families import Architecture, BlockWidths
from bipdeploy.model.formats import CODE_FILE
from bipdeploy.model.loading import generation_settings
from bipdeploy.ort.installed import require
from bipdeploy.running.artifacts import sha256, write_json

MODEL, LAST, DATA = "model.onnx", "model_last.onnx", "model.onnx.data"
RECORD, GENAI = "bipdeploy.json", "genai_config.json"


@dataclass(frozen=True)
class Contents:
    """What `bipdeploy.json` says. files: {name: {"bytes": …, "sha256": …}}, graphs and weights."""

    style: str
    dtype: str  # of the cache, the logits, and of weights that are not quantised
    quantized: str | None
    head_dim: int
    vocabulary: int
    max_positions: int
    tied: bool
    blocks: tuple[BlockWidths, ...]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def kv_heads(self) -> list[int]:
        """KV heads of every cache, by its number: blocks without attention have none."""
        return [w.kv_heads for w in self.blocks if w.heads]


def write(source: Checkpoint, out: Path, *, style: str, dtype: str) -> None:
    """Write a checkpoint as a new ONNX folder.

    `style`: "gqa" or "std", see graph.py; `dtype`: "float32", "float16" or "bfloat16". Raises
    InputError for a model that cannot be written so, and where a package is missing.
    """
    require("onnx", "onnx_ir")
    import onnx_ir as ir

    from bipdeploy.model.folder import add_code
    from bipdeploy.model.formats import is_per_block
    from bipdeploy.ort import graph

    model = graph.build(source, style, dtype)
    out.mkdir(parents=True)
    ir.save(model, out / MODEL, external_data=DATA)
    arch = source.architecture
    shutil.copyfile(source.folder / "config.json", out / "config.json")
    if is_per_block(source.config):
        add_code(out)
    write_companions(source.folder, out)
    write_json(out / GENAI, genai_config(source, arch, style, dtype))
    finish(out, Contents(style, dtype, None, arch.head_dim, arch.vocabulary, arch.max_positions,
                         arch.tied, arch.blocks, {}))


def finish(out: Path, contents: Contents) -> None:
    """Write the second graph beside the first, and the record of all files."""
    from bipdeploy.ort import last

    last.write(out / MODEL, out / LAST)
    files = {name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)}
             for name in (MODEL, LAST, DATA)}
    write_json(out / RECORD, asdict(replace(contents, files=files)))


def read(folder: Path | str) -> Contents:
    """What is in an ONNX folder. Raises InputError where it is none, or where a file of it is
    missing or cut off; `verify` also reads what is in the files."""
    folder = Path(folder)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        blocks = tuple(BlockWidths(**widths) for widths in record["blocks"])
        contents = Contents(**{**record, "blocks": blocks})
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no ONNX folder of bipdeploy: it has no {RECORD}") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / RECORD} is damaged ({type(error).__name__}: {error}); export "
                         "the model again") from error
    for name, said in contents.files.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; the folder is not whole, copy it again")
        size = (folder / name).stat().st_size
        if size != said["bytes"]:
            raise InputError(f"{folder / name} has {size} bytes, and {RECORD} says "
                             f"{said['bytes']}; it is cut off or was changed, copy it again")
    return contents


def verify(folder: Path | str) -> Contents:
    """As `read`, and every byte against its SHA-256: a pass over all weights."""
    contents = read(folder)
    for name, said in contents.files.items():
        if sha256(Path(folder) / name) != said["sha256"]:
            raise InputError(f"{Path(folder) / name} is not what {RECORD} says (SHA-256 differs); "
                             "copy it again")
    return contents


def genai_config(source: Checkpoint, arch: Architecture, style: str, dtype: str) -> dict[str, Any]:
    """`genai_config.json` for a folder. Its layers are the blocks that have a cache; how many KV
    heads each has onnxruntime-genai sees in the graph. 16-bit folders ask for CUDA."""
    stated = generation_settings(source.folder)
    tokens = {name: stated[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")
              if name in stated}
    cached = [w for w in arch.blocks if w.heads]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai",
                            "provider_options": [] if dtype == "float32" else [{"cuda": {}}]},
        "filename": LAST,
        "head_size": arch.head_dim,
        "hidden_size": arch.hidden,
        "num_attention_heads": max((w.heads for w in cached), default=1),
        "num_key_value_heads": max((w.kv_heads for w in cached), default=1),
        "num_hidden_layers": len(cached),
        "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask",
                   "past_key_names": "past_key_values.%d.key",
                   "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value"}}
    return {"model": {"type": arch.family.model_type, "vocab_size": arch.vocabulary,
                      "context_length": arch.max_positions, **tokens, "decoder": decoder},
            "search": {"do_sample": stated.get("do_sample") is True,
                       "temperature": _within(stated.get("temperature"), 1.0),
                       "top_k": int(_within(stated.get("top_k"), 50)),
                       "top_p": _within(stated.get("top_p"), 1.0, most=1.0),
                       "max_length": arch.max_positions,
                       "past_present_share_buffer": style == "gqa"}}


def _within(value: Any, usual: float, most: float = math.inf) -> float:
    """A setting above 0 and up to `most`; the usual one where it is no such number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and 0 < value <= most and value < math.inf else usual


def carry(source: Path, out: Path) -> None:
    """Give an ONNX folder what describes it, from the one whose weights it quantises."""
    for name in ("config.json", GENAI, CODE_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    write_companions(source, out)


def onnx_folders(export: Path | None) -> dict[str, Path]:
    """The ONNX folders that an export stage wrote, by the prefix of their figures: `onnx`,
    `onnx.int4`…"""
    if export is None:
        return {}
    return {folder.name.replace("-", ".", 1): folder for folder in sorted(export.glob("onnx*"))
            if (folder / "model.onnx").is_file()}
