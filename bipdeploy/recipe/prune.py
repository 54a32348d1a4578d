"""The recipe's section `prune`: how much is removed, and where."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from bipdeploy.recipe.base import Section, Share
from bipdeploy.recipe.names import Layers
from bipdeploy.recipe.target import TargetSection

Leaving = Literal["kv", "query", "both"]
JUDGEMENTS = 10  # times that learned widths are judged on what was held back, after the first


def _with_true(schema: dict[str, Any]) -> None:
    """`true` is read as `kv`."""
    del schema["anyOf"]
    schema["enum"] = [*get_args(Leaving), True, False]


class ProtectSection(Section):
    """Blocks that stay dense."""

    first: int = Field(0, ge=0, description="How many of the first blocks stay dense.")
    last: int = Field(0, ge=0, description="How many of the last blocks stay dense.")


class SearchSection(Section):
    """How stage `curves` measures what each width of each part costs, for `layers: searched`, and
    how `layers: evolved` tries widths of all parts together, on the same windows."""

    propagation: Literal["measured", "sensitivity"] = Field(
        "sensitivity", description="`measured`: every variant runs through all later blocks; "
        "exact, its time grows with the square of the number of blocks, and all variants are in "
        "memory at once. `sensitivity`: the same estimated from one walk back through the dense "
        "model; time grows with the number of blocks.")
    windows: PositiveInt = Field(
        32, description="Calibration windows that the change of the output is measured on, the "
        "last of those drawn; at most half of them. The refits that are tried see the others.")
    points: int = Field(9, ge=2, description="Widths of each part that are measured; the others "
                        "lie on lines between them. Those that `evolved` has.")
    rounds: PositiveInt = Field(
        1, description="In how many equal steps the budget is met. After each but the last the "
        "model is sliced and repaired as far as that, and what is left is scored and measured "
        "anew: what parts cost does not add up. Each round takes another scoring, search and "
        "repair. `evolved` takes one.")
    generations: PositiveInt = Field(
        200, description="How often `evolved` makes offspring of the best widths yet.")
    offspring: PositiveInt = Field(
        16, description="How many a generation has. All are judged on an eighth of the windows, "
        "the best quarter on half of them, the best eighth on all.")


class LearnedSection(Section):
    """How `layers: learned` trains what chooses the groups. The model's weights stay frozen."""

    tokens: int | None = Field(None, ge=8, description="Tokens in a window of the calibration "
                               "text. Default: `calibration.tokens`.")
    steps: PositiveInt = Field(100, description="Optimiser steps. The more, the more of the "
                              "criterion's order is overruled.")
    batch: PositiveInt = Field(64, description="Windows in one optimiser step.")
    accumulation: PositiveInt = Field(
        8, description="Parts that a step's windows are split into, one after another, to save "
        "memory. Changes the result by rounding only.")
    learning_rate: PositiveFloat = Field(
        0.02, description="AdamW's at the start; it falls to 0 along a cosine.")
    standing: float = Field(
        3.0, ge=0.0, description="How far apart the criterion puts the group that is to leave "
        "first and the one that is to leave last, in what training moves by `learning_rate` in a "
        "step. The less, the sooner training overrules the criterion.")
    held_back: PositiveInt = Field(
        32, description="Windows that are not trained on, drawn by `seed`: what is learned is "
        "taken from where these diverge least from the dense model.")

    @model_validator(mode="after")
    def _whole_parts(self) -> LearnedSection:
        if self.batch % self.accumulation:
            raise ValueError(f"batch {self.batch} does not divide by accumulation "
                             f"{self.accumulation}; change one of them")
        return self


class DepthSection(Section):
    """Parts that leave as a whole, those with the least influence on the residual stream first."""

    blocks: int = Field(0, ge=0, description="How many whole blocks are dropped.")
    attention: int = Field(0, ge=0, description="How many more attentions are dropped.")
    ffn: int = Field(0, ge=0, description="How many more FFNs are dropped.")

    @property
    def any(self) -> bool:
        return bool(self.blocks or self.attention or self.ffn)


