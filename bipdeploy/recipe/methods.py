"""Methods by name: a criterion, and how the budget is spread over the blocks.

`flap`, `flap@adaptive`, `llm_bip:measured@searched`, `llm_bip@depth:attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

from bipdeploy.recipe.names import DEPTH, criterion_fault, layers_fault


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


def method_fault(name: str) -> str | None:
    """What is wrong with a method's name; None where nothing is."""
    try:
        method(name)
    except ValueError as error:
        return str(error)
    return None
