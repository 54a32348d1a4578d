"""Texts as people have them: conversations, other types, other encodings, odd names."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from bipdeploy.data import chat, text, windows
from bipdeploy.data.chat import Message
from bipdeploy.errors import InputError
from tests.chats import CHATML, CONVERSATIONS, LLAMA2, QWEN3, with_template
from tests.running import SMOKE, bipdeploy_here, refused
from tests.tiny import PICO

SHAREGPT = [[{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
              "value": m["content"]} for m in row] for row in CONVERSATIONS]


def write(path: Path, rows: list, column: str = "text") -> Path:
    """Rows of one column as a file of the suffix's kind."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({column: rows}), path)
    else:
        path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path


def message_of(path: Path, field: str = "text", section: str = "calibration") -> str:
    """The one line with which a file is refused."""
    with pytest.raises(InputError) as caught:
        text.read(str(path), "calibration", field, section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Conversations

@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("column", "rows"), [
    ("messages", CONVERSATIONS), ("conversations", SHAREGPT)])
def test_conversations_go_through_the_chat_template(tmp_path, suffix, column, rows):
    model = with_template(tmp_path / "model", CHATML)
    read = text.read(str(write(tmp_path / f"t.{suffix}", rows, column)), "test", column)
    tokens = windows.tokenizer(model)
    expected = [i for row in CONVERSATIONS
                for i in tokens.apply_chat_template(row, return_dict=False)]
    assert windows.token_ids(read, model).tolist() == expected
    assert tokens.decode(expected).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_st")


def test_a_content_in_parts_is_its_text_and_rows_in_which_nothing_is_said_are_passed_over(tmp_path):
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two."}]
    rows = [None, [], [{"role": "user", "content": " "}], [{"role": "user", "content": parts}]]
    read = text.read(str(write(tmp_path / "t.jsonl", rows, "messages")), "test", "messages")
    assert read.conversations == ((Message("user", "One two."),),)
    assert read.documents == ("One two.",)


