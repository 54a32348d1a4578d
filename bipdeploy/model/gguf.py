"""GGUF files as models: each is written out once as a safetensors checkpoint, in the user's cache.

A GGUF file holds a whole model in llama.cpp's words: sizes, tokenizer and weights, most often
quantised. Tensors are dequantised one after the other, some rows at a time.

Where all matrices have one float type, that is the checkpoint's. A quantised file's is bfloat16:
rounding to it changes far less than the quantisation did (perplexity of SmolLM2-135M-Instruct in
Q4_1 on WikiText-2 at 512 tokens: 25.677 in float32, 25.665 in bfloat16, 25.676 in float16), and
activations of models that were trained in bfloat16 overflow in float16. A mixture of float types
becomes float32.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bipdeploy.errors import InputError
from bipdeploy.model import gguf_tokenizer
from bipdeploy.model.checkpoint import CheckpointWriter, read_config
from bipdeploy.model.gguf_file import GgufFile
from bipdeploy.running import artifacts, cache

SOURCE = "source.json"  # beside the weights: what they were made from
_VERSION = 1  # of what is written; raise it, and what was written before is not used again


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or by how it begins."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError:
        return False


def converted(path: Path) -> Path:
    """The safetensors checkpoint that a GGUF file is written out as, now or before.

    It stands in `$XDG_CACHE_HOME` (or `~/.cache`) under the hash of the file's content, and has
    `source.json` beside its weights. Raises InputError with one line where the file is damaged or
    holds what is not read; StageError where the disk is full.
    """
    place = cache.made("gguf", _key(path), path, lambda place: write(path, place / "model"))
    return place / "model"


def config(path: Path) -> dict[str, Any]:
    """The `config.json` that `converted` writes, from the file's header (seconds, where it was
    not written out yet). Raises as it does."""
    folder = cache.home() / "gguf" / _key(path) / "model"
    return read_config(folder) if (folder / SOURCE).is_file() else GgufFile(path).config


def _key(path: Path) -> str:
    return artifacts.digest([_sha256(path), _VERSION])


def _sha256(path: Path) -> str:
    try:
        stat = path.stat()
        return _hashed(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=16)
def _hashed(path: Path, size: int, changed: int) -> str:
    """The content's hash, once in a process: a run asks for its model's folder many times."""
    return artifacts.sha256(path)


def write(path: Path, folder: Path) -> None:
    """Write a file out as the checkpoint folder `folder`, which is not there yet, holding one
    tensor at a time. Raises as `converted` does, and then leaves what it had written."""
    file = GgufFile(path)
    with TemporaryDirectory() as place:
        beside = Path(place)
        _write_companions(file, beside)
        with CheckpointWriter(folder, file.config, companions_from=beside) as writer:
            for name, _ in file.arch.tensors():
                writer.add({name: file.read(name)})
    artifacts.write_json(folder / SOURCE, {"gguf": {
        "file": file.path.name, "sha256": _sha256(file.path), "file_type": file.file_type,
        "quantized_tensors": file.quantized}})


def _write_companions(file: GgufFile, folder: Path) -> None:
    """Write what stands beside the weights. Before them: a tokenizer may have to be refused."""
    tokenizer = gguf_tokenizer.build(file.metadata, file.path, file.arch.max_positions)
    artifacts.write_json(folder / "config.json", file.config)  # transformers goes by its type
    ends = [file.config["eos_token_id"], file.metadata.get("tokenizer.ggml.eot_token_id")]
    artifacts.write_json(folder / "generation_config.json", {
        "bos_token_id": file.config["bos_token_id"], "pad_token_id": file.config["pad_token_id"],
        "eos_token_id": list(dict.fromkeys(i for i in ends if i is not None)) or None})
    tokenizer.save_pretrained(folder)
    gguf_tokenizer.verify(tokenizer, folder, file.path)
