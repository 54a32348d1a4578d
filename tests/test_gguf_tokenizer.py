"""Tokenizers of GGUF files: the tokens are those of the model, or the file is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bipdeploy.model import gguf as source
from bipdeploy.model import gguf_tokenizer
from tests.gguf_files import CONTROL, NORMAL, refused, write
from tests.tiny import PICO, tiny_model

SENTENCES = ("def f(x):\n    return x ** 2",
             "  Two  spaces, 2024 and\n\n\ta tab. It's naïve: 你好 😀",
             "<|endoftext|>Once upon a time", "")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("gguf") / "llama", blocks=1)


def test_text_becomes_the_same_tokens_and_the_template_is_kept(tmp_path, llama):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    path = write(llama, tmp_path / "model.gguf", tokenizer__chat_template=template)
    found = AutoTokenizer.from_pretrained(source.converted(path))
    expected = AutoTokenizer.from_pretrained(PICO)
    for text in SENTENCES:
        assert found(text)["input_ids"] == expected(text)["input_ids"], text
        assert found.decode(found(text)["input_ids"]) == text
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<user>Hi")
    assert found.eos_token_id == 0
    with_bos = write(llama, tmp_path / "bos.gguf", tokenizer__ggml__add_bos_token=True)
    ids = AutoTokenizer.from_pretrained(source.converted(with_bos))("Hi")["input_ids"]
    assert ids == [0, *expected("Hi")["input_ids"]]


@pytest.mark.parametrize("pre", gguf_tokenizer.CUTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_saved_tokenizer_is_loaded_as_it_was_built_or_refused(tmp_path, pre, family):
    """transformers takes no more than the vocabulary of a Qwen2's tokenizer."""
    dense = tiny_model(tmp_path / "dense", family, blocks=1)
    path = write(dense, tmp_path / "model.gguf", tokenizer__ggml__pre=pre,
                 tokenizer__ggml__add_bos_token=None)
    if family == "qwen2" and "qwen" not in pre:
        return refused(path, "transformers", "cuts text")
    built = gguf_tokenizer.build(source.GgufFile(path).metadata, path, 256)
    loaded = AutoTokenizer.from_pretrained(source.converted(path))
    for text in (*SENTENCES, "e\u0301 12345 don't DON'T a\u00a0b", "  7\n\n\n 8"):
        assert loaded(text)["input_ids"] == built(text)["input_ids"], text
    assert (loaded("a")["input_ids"][0] == 0) is gguf_tokenizer.CUTS[pre].bos
    assert loaded.decode(loaded("  7\n\n 8", add_special_tokens=False)["input_ids"]) == (
        "  7\n\n 8")


def test_sentencepiece_gives_the_tokens_that_sentencepiece_gives(tmp_path, llama):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(Path(source.__file__).parent.joinpath(name).read_text()
                                for name in ("gguf_file.py", "checkpoint.py", "families.py")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=900,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    count = model.get_piece_size()
    types = [2, CONTROL, CONTROL, *(6 if model.is_byte(i) else NORMAL for i in range(3, count))]
    path = write(llama, tmp_path / "model.gguf", tokenizer__ggml__model="llama",
                 tokenizer__ggml__pre="default", tokenizer__ggml__merges=None,
                 tokenizer__ggml__tokens=[model.id_to_piece(i) for i in range(count)],
                 tokenizer__ggml__scores=[float(model.get_score(i)) for i in range(count)],
                 tokenizer__ggml__token_type=types, tokenizer__ggml__bos_token_id=1,
                 tokenizer__ggml__eos_token_id=2, tokenizer__ggml__add_bos_token=None)
    found = AutoTokenizer.from_pretrained(source.converted(path))
    for text in ("def family_of(config):", "  Two  spaces, 2024 and\n\ta tab", "naïve 你好 😀",
                 corpus.read_text()[:4000]):
        assert found(text)["input_ids"] == [1, *model.encode(text)], text
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text
    assert found("</s>", add_special_tokens=False)["input_ids"] == [2]


def test_a_tokenizer_that_is_not_known_is_refused(tmp_path, llama):
    path = tmp_path / "model.gguf"
    refused(write(llama, path, tokenizer__ggml__pre="gpt-22"), "'gpt-22'", "gpt-2")
    refused(write(llama, path, tokenizer__ggml__pre=None), "None")
    refused(write(llama, path, tokenizer__ggml__model="t5"), "'t5'")
    refused(write(llama, path, tokenizer__ggml__model="llama"), "score")
    refused(write(llama, path, tokenizer__ggml__merges=["a nothing-of-the-kind"]), "merges")
    refused(write(llama, path, tokenizer__ggml__eos_token_id=5000), "eos_token_id 5000")
    refused(write(llama, path, tokenizer__ggml__tokens=["a", "b", "a"]), "'a' twice")