@pytest.mark.parametrize(("message", "words"), [
    ({"role": "tool", "content": "7"}, "role 'tool', which is none of system, user, assistant"),
    ({"from": "function", "value": "7"}, "role 'function', which is none of human, gpt, system"),
    ({"role": ["user"], "content": "7"}, "role ['user']"),
    ({"role": "user", "content": 7}, "a value of the type int for its content"),
    ({"role": "assistant", "content": None}, "has nothing for its content"),
    ({"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, "has tool_calls"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "type 'image_url'"),
    ({"role": "user", "content": ["a"]}, "a value of the type str among its content's parts"),
    ({"question": "a", "reply": "b"}, "it has question, reply"),
    ("hello", "is a value of the type str"),
    ({"role": "user", "content": "\ud83d"}, "half of a character")])
def test_what_is_no_conversation_is_refused_with_its_row_and_message(tmp_path, message, words):
    good = [{"role": "user", "content": "One."}]
    path = write(tmp_path / "t.jsonl", [good, [*good, message]], "messages")
    said = message_of(path, "messages")
    assert said.startswith(f"calibration.field: {path}: column 'messages' holds ")
    assert "row 2" in said and words in said
    assert "half" in words or "message 2" in said


def test_a_column_of_both_kinds_is_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", ["words", CONVERSATIONS[0]], "messages")
    assert "conversations in some rows and plain text in others (row 2)" in message_of(
        path, "messages")


@pytest.mark.parametrize("column", chat.COLUMNS)
def test_the_usual_column_of_conversations_is_proposed(tmp_path, column):
    path = write(tmp_path / "t.jsonl", CONVERSATIONS, column)
    assert f"set calibration.field: {column}" in message_of(path)
    with pytest.raises(InputError, match=f"set tune.format: text and tune.field: {column}"):
        text.records(str(path), "calibration", ("instruction", "input", "output"), "tune")


def test_conversations_for_a_model_without_a_chat_template_are_refused(tmp_path):
    read = text.read(str(write(tmp_path / "t.jsonl", CONVERSATIONS)), "test")
    said = f"^data: {tmp_path}/t.jsonl holds conversations, and .* no chat template"
    with pytest.raises(InputError, match=said) as caught:
        windows.token_ids(read, PICO)
    assert "\n" not in str(caught.value)


def test_what_a_template_refuses_is_named(tmp_path):
    tokens = windows.tokenizer(with_template(tmp_path / "model", LLAMA2))
    said = r"refuses \(no system message\): .* begins with 'Be brief"
    with pytest.raises(InputError, match=said):
        chat.written(chat.conversation(CONVERSATIONS[0]), tokens)


def test_a_template_with_the_date_gives_the_same_text_on_every_day(tmp_path):
    tokens = windows.tokenizer(with_template(tmp_path / "m", "{{ strftime_now('%d %b %Y') }}"))
    written = chat.written(chat.conversation(CONVERSATIONS[0]), tokens)
    assert written == "26 Jul 2024" != datetime.datetime.now().strftime("%d %b %Y")


@pytest.mark.parametrize(("template", "expected"), [
    (CHATML, ["One.<|im_end|>\n", "<think>x</think>Two. <|im_end|>\n"]),
    (LLAMA2, [" One. </s>", " <think>x</think>Two. </s>"]),
    # An earlier answer is written without thoughts, the last with an empty thought or its own.
    (QWEN3, ["One.<|im_end|>\n", "<think>\nx\n</think>\n\nTwo.<|im_end|>\n"])])
def test_the_answers_of_a_conversation_are_found(tmp_path, template, expected):
    tokens = windows.tokenizer(with_template(tmp_path / "model", template))
    messages = tuple(Message(*m) for m in (
        ("user", "a"), ("assistant", "One."), ("user", "One."), ("assistant",
                                                                 "<think>x</think>Two. ")))
    whole = chat.written(messages, tokens)
    assert [whole[start:end] for start, end in chat.answers(messages, tokens)] == expected
    assert chat.answers(messages[:1], tokens) == []


def test_the_thought_that_a_template_adds_is_part_of_the_answer(tmp_path):
    tokens = windows.tokenizer(with_template(tmp_path / "model", QWEN3))
    messages = (Message("user", "a"), Message("assistant", "One."))
    (start, end), = chat.answers(messages, tokens)
    assert chat.written(messages, tokens)[start:end] == (
        "<think>\n\n</think>\n\nOne.<|im_end|>\n")


def test_a_template_that_begins_with_what_depends_on_the_answers_does_not_tell_where_they_are(
        tmp_path):
    counting = "{{ messages | string | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokens = windows.tokenizer(with_template(tmp_path / "model", counting))
    with pytest.raises(InputError, match=r"set tune\.loss_on: all"):
        chat.answers((Message("user", "a"), Message("assistant", "One.")), tokens)


@pytest.mark.slow
def test_a_model_is_pruned_and_tested_on_conversations(tmp_path):
    model = with_template(tmp_path / "model", CHATML, model=True)
    path = write(tmp_path / "t.jsonl", CONVERSATIONS * 60, "messages")
    settings = [f"model.id={model}", "calibration.samples=16", "evaluate.perplexity.max_tokens=256"]
    for section in ("calibration", "evaluate.perplexity"):
        settings += [f"{section}.data={path}", f"{section}.field=messages"]
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--until", "evaluate",
                          *(part for s in settings for part in ("--set", s)))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "smoke"
    scored = json.loads((folder / "score" / "scores.json").read_text())["calibration"]
    assert scored["tokenised"]["way"] == "all of the text"
    tested = json.loads((folder / "evaluate" / "evaluate.json").read_text())
    assert tested["overlap"] == {"calibration": 1.0}


@pytest.mark.parametrize("section", ["calibration", "evaluate.perplexity"])
def test_conversations_without_a_template_are_refused_before_the_first_stage(tmp_path, section):
    path = write(tmp_path / "t.jsonl", CONVERSATIONS * 60, "messages")
    done = bipdeploy_here("run", SMOKE, "--runs", tmp_path / "runs", "--set",
                          f"{section}.data={path}", "--set", f"{section}.field=messages")
    refused(done, 2, "no chat template")
    assert list((tmp_path / "runs" / "smoke").iterdir()) == []


# Other types

OTHERS = {
    "int": (7, "int"), "float": (0.5, "float"), "bool": (True, "bool"),
    "dict": ({"a": "b"}, "dict"), "words": (["a", "b"], "list of str"),
    "tokens": ([1, 2], "list of int"), "nested": ([["a"]], "list of list")}
PARQUET_ONLY = {"bytes": (b"abc", "bytes"), "date": (datetime.date(2024, 1, 2), "date"),
                "time": (datetime.datetime(2024, 1, 2), "datetime")}


@pytest.mark.parametrize(("suffix", "name"), [
    *((suffix, name) for suffix in ("jsonl", "json", "parquet") for name in OTHERS),
    *(("parquet", name) for name in PARQUET_ONLY)])
def test_values_that_are_no_text_are_refused_with_their_column_and_type(tmp_path, suffix, name):
    value, kind = (OTHERS | PARQUET_ONLY)[name]
    path = write(tmp_path / f"t.{suffix}", [None, value])
    said = message_of(path)
    assert said.startswith(f"calibration.field: {path}: column 'text' holds values of the type "
                           f"{kind} (row 2), which is no text; give a column of text")
    for column in ("instruction", "input", "output"):
        pyarrow.parquet.write_table(pyarrow.table(
            {c: ["a", value if c == column and suffix == "parquet" else "b"] if c != column
             else [None, value] for c in ("instruction", "input", "output")}),
            tmp_path / "rows.parquet")
        with pytest.raises(InputError, match=rf"column '{column}' holds .* {kind} \(row 2\)"):
            text.records(str(tmp_path / "rows.parquet"), "test",
                         ("instruction", "input", "output"), "tune")


@pytest.mark.parametrize("seed", range(60))
def test_a_column_is_read_to_exactly_its_strings_or_refused(tmp_path, seed):
    draw = random.Random(seed)
    strings = ["One.", "2024-01-02T03:04:05", "7", "null", "[1]", "  x ", "a\u2028b\x85c", "😀",
               "\\n", "{'a': 1}", "true", "1e5", "", " \n"]
    wrong = [value for value, _ in OTHERS.values()] + [[{"a": "b"}], "\ud800"]
    rows = draw.choices([*strings, None], k=draw.randrange(1, 9))
    if fault := draw.random() < 0.5:
        rows.insert(draw.randrange(len(rows) + 1), draw.choice(wrong))
    expected = tuple(row for row in rows if row is not None and row.strip()) if not fault else ()
    path = write(tmp_path / draw.choice(["t.jsonl", "t.json"]), rows)
    if expected:
        assert text.read(str(path), "test").documents == expected
        whole = write(tmp_path / "t.parquet", rows)
        assert text.read(str(whole), "test").documents == expected
    else:
        assert re.search(r"holds .*\(row \d+" if fault else "holds no text", message_of(path))


# Encodings

PROSE = "Grüße aus Köln, sagt der Text. Ein „Zitat“ und ein Café.\n" * 20


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize(("encoding", "words"), [
    ("utf-16", ["bytes 0 to 1 are the mark of UTF-16"]),
    ("utf-32", ["bytes 0 to 3 are the mark of UTF-32"]),
    ("utf-16-le", ["byte 1 is zero", "looks like UTF-16LE"]),
    ("utf-16-be", ["byte 0 is zero", "looks like UTF-16BE"]),
    ("cp1252", ["is 0xfc", "looks like cp1252"]),
    ("shift-jis", ["byte", "encoding cannot be told"])])
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, suffix, encoding,
                                                                    words):
    prose = "こんにちは、世界。" * 20 if encoding == "shift-jis" else PROSE
    rows = prose if suffix == "txt" else json.dumps({"text": prose}, ensure_ascii=False) + "\n"
    path = tmp_path / f"my text.{suffix}"
    path.write_bytes(rows.encode(encoding))
    said = message_of(path)
    assert all(word in said for word in (str(path), *words)), said
    command = said.partition("convert it: ")[2].replace("ENCODING", "SHIFT-JIS")
    assert shlex.split(command)[0] == "iconv"
    subprocess.run(["sh", "-c", command], check=True)
    assert text.read(str(tmp_path / f"my text-utf8.{suffix}"), "test").documents == (prose,)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json"])
