"""The recipe's section `compare`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, field_validator

from bipdeploy.recipe.base import Section, Share
from bipdeploy.recipe.methods import Method, method, method_fault
from bipdeploy.recipe.names import (
    COUNTING,
    CRITERIA,
    Criteria,
    Repairs,
    Spreads,
    known,
    repair_fault,
)


class CompareSection(Section):
    """What `bipdeploy compare` measures: every method at every ratio with every repair and seed."""

    criteria: Criteria = Field(
        [], description="Criteria, each with every one of `layers`: names in the criteria table; "
        "LLM-BIP as `llm_bip` (with the recipe's propagation), `llm_bip:bound` or "
        "`llm_bip:measured`. Default: all that go with each, where `methods` names none either.")
    layers: Spreads = Field(
        ["uniform"], min_length=1, description="Values of prune.layers, and `depth:blocks`, "
        "`depth:attention` or `depth:ffn`: such parts are dropped first, as many as weigh less "
        "than the ratio and half of them at most, and uniform widths make up the rest.")
    methods: Annotated[list[str], known(method_fault)] = Field(
        [], description="Single methods besides, written `CRITERION@LAYERS` such as "
        "`llm_bip:measured@searched`; without @, uniform.")
    ratios: list[Share] = Field([0.2, 0.3, 0.5], min_length=1, description="Ratios.")
    repairs: Repairs = Field(
        ["none", "bias", "refit"], description="What is done to the sliced model: `none`, `bias`, "
        "`refit` (with the recipe's ridge), `refit_auto` (ridge auto), `reselect` (refit with "
        "the groups chosen again), `lora` (as the section `tune` has it, on the sliced model), "
        "`refit+lora` or `reselect+lora` (on the refitted one); `distil`, `refit+distil` or "
        "`reselect+distil`: the same with tune.method full. What is not trained by the recipe's "
        "own tune.method has the default learning rate and share of KL.")
    also: Annotated[dict[str, list[str]], known(repair_fault)] = Field(
        {}, description="Further repairs of single methods: method → repairs.")
    seeds: list[NonNegativeInt] = Field(
        [0, 1, 2], min_length=1, description="Each draws its own calibration windows and random "
        "scores.")
    data: list[str] = Field(
        [], description="Further texts, beside those of evaluate.perplexity, whose perplexity is "
        "recorded.")

    @field_validator("also")
    @classmethod
    def _known_methods(cls, also: dict[str, list[str]]) -> dict[str, list[str]]:
        faults = [message for name in also if (message := method_fault(name))]
        if faults:
            raise ValueError("\n".join(faults))
        return also

    def repairs_of(self, propagation: str) -> dict[Method, list[str]]:
        """The repairs of every method, LLM-BIP without a propagation getting `propagation`."""
        criteria = self.criteria or ([] if self.methods else CRITERIA)
        product = [method(c, spread) for c in criteria for spread in self.layers
                   if self.criteria or spread == "uniform" or c not in COUNTING]
        listed = [(m, self.repairs) for m in [*product, *map(method, self.methods)]]
        found: dict[Method, list[str]] = {}
        for own, repairs in [*listed, *((method(m), r) for m, r in self.also.items())]:
            if own.criterion == "llm_bip":
                own = Method(own.criterion, own.propagation or propagation, own.layers)
            known = found.setdefault(own, [])
            known += [r for r in dict.fromkeys(repairs) if r not in known]
        return found
