"""Texts and token windows: what is read, that the splits stay apart, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from bipdeploy import api
from bipdeploy.data import pydocs, text, windows
from bipdeploy.errors import InputError
from bipdeploy.running import artifacts
from tests.running import SMOKE, bipdeploy, message, python
from tests.tiny import PICO

ROWS = ["The first document.", "A second one, with a\nline break.", "Ünïcödé: 你好."]


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path, monkeypatch):
    """What `datasets` prepares from local files goes to the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def grams(paragraph: str, words: int = 13) -> set[tuple[str, ...]]:
    parts = paragraph.lower().split()
    return {tuple(parts[i:i + words]) for i in range(len(parts) - words + 1)}


# builtin:pydocs

@pytest.mark.parametrize("split", pydocs.SPLITS)
def test_every_split_of_the_built_in_text_holds_enough_to_use(split):
    # The quickstart draws 256 windows of 128 tokens, of some four bytes each.
    assert len(text.read("builtin:pydocs", split).joined()) > 4 * 256 * 128


def test_the_splits_share_no_document_and_no_thirteen_words_in_a_paragraph():
    owner: dict[tuple[str, ...], str] = {}
    for split in pydocs.SPLITS:
        for document in pydocs.documents(split):
            for paragraph in document.split("\n\n"):
                for gram in grams(paragraph):
                    assert owner.setdefault(gram, split) == split, " ".join(gram)
    assert set(owner.values()) == set(pydocs.SPLITS)


@pytest.mark.parametrize(("first", "second"), [("calibration", "test"), ("validation", "test"),
                                               ("calibration", "validation")])
def test_the_splits_hardly_overlap_across_paragraphs_either(first, second):
    texts = [text.read("builtin:pydocs", split) for split in (first, second)]
    assert windows.overlap([texts[0]], texts[1]) < 0.001


def test_reading_the_built_in_text_is_deterministic_and_imports_no_module_that_it_documents():
    code = ("import sys; before = set(sys.modules)\n"
            "from bipdeploy.data import pydocs, text\n"
            "read = [text.read('builtin:pydocs', split) for split in pydocs.SPLITS]\n"
            "named = {d.split()[1] for t in read for d in t.documents if d[:7] == 'module '}\n"
            "rare = {'mailbox', 'turtle', 'xml.sax.handler', 'imaplib'}\n"
            "assert rare <= named, named\n"
            "print(sorted(rare & (set(sys.modules) - before)), *[t.sha256 for t in read])")
    imported, *hashes = python(code, env={"PYTHONHASHSEED": "7"}).stdout.split()
    assert imported == "[]"
    assert hashes == [text.read("builtin:pydocs", split).sha256 for split in pydocs.SPLITS]


def test_a_document_s_split_depends_on_its_name_alone():
    assert {pydocs.split_of(f"module{n}") for n in range(40)} == set(pydocs.SPLITS)
    assert pydocs.split_of("mailbox") == pydocs.split_of("mailbox")


def test_docstrings_are_taken_from_source_without_running_it():
    source = ('"""A module that would stop the tests if it ran, so it had better not run."""\n'
              "raise SystemExit\n"
              "class A:\n"
              '    """A class with a docstring that is long enough to be kept."""\n'
              "    def f(self, x=1, *, y): \n"
              '        """A method with a docstring that is long enough to be kept."""\n')
    found = pydocs.docstrings(source, "m")
    assert [line for line in found.splitlines() if line.startswith(("module", "class", "A.f"))] == [
        "module m", "class A", "A.f(self, x=1, *, y)"]


def test_prose_leaves_out_doctests_and_tables():
    kept = pydocs.prose("Some words here.\n\n>>> f(1)\n2\n\n1 2 3\n4 5 6\n\n  More words.")
    assert kept == ["Some words here.", "  More words."]