def test_the_mark_of_utf8_is_no_part_of_the_text(tmp_path, suffix):
    path = tmp_path / f"t.{suffix}"
    path.write_text(PROSE if suffix == "txt" else json.dumps({"text": PROSE}),
                    encoding="utf-8-sig")
    assert text.read(str(path), "test").documents == (PROSE,)


@pytest.mark.parametrize(("content", "words"), [
    (b"words\0words", "byte 5 is zero, so it is no text"), (bytes(64), "byte 0 is zero"),
    (b"\x1f\x8b\x08rest", "a gzip archive"), (b"PK\x03\x04rest", "a zip archive"),
    (b"%PDF-1.7 rest", "a PDF document"), (b"ab\xffcd", "byte 2 is 0xff")])
def test_what_is_binary_is_refused(tmp_path, content, words):
    path = tmp_path / "t.txt"
    path.write_bytes(content)
    assert words in message_of(path)


def test_lines_of_a_text_may_end_as_on_other_systems(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert text.read(str(tmp_path / "t.txt"), "test").documents == ("one\ntwo\nthree\n",)


# Shapes of JSON

@pytest.mark.parametrize(("name", "content"), [
    ("t.json", '{"text": "One."}'), ("t.json", '{\n "text":\n "One."\n}\n'),
    ("t.json", '[{"text": "One."}]'), ("t.jsonl", '[\n{"text": "One."},\n{"other": 1}]'),
    ("t.json", '{"text": "One."}\n{"other": 1}\n'), ("t.jsonl", '\n{"text": "One."}\r\n\n')])
def test_objects_on_lines_in_an_array_and_alone_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert text.read(str(tmp_path / name), "test").documents == ("One.",)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("t.jsonl", '{"text": "a"}\n{"text": "b"\n', "readable as jsonl: line 2: Expecting"),
    ("t.jsonl", '{"text": "a"}\n\n["b"]\n', "line 3 is a list, not an object"),
    ("t.jsonl", '"a"\n', "line 1 is a str, not an object"),
    ("t.json", '[{"text": "a"},\n{"text": }]', "readable as json: line 2: Expecting value"),
    ("t.json", '{\n"text": \n', "readable as json: line 3: Expecting value"),
    ("t.json", '{"text": "a"}\n{"text": \n', "line 2: Expecting value"),
    ("t.json", '[{"text": "a"}, "b"]', "item 2 is a str"),
    ("t.json", "[]", "it has no rows"), ("t.json", '{"data": [{"text": "a"}]}', "known: data"),
    ("t.json", "[" * 100_000, "not readable as json"),
    ("t.json", '[{"text": ' + "9" * 5000 + "}]", "not readable as json"),
    ("t.csv", "text\na\n", "neither a .txt, .jsonl or .parquet file")])
