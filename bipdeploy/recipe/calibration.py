"""The recipe's section `calibration`: the text that scores and repairs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Field, PositiveInt, Tag, field_validator, model_validator

from bipdeploy.recipe.base import DATA, FIELD, SPLIT, Section

# How far from 1 the sum of rounded shares may be: thirds are written 0.333.
_ROUNDING = 0.005


class SourceSection(Section):
    """One of several texts that calibrate together."""

    source: str = Field(description=DATA)
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Share of the windows that are drawn from it, at least one.")
    split: str | None = Field(None, description=SPLIT)
    field: str = Field("text", description=FIELD)


def _kind(data: object) -> str | None:
    """Which of the types of `data` is meant; the tags are in no message (`file.py`)."""
    return "[one]" if isinstance(data, str) else "[several]" if isinstance(data, list) else None


Data = Annotated[
    Annotated[str, Tag("[one]")]
    | Annotated[list[SourceSection], Field(min_length=1), Tag("[several]")],
    Discriminator(_kind, custom_error_type="text_or_sources", custom_error_message=(
        "Give one text, or a list of sources, each with a share"))]


class CalibrationSection(Section):
    """The text that scores and repairs the model. Never the text it is tested on."""

    data: Data = Field(
        "builtin:pydocs", description=DATA + " Or a list of sources, such as `[{source: c4, share: "
        "0.7}, {source: code.jsonl, share: 0.3, field: content}]`, whose shares make 1.")
    split: str | None = Field(None, description=SPLIT)
    field: str = Field("text", description=FIELD)
    samples: PositiveInt | None = Field(
        None, description="Windows drawn at random, without overlap. Default: as many as "
        "`tokens_per_channel` asks for.")
    tokens_per_channel: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="Tokens, of all windows together, for each input of the widest "
        "projection that is refitted: of an FFN channel in most models. Default: 12; give it or "
        "`samples`, not both.")
    tokens: int = Field(128, ge=8, description="Tokens in a window.")
    batch: PositiveInt = Field(16, description="Windows that go through a block at once.")
    spill: bool = Field(
        False, description="Keep the windows' hidden states in files below the stage's folder "
        "instead of in memory. Results are the same, bit for bit. 128 windows of 128 tokens of a "
        "7B model take 0.27 GB in float32, several times over during repair and search.")

    @field_validator("data")
    @classmethod
    def _shares_of_one(cls, data: str | list[SourceSection]) -> str | list[SourceSection]:
        if isinstance(data, str):
            return data
        whole = sum(own.share for own in data)
        if abs(whole - 1) > _ROUNDING:
            raise ValueError(f"the shares of the sources make {whole:g}, and not 1; change them")
        texts = [(own.source, own.split or "calibration", own.field) for own in data]
        for text in texts:
            if texts.count(text) > 1:
                raise ValueError(f"{text[0]!r} is given twice; give it once, with both shares")
        return data

    @model_validator(mode="after")
    def _sources_have_their_own(self) -> CalibrationSection:
        if isinstance(self.data, str):
            return self
        for name, default in (("split", None), ("field", "text")):
            if getattr(self, name) != default:
                raise ValueError(f"{name}: {getattr(self, name)!r} is of one text, and data is a "
                                 f"list; give {name} in each source that needs it")
        if self.samples is not None and self.samples < len(self.data):
            raise ValueError(f"samples: {self.samples} windows cannot come from {len(self.data)} "
                             "sources; raise samples, or take sources out")
        return self

    @model_validator(mode="after")
    def _one_amount(self) -> CalibrationSection:
        if self.samples is not None and self.tokens_per_channel is not None:
            raise ValueError(f"samples ({self.samples}) and tokens_per_channel "
                             f"({self.tokens_per_channel:g}) both say how much text there is; "
                             "leave one out, or set it to null")
        return self

    @property
    def windows(self) -> int:
        """Windows drawn. Of a recipe that was resolved (`planning/resolved.py`): before that, the
        number may depend on the model."""
        assert self.samples is not None
        return self.samples

    @property
    def sources(self) -> dict[str, SourceSection]:
        """All texts by the recipe's field that names each; a single one has a share of 1."""
        if isinstance(self.data, str):
            return {"calibration.data": SourceSection(source=self.data, share=1, split=self.split,
                                                      field=self.field)}
        return {f"calibration.data.{n}.source": own for n, own in enumerate(self.data)}
