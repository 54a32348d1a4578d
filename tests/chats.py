"""Conversations, and chat templates as models have them, with the built-in tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.tiny import PICO

CONVERSATIONS = [
    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": "What is a list?"},
     {"role": "assistant", "content": "A sequence that can be changed."}],
    [{"role": "user", "content": "Name a number that is odd."},
     {"role": "assistant", "content": "Seven."},
     {"role": "user", "content": "Another one, please."},
     {"role": "assistant", "content": "Nine, which is three times three."}]]

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'].strip() }}"
          " [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'].strip() }} </s>"
          "{% else %}{{ raise_exception('no system message') }}{% endif %}{% endfor %}")
# As Qwen3 does: thoughts of earlier answers are left out, the last answer has one, empty or not.
QWEN3 = ("{% for m in messages %}{% set parts = m.content.split('</think>') %}"
         "<|im_start|>{{ m.role }}\n"
         "{% if m.role == 'assistant' and loop.last %}<think>\n"
         "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n"
         "{% endif %}{{ parts[-1].strip() }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def with_template(folder: Path, template: str, *, model: bool = False) -> Path:
    """The built-in tokenizer with a chat template; `model`: the built-in model too."""
    folder.mkdir(exist_ok=True)
    for path in PICO.iterdir():
        if model or path.name.startswith("tokenizer") or path.name == "config.json":
            shutil.copyfile(path, folder / path.name)
    (folder / "chat_template.jinja").write_text(template)
    return folder
