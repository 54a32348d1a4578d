"""What the recipe's sections are built on. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of all sections: unknown keys are faults, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True,
                              protected_namespaces=())


# What texts are, wherever a section names one.
DATA = ("`builtin:pydocs` (Python's reference text, on every machine), a .txt, .jsonl or .parquet "
        "file in UTF-8, or one of wikitext2, ptb, c4, alpaca (hub). Of a text that is much larger "
        "than what is asked for, parts are drawn by `seed`.")
SPLIT = ("Split of a built-in or hub text. Default: calibration text takes `calibration` or "
         "`train`, test text `test` or `validation`.")
FIELD = ("The column that holds the text, for jsonl and parquet. One of conversations, lists of "
         "{role, content} or {from, value} messages, goes through the model's chat template.")


class TextSection(Section):
    """A text: built in, a local file, or a data set on the hub."""

    data: str = Field("builtin:pydocs", description=DATA)
    split: str | None = Field(None, description=SPLIT)
    field: str = Field("text", description=FIELD)
