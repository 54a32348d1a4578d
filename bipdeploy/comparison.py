"""What `bipdeploy compare` compares: methods by name, repairs by name, and the recipe's section.

A method is a criterion and how the budget is spread over the blocks: `flap`, `flap@adaptive`,
`llm_bip:measured@searched`, `llm_bip@depth:attention`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import Field, NonNegativeInt, field_validator

from bipdeploy.criteria import NAMES
from bipdeploy.errors import did_you_mean
from bipdeploy.recipe_base import Section, Share

PROPAGATIONS = ("bound", "measured")
DEPTH = "depth:"
# The values of prune.layers; then parts that are dropped as far as the ratio allows, uniform widths
# making up the rest.
LAYERS = ("uniform", "global", "adaptive", "searched",
          f"{DEPTH}blocks", f"{DEPTH}attention", f"{DEPTH}ffn")
CRITERIA_NAMES = (*NAMES, *(f"llm_bip:{p}" for p in PROPAGATIONS))

# What is done to a sliced model, as values of the recipe's sections `recover` and `lora`.
_LORA = {"lora": {"enabled": True}}
_REFIT = {"method": "refit", "refit": {"reselect": False}}
_RESELECT = {"method": "refit", "refit": {"reselect": True}}
REPAIRS: dict[str, dict[str, Any]] = {
    "none": {"recover": {"method": "none"}},
    "bias": {"recover": {"method": "bias"}},
    "refit": {"recover": _REFIT},
    "refit_auto": {"recover": {**_REFIT, "refit": {"reselect": False, "ridge": "auto"}}},
    "reselect": {"recover": _RESELECT},
    "lora": {"recover": {"method": "none"}, **_LORA},
    "refit+lora": {"recover": _REFIT, **_LORA},
    "reselect+lora": {"recover": _RESELECT, **_LORA},
}


@dataclass(frozen=True)
class Method:
    """A criterion and a spread of the budget. `propagation`: LLM-BIP's; None is the recipe's."""

    criterion: str
    propagation: str | None = None
    layers: str = "uniform"

    @property
    def depth(self) -> str | None:
        """The part that is dropped first."""
        return self.layers.removeprefix(DEPTH) if self.layers.startswith(DEPTH) else None

    @property
    def ranking(self) -> str:
        """The criterion as it is written."""
        return f"{self.criterion}:{self.propagation}" if self.propagation else self.criterion

    def __str__(self) -> str:
        return self.ranking if self.layers == "uniform" else f"{self.ranking}@{self.layers}"


def method(name: str, layers: str = "uniform") -> Method:
    """A method by its name. Raises ValueError where its criterion or its layers are not known."""
    ranking, at, spread = name.partition("@")
    spread = spread if at else layers
    faults = list(filter(None, (criterion_fault(ranking), layers_fault(spread))))
    if faults:
        raise ValueError("\n".join(faults))
    criterion, _, propagation = ranking.partition(":")
    return Method(criterion, propagation or None, spread)


def criterion_fault(name: str) -> str | None:
    """What is wrong with a criterion's name; None where nothing is."""
    return None if name in CRITERIA_NAMES else (
        f"no criterion is called {name!r}{did_you_mean(name, CRITERIA_NAMES)}")


def layers_fault(name: str) -> str | None:
    """As `criterion_fault`, of layers."""
    return None if name in LAYERS else f"no layers are called {name!r}{did_you_mean(name, LAYERS)}"


def _method_fault(name: str) -> str | None:
    try:
        method(name)
    except ValueError as error:
        return str(error)
    return None


def repair_fault(name: str) -> str | None:
    """As `criterion_fault`, of a repair."""
    return None if name in REPAIRS else (
        f"no repair is called {name!r}{did_you_mean(name, REPAIRS)}")


def refuse(names: Iterable[str], fault: Callable[[str], str | None]) -> None:
    """Raise ValueError with a line for each name that has a fault."""
    faults = [message for name in names if (message := fault(name))]
    if faults:
        raise ValueError("\n".join(faults))


class CompareSection(Section):
    """What `bipdeploy compare` measures: every method at every ratio with every repair and seed."""

    criteria: list[str] = Field(
        [], description="Criteria, each with every one of `layers`: names in the criteria table; "
        "LLM-BIP as `llm_bip` (with the recipe's propagation), `llm_bip:bound` or "
        "`llm_bip:measured`. Default: all, where `methods` names none either.")
    layers: list[str] = Field(
        ["uniform"], min_length=1, description="Values of prune.layers, and `depth:blocks`, "
        "`depth:attention` or `depth:ffn`: such parts are dropped first, as many as weigh less "
        "than the ratio and half of them at most, and uniform widths make up the rest.")
    methods: list[str] = Field(
        [], description="Single methods besides, written `CRITERION@LAYERS` such as "
        "`llm_bip:measured@searched`; without @, uniform.")
    ratios: list[Share] = Field([0.2, 0.3, 0.5], min_length=1, description="Ratios.")
    repairs: list[str] = Field(
        ["none", "bias", "refit"], description="What is done to the sliced model: `none`, `bias`, "
        "`refit` (with the recipe's ridge), `refit_auto` (ridge auto), `reselect` (refit with "
        "the groups chosen again), `lora` (as the section `lora` has it, on the sliced model), "
        "`refit+lora` or `reselect+lora` (on the refitted one).")
    also: dict[str, list[str]] = Field(
        {}, description="Further repairs of single methods: method → repairs.")
    seeds: list[NonNegativeInt] = Field(
        [0, 1, 2], min_length=1, description="Each draws its own calibration windows and random "
        "scores.")
    data: list[str] = Field(
        [], description="Further texts, beside evaluate.perplexity.data, whose perplexity is "
        "recorded.")

    @field_validator("criteria")
    @classmethod
    def _known_criteria(cls, names: list[str]) -> list[str]:
        refuse(names, criterion_fault)
        return names

    @field_validator("layers")
    @classmethod
    def _known_layers(cls, names: list[str]) -> list[str]:
        refuse(names, layers_fault)
        return names

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, names: list[str]) -> list[str]:
        refuse(names, _method_fault)
        return names

    @field_validator("repairs")
    @classmethod
    def _known_repairs(cls, names: list[str]) -> list[str]:
        refuse(names, repair_fault)
        return names

    @field_validator("also")
    @classmethod
    def _known_both(cls, also: dict[str, list[str]]) -> dict[str, list[str]]:
        refuse(also, _method_fault)
        refuse([name for names in also.values() for name in names], repair_fault)
        return also

    def repairs_of(self, propagation: str) -> dict[Method, list[str]]:
        """The repairs of every method, LLM-BIP without a propagation getting `propagation`."""
        product = [method(c, spread) for c in self.criteria or ([] if self.methods else NAMES)
                   for spread in self.layers]
        listed = [(m, self.repairs) for m in [*product, *map(method, self.methods)]]
        found: dict[Method, list[str]] = {}
        for own, repairs in [*listed, *((method(m), r) for m, r in self.also.items())]:
            if own.criterion == "llm_bip":
                own = Method(own.criterion, own.propagation or propagation, own.layers)
            known = found.setdefault(own, [])
            known += [r for r in dict.fromkeys(repairs) if r not in known]
        return found