def test_a_long_paragraph_is_kept_once_in_the_first_document_that_holds_it():
    long = "x" * 60
    assert dict(pydocs.distinct([("a", f"{long}\n\nshort"), ("b", f"short\n\n{long}"),
                                 ("c", long)])) == {"a": f"{long}\n\nshort", "b": "short"}


@pytest.mark.parametrize("data", ["builtin:pydocs", "wikitext2"])
def test_an_unknown_split_is_refused_with_those_there_are(data):
    with pytest.raises(InputError, match="did you mean 'validation'"):
        text.read(data, "validaton")


def test_an_unknown_built_in_text_is_refused():
    with pytest.raises(InputError, match="did you mean 'builtin:pydocs'"):
        text.read("builtin:pydoc", "test")


# Local files

@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_local_files_are_read(tmp_path, suffix):
    path = write(tmp_path / f"t.{suffix}", ROWS)
    read = text.read(str(path), "test")
    assert read.documents == (("\n\n".join(ROWS),) if suffix == "txt" else tuple(ROWS))
    assert read.joined() == "\n\n".join(ROWS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_another_column_is_read_by_name(tmp_path, suffix):
    path = write(tmp_path / f"t.{suffix}", ROWS, column="body")
    assert text.read(str(path), "test", "body").documents == tuple(ROWS)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_missing_column_is_named_with_the_one_that_was_meant(tmp_path, suffix):
    path = write(tmp_path / f"t.{suffix}", ROWS, column="texts")
    with pytest.raises(InputError, match=r"has no column 'text' \(did you mean 'texts'\?\)"):
        text.read(str(path), "test")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_text_of_blanks_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"t.{suffix}", ["", "  \n "])
    with pytest.raises(InputError, match="holds no text"):
        text.read(str(path), "test")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_an_empty_file_is_refused_and_named(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"t.{suffix}.* is empty"):
        text.read(str(path), "test")