def test_a_file_that_is_no_table_is_refused_with_the_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    assert words in message_of(tmp_path / name)


# Names

ODD = ["[a]", "a*", "a?", "with space", "a#b", "a%20b", "café-你好", "a=1", "{a,b}", "'quoted'"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "TXT"])
@pytest.mark.parametrize("odd", ODD)
def test_exactly_the_file_that_is_named_is_read(tmp_path, odd, suffix):
    for folder in (tmp_path, tmp_path / odd):
        folder.mkdir(exist_ok=True)
        for name in ("a", "ab", "b", odd):  # what the name would match if it were a pattern
            path = folder / f"{name}.{suffix}"
            if suffix.lower() == "txt":
                path.write_text(name)
            else:
                write(path, [name])
        assert text.read(str(folder / f"{odd}.{suffix}"), "test").documents == (odd,)


@pytest.mark.parametrize("name", [f"{odd}.jsonl" for odd in ("[a]", "a*", "?")])
def test_a_name_that_only_matches_others_is_no_file(tmp_path, name):
    write(tmp_path / "a.jsonl", ["One."])
    assert "there is no file" in message_of(tmp_path / name)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert "is a folder; give one file" in message_of(tmp_path / "folder.txt")
    assert "is no regular file" in message_of(tmp_path / "pipe.txt")
    assert "cannot be read: File name too long" in message_of(tmp_path / f"{'a' * 300}.txt")
    assert "there is no file" in message_of(Path("~no-such-user/a.txt"))


def test_a_file_that_may_not_be_read_is_refused():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        path = write(Path(folder) / "t.jsonl", ["One."])
        path.chmod(0)
        root = os.geteuid() == 0
        if root:  # for whom nothing is forbidden
            os.seteuid(65534)
        try:
            said = message_of(path)
        finally:
            if root:
                os.seteuid(0)
    assert said == f"calibration.data: {str(path)!r} cannot be read: Permission denied"