class PruneSection(Section):
    """How much is removed, and where."""

    ratio: Share | None = Field(
        None, description="Share of the parameters of all blocks that is removed (protected blocks "
        "count in the total, embeddings do not). Either this or `target`.")
    target: TargetSection | None = Field(
        None, description="Another budget instead: FLOPs, bytes, or measured speed.")
    layers: Layers = Field(
        "uniform", description="`uniform`: every unprotected block gets the same widths, and "
        "without protected blocks the result is a stock checkpoint. `global`: heads of all blocks "
        "compete, channels too, and widths differ by block. `adaptive`: heads also compete with "
        "channels, in one ranking (FLAP's). `searched`: widths by block, split between heads and "
        "FFN so that the model's output changes least. `evolved`: the same by trying widths of all "
        "parts together, generation by generation (DarwinLM's, without training). `learned`: which "
        "groups stay is trained towards the dense model's predictions, its weights frozen; meant "
        "for a GPU.")
    global_weights: Literal["none", "sensitivity"] = Field(
        "none", description="What scores of different blocks are weighed by under `layers: "
        "global`. `none`: they are compared as they are, or standardised where the criterion asks "
        "for it. `sensitivity`: by what an error of their block does to the model's output, from "
        "the curves of `search`.")
    search: SearchSection = Field(default_factory=SearchSection)
    learned: LearnedSection = Field(default_factory=LearnedSection)
    depth: DepthSection = Field(
        default_factory=DepthSection, description="What is dropped before widths meet the rest of "
        "the ratio. Protected blocks are spared. With heads and ffn both false, depth alone has "
        "to meet the ratio to within one dropped part.")
    protect: ProtectSection = Field(default_factory=ProtectSection)
    round_to: PositiveInt = Field(
        128, description="FFN widths are multiples of this. 128 suits tensor cores at 7B; 8 suits "
        "tiny models.")
    heads: Leaving | Literal[False] = Field(
        "kv", description="Which attention heads leave. `kv` (or `true`): KV heads with all their "
        "query heads. `query`: query heads, as many from every KV head of a block; the KV cache "
        "stays as large. `both`: either, in finer steps. `false`: none. Query heads need `layers` "
        "uniform, searched, evolved or learned.", json_schema_extra=_with_true)
    ffn: bool = Field(True, description="Prune FFN channels.")

    @field_validator("heads", mode="before")
    @classmethod
    def _heads(cls, value: object) -> object:
        """`true` as what it means; one line for a wrong value, not one for each type."""
        if value is True:
            return "kv"
        if value is not False and value not in get_args(Leaving):
            raise ValueError(f"{value!r} is none of {', '.join(get_args(Leaving))}, true and false")
        return value

    @property
    def query_heads(self) -> bool:
        """Whether query heads may leave and their KV head stay."""
        return self.heads in ("query", "both")

    @property
    def needs_curves(self) -> bool:
        """Whether widths are chosen by what each costs the model's output."""
        return self.layers == "searched" or (
            self.layers == "global" and self.global_weights == "sensitivity")

    @property
    def tries_widths(self) -> bool:
        """Whether widths are refitted and judged on calibration text before they are chosen."""
        return self.needs_curves or self.layers == "evolved"

    @property
    def rounds(self) -> int:
        """In how many steps the budget is met."""
        return self.search.rounds if self.layers == "searched" else 1

    @property
    def wanted(self) -> str:
        """What is asked for, in words."""
        return str(self.target or TargetSection(parameters=self.ratio))

    @property
    def share(self) -> float | None:
        """The share of block parameters to remove, where that is what is asked for."""
        return self.target.parameters if self.target and self.ratio is None else self.ratio

    @model_validator(mode="after")
    def _one_budget(self) -> PruneSection:
        if (self.ratio is None) == (self.target is None):
            raise ValueError("give ratio or target" if self.ratio is None else
                             "ratio and target are both given; keep one (--set prune.ratio=null "
                             "takes the other away)")
        if self.target and not (self.heads or self.ffn):
            raise ValueError("target is met by widths, and heads and ffn are both false; give "
                             "ratio, or set one of them to true")
        return self

    @model_validator(mode="after")
    def _one_search(self) -> PruneSection:
        if self.layers in ("searched", "evolved", "learned") and self.depth.any:
            raise ValueError(f"layers: {self.layers} chooses widths for all parts, and depth drops "
                             "some of them; set depth to 0, or layers to uniform, global or "
                             "adaptive")
        if self.layers == "evolved" and self.search.rounds > 1:
            raise ValueError("layers: evolved meets the budget at once, and search.rounds is "
                             f"{self.search.rounds}; set it to 1, or layers to searched")
        return self

    @model_validator(mode="after")
    def _query_heads(self) -> PruneSection:
        if self.query_heads and self.layers in ("global", "adaptive"):
            raise ValueError(f"layers: {self.layers} ranks whole KV heads, and heads is "
                             f"{self.heads}; set heads to kv, or layers to uniform, searched, "
                             "evolved or learned")
        return self

    @model_validator(mode="after")
    def _something(self) -> PruneSection:
        if not (self.heads or self.ffn or self.depth.any):
            raise ValueError("heads and ffn are both false and depth drops nothing, so nothing "
                             "can be pruned; set one to true")
        return self
