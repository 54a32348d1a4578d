"""Large texts: the parts that are drawn of them, and the beginning of a test text, to the bit."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from bipdeploy.data import calibration, pydocs, sampling, text, windows
from bipdeploy.errors import InputError
from bipdeploy.recipe.recipe import Recipe
from bipdeploy.stages.tune import read_windows
from tests.chats import CHATML, CONVERSATIONS, with_template
from tests.running import python
from tests.tiny import PICO

# Prints the hash of the windows of a recipe and a model folder.
DRAW = ("import hashlib, sys; from pathlib import Path; from bipdeploy.data import sampling\n"
        "sampling.LARGE, sampling.LEAST = 20_000, 5_000\n"
        "from bipdeploy.data import calibration; from bipdeploy.recipe.recipe import Recipe\n"
        "recipe = Recipe.model_validate_json(sys.argv[1])\n"
        "print(calibration.calibration_batches(recipe, Path(sys.argv[2]), 256)[1]"
        "['windows_sha256'])")


@pytest.fixture
def small(monkeypatch):
    """Texts count as large from 20,000 characters on."""
    monkeypatch.setattr(sampling, "LARGE", 20_000)
    monkeypatch.setattr(sampling, "LEAST", 5_000)
    monkeypatch.setattr(windows, "WHOLE", 20_000)


def recipe_of(data: object, samples: int = 20, **settings: object) -> Recipe:
    return Recipe.model_validate({
        "name": "x", "model": {"id": "builtin:pico"}, "prune": {"ratio": 0.3},
        "calibration": {"data": str(data), "samples": samples, "tokens": 32}, **settings})


def drawn(recipe: Recipe, model: Path = PICO) -> tuple[torch.Tensor, dict]:
    batches, provenance = calibration.calibration_batches(recipe, model, 256)
    return torch.cat(batches), provenance


def numbered(count: int) -> str:
    """A text in which every line tells its place."""
    return "\n".join(f"line {number:06d} says that it is the next." for number in range(count))


# Parts of a text

@pytest.mark.parametrize("split", pydocs.SPLITS)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_text_that_is_not_large_gives_the_windows_of_all_of_it(split, seed):
    recipe = recipe_of("builtin:pydocs", seed=seed)
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(
        update={"split": split})})
    found, provenance = drawn(recipe)
    source = text.read("builtin:pydocs", split)
    ids = torch.tensor(windows.tokenizer(PICO)(source.joined(), verbose=False)["input_ids"])
    count = len(ids) // 32
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:20].sort().values
    assert torch.equal(found, ids[:count * 32].view(count, 32)[chosen])
    assert provenance["windows_sha256"] == hashlib.sha256(found.numpy().tobytes()).hexdigest()
    assert provenance["tokenised"] == {"way": "all of the text", "characters": sum(source.sizes()),
                                       "of": sum(source.sizes())}


def test_texts_as_large_as_the_training_text_of_wikitext2_are_tokenised_whole():
    source = text.Text("t", "test", ("x" * 11_000_000,))
    assert [part is source for part in sampling.parts(source, 1024, 0, 128)] == [True]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_of_a_large_text_parts_are_tokenised_in_its_order_without_overlap(tmp_path, small, suffix):
    lines = numbered(10_000)
    path = tmp_path / f"t.{suffix}"
    path.write_text(lines if suffix == "txt" else "".join(
        json.dumps({"text": part}) + "\n" for part in lines.split("\n")))
    found, provenance = drawn(recipe_of(path))
    assert provenance["tokenised"]["way"] == "parts of the text, drawn by seed"
    assert provenance["tokenised"]["characters"] < 10_000 < provenance["tokenised"]["of"]
    said = "\n".join(windows.tokenizer(PICO).decode(window) for window in found)
    places = [int(place) for place in re.findall(r"line (\d{6}) says", said)]
    assert places == sorted(set(places)) and len(places) > 10
    assert places[-1] - places[0] > 3_000  # not from one place
    assert provenance["text_sha256"] == text.read(str(path), "test").sha256
    assert not torch.equal(found, drawn(recipe_of(path, seed=1))[0])


@pytest.mark.slow
def test_the_same_parts_are_drawn_in_every_process(tmp_path, small):
    path = tmp_path / "t.txt"
    path.write_text(numbered(10_000))
    here = drawn(recipe_of(path))[1]["windows_sha256"]
    there = [python(DRAW, recipe_of(path).model_dump_json(), PICO, env={"PYTHONHASHSEED": seed})
             for seed in "12"]
    assert [done.stdout.strip() for done in there] == [here, here]


def test_parts_grow_until_they_give_the_windows_and_a_text_that_is_too_short_is_refused(
        tmp_path, small, monkeypatch):
    monkeypatch.setattr(sampling, "PER_TOKEN", 1)  # of a tokenizer with fewer characters in a token
    path = tmp_path / "t.txt"
    path.write_text(numbered(2_000))
    assert drawn(recipe_of(path, 200))[0].shape == (200, 32)
    with pytest.raises(InputError, match=r"^calibration\.samples: .* and 2000 are asked for"):
        drawn(recipe_of(path, 2_000))
    sizes = [sum(part.sizes()) for part in sampling.parts(text.read(str(path), "test"), 64, 0, 32)]
    assert sizes == sorted(sizes) and len(sizes) > 1


@pytest.mark.parametrize("document", ["word " * 5_000, "x" * 25_000, "語" * 25_000])
def test_a_long_document_is_cut_at_blanks_where_it_has_any(small, document):
    source = text.Text("t", "test", (document,))
    part = next(sampling.parts(source, 64, 0, 32))
    assert all(piece and piece in document for piece in part.documents)
    assert all(len(piece) <= 2 * 4 * 8 * 32 for piece in part.documents)
    if " " in document:
        assert {word for piece in part.documents for word in piece.split()} == {"word"}


def test_conversations_and_rows_are_drawn_whole(small):
    talk = tuple(((("user", "a" * number),)) for number in range(1, 400))
    source = text.Text("t", "test", tuple(row[0][1] for row in talk), talk)
    part = next(sampling.parts(source, 64, 0, 32))
    assert [row[0][1] for row in part.conversations] == list(part.documents)
    assert set(part.conversations) < set(talk) and len(part.documents) > 5
    rows = text.Records("t", "test", tuple({"output": "a" * n} for n in range(1, 400)))
    assert len(next(sampling.parts(rows, 64, 0)).rows) == len(part.documents)


@pytest.mark.parametrize("form", ["text", "alpaca"])
@pytest.mark.parametrize("packing", [True, False])
def test_training_reads_parts_that_are_enough_for_its_steps(tmp_path, small, form, packing):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": line, "instruction": "Go on.", "input": "",
                                        "output": line}) + "\n"
                            for line in numbered(10_000).split("\n")))
    recipe = recipe_of("builtin:pydocs", tune={
        "enabled": True, "data": str(path), "format": form, "packing": packing, "tokens": 64,
        "steps": 3, "batch": 8, "validation": {"windows": 4}})
    found, provenance = read_windows(recipe, PICO)
    assert 3 * 8 + 4 <= len(found) < 1_000
    assert provenance["tokenised"]["way"] == "parts of the text, drawn by seed"
    assert torch.equal(found.ids, read_windows(recipe, PICO)[0].ids)


def test_a_fingerprint_covers_all_of_a_large_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"a" * 5_000_000)
    before = text.fingerprint(str(path), "test")
    path.write_bytes(b"a" * 4_999_999 + b"b")
    assert text.fingerprint(str(path), "test") != before


# The beginning of a text

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tokenizer_like(kind: str) -> Tokenizer:
    """A small tokenizer that normalises and splits as that of a known model does."""
    quiet = {"show_progress": False}
    if kind == "llama3":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        trainer = trainers.BpeTrainer(
            vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **quiet)
    elif kind == "t5":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>",
                                          special_tokens=["<unk>"], **quiet)
    elif kind == "bert":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=["[UNK]", "[CLS]", "[SEP]"], **quiet)
    else:  # Llama 2's splits nothing; "joining" has tokens over the blank between words, too
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = (pre_tokenizers.Split("▁", "merged_with_next") if kind == "llama2"
                              else pre_tokenizers.Split("\n", "isolated"))
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[
            "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))], **quiet)
    made.train_from_iterator(pydocs.documents("calibration")[:20], trainer)
    if kind in ("llama2", "joining"):
        made.pre_tokenizer = None if kind == "llama2" else pre_tokenizers.Split("@@@@", "isolated")
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "bert":
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return made


@pytest.mark.parametrize(("kind", "whole"), [
    ("pico", False), ("llama3", False), ("llama2", False), ("t5", False), ("bert", False),
    ("joining", True)])
def test_the_first_tokens_are_those_of_the_whole_text_to_the_bit(tmp_path, small, kind, whole):
    folder = PICO
    if kind != "pico":
        folder = tmp_path / kind
        PreTrainedTokenizerFast(tokenizer_object=tokenizer_like(kind)).save_pretrained(folder)
    source = text.Text("t", "test", tuple(pydocs.documents("test")[:40]))
    every = windows.token_ids(source, folder)
    for limit in (2, 100, 1_000, 3_000):
        found = windows.leading(source, folder, limit)
        assert torch.equal(found.ids, every[:limit])
        assert found.whole is whole
        assert found.tokens_per_byte > 0
    for limit in (len(every), 10 * len(every), None):
        found = windows.leading(source, folder, limit)
        assert torch.equal(found.ids, every) and found.whole
        assert found.tokens_per_byte == len(every) / len(source.joined().encode())


def test_a_text_of_one_word_settles_nothing_before_its_end(small):
    source = text.Text("t", "test", ("ab" * 30_000,))
    found = windows.leading(source, PICO, 50)
    assert torch.equal(found.ids, windows.token_ids(source, PICO)[:50]) and found.whole


def test_of_conversations_the_first_are_read(tmp_path, small):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CONVERSATIONS * 400))
    source = text.read(str(path), "test", "messages")
    model = with_template(tmp_path / "model", CHATML)
    every = windows.token_ids(source, model)
    found = windows.leading(source, model, 700)
    assert torch.equal(found.ids, every[:700]) and not found.whole
    assert torch.equal(windows.leading(source, model, None).ids, every)
    bytes_of_all = len(every) / windows.leading(source, model, None).tokens_per_byte
    said = windows.tokenizer(model).decode(every)
    assert round(bytes_of_all) == len(said.encode())