def test_a_file_of_blank_lines_is_refused_and_named(tmp_path):
    (tmp_path / "t.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"t\.jsonl"):
        text.read(str(tmp_path / "t.jsonl"), "test")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_bytes(b'{"text": \x00 no\n' * 3)
    with pytest.raises(InputError, match=f"is not readable as {suffix}") as caught:
        text.read(str(path), "test")
    assert "\n" not in str(caught.value)


def test_a_text_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "t.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(InputError, match="not readable UTF-8 text"):
        text.read(str(tmp_path / "t.txt"), "test")


def test_rows_without_a_value_are_passed_over(tmp_path):
    path = write(tmp_path / "t.jsonl", ["one", None, "two"])
    assert text.read(str(path), "test").documents == ("one", "two")


@pytest.mark.parametrize(("data", "fault"), [
    ("nowhere.txt", "there is no file"), ("wikitext", "did you mean 'wikitext2'"),
    ("t.csv", "neither a .txt"), ("builtin:pydoc", "no built-in text")])
def test_a_name_that_is_no_text_is_found_out_before_reading(data, fault):
    assert fault in (text.check(data) or "")


def test_a_fingerprint_follows_a_file_s_content(tmp_path):
    path = write(tmp_path / "t.txt", ["one"])
    before = text.fingerprint(str(path), "test")
    assert text.fingerprint(str(path), "test") == before
    write(path, ["two"])
    assert text.fingerprint(str(path), "test") != before


def test_a_text_s_hash_tells_where_documents_end():
    one, two = (text.Text("t", "test", d) for d in (("ab", "c"), ("a", "bc")))
    assert one.sha256 != two.sha256


# Hub sets

@pytest.mark.slow
def test_a_hub_set_without_the_hub_fails_in_one_line_that_names_the_local_text(tmp_path):
    done = bipdeploy("run", SMOKE, "--runs", tmp_path / "runs", "--set",
                     "calibration.data=wikitext2",
                     env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")})
    assert done.returncode == 2
    (line,) = message(done)
    assert line.startswith("error: calibration.data: wikitext2 (Salesforce/wikitext) "
                           "could not be had")
    assert "use builtin:pydocs" in line


def test_a_hub_set_is_read_by_its_own_names_and_keeps_its_blank_rows(tmp_path, monkeypatch):
    rows = [{"sentence": row} for row in ("", "one", "", "two", "three")]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "holdout.jsonl", [row["sentence"] for row in rows], "sentence")
    for name, limit in (("ptb", None), ("c4", 4)):  # a folder stands in for the set on the hub
        monkeypatch.setitem(text.HUB_SETS, name, text.HubSet(
            str(tmp_path / "set"), None, "sentence", {"test": "validation"}, "holdout.jsonl",
            rows=limit))
    assert text.read("ptb", "test").joined() == "\n\none\n\n\n\ntwo\n\nthree"
    assert text.read("c4", "test").documents == ("", "one", "", "two")


# Windows

def test_windows_are_distinct_in_order_and_cut_from_the_text_without_overlap():
    ids = torch.arange(1000)
    drawn = windows.draw(ids, samples=20, tokens=32, seed=1)
    assert drawn.shape == (20, 32)
    assert (drawn[:, 0] % 32 == 0).all()
    assert (drawn[:, 1:] - drawn[:, :-1] == 1).all()
    assert (drawn[1:, 0] > drawn[:-1, 0]).all()


def test_the_seed_chooses_the_windows():
    ids = torch.arange(10_000)
    one, same, other = (windows.draw(ids, 20, 32, seed) for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_all_windows_of_a_text_may_be_drawn_and_one_more_is_refused():
    ids = torch.arange(3 * 32 + 31)
    assert windows.draw(ids, 3, 32, 0)[:, 0].tolist() == [0, 32, 64]
    with pytest.raises(InputError, match=r"^calibration.samples: the text has 127 tokens, which is "
                       "3 windows of 32, and 4 are asked for"):
        windows.draw(ids, 4, 32, 0)


def test_a_text_becomes_one_sequence_of_tokens_that_reads_back():
    source = text.Text("t", "test", ("def f(x):\n    return x", "Ünïcödé: 你好."))
    ids = windows.token_ids(source, PICO)
    assert windows.tokenizer(PICO).decode(ids, skip_special_tokens=True) == source.joined()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text((PICO / "config.json").read_text())
    with pytest.raises(InputError, match="no tokenizer that can be loaded"):
        windows.tokenizer(tmp_path)


# Overlap

def test_the_overlap_is_the_share_of_the_test_text_that_calibration_holds():
    draw = random.Random(0)
    shared, own = ([f"w{draw.randrange(10**6)}" for _ in range(100)] for _ in range(2))
    calibration = text.Text("a", "test", (" ".join(shared),))
    test = text.Text("b", "test", (" ".join(shared + own),))
    assert windows.overlap([calibration], calibration) == 1
    assert windows.overlap([calibration], test) == (100 - 12) / (200 - 12)
    assert windows.overlap([calibration], text.Text("c", "test", (" ".join(own),))) == 0


@pytest.mark.parametrize("same", ["split", "file"])
def test_calibrating_on_the_test_text_is_noted_in_the_manifest(tmp_path, smoke, same):
    settings = ["evaluate.perplexity.max_tokens=256"]
    if same == "split":
        settings.append("calibration.split=test")
    else:
        words = " ".join(f"word{n}" for n in range(200))
        settings += [f"{section}.data={write(tmp_path / f'{section}.txt', [words])}"
                     for section in ("calibration", "evaluate.perplexity")]
    out = api.evaluate("builtin:pico", smoke.folder / "export" / "transformers", tmp_path / "out",
                       settings)
    (note,) = artifacts.read_manifest(out)["notes"]
    assert note.startswith("100.0% of the test text also stands in the text of calibration")


def test_separate_texts_give_no_note(smoke):
    assert artifacts.read_manifest(smoke.folder / "evaluate")["notes"] == []


def write(path: Path, rows: list, column: str = "text") -> Path:
    """Rows as a file of the suffix's kind."""
    if path.suffix == ".txt":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path
