"""The names that a recipe may contain, in the order in which they are shown.

What they stand for is in tables elsewhere, which a recipe need not see; `tests/test_tables.py`
holds both lists against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator

from bipdeploy.errors import did_you_mean

# `bipdeploy.pruning.criteria.table`
CRITERIA = ("llm_bip", "llm_bip_joint", "osscar", "wanda_sp", "flap", "flap_ifv", "flap_wifn",
            "taylor", "taylor_vector", "magnitude", "random")
COUNTING = ("osscar",)  # those of them that choose for widths known before: with uniform ones alone
Propagation = Literal["bound", "measured"]
PROPAGATIONS: tuple[Propagation, ...] = get_args(Propagation)
# `bipdeploy.stages.prune`
Layers = Literal["uniform", "global", "adaptive", "searched", "evolved", "learned"]
LAYERS: tuple[Layers, ...] = get_args(Layers)
# `bipdeploy.stages.repairs`
Repair = Literal["none", "refit", "bias"]
REPAIRS: tuple[Repair, ...] = get_args(Repair)
# `bipdeploy.planning.targets`
TargetKind = Literal["parameters", "flops", "memory", "decode_speedup", "prefill_speedup"]
TARGETS: tuple[TargetKind, ...] = get_args(TargetKind)
# `bipdeploy.planning.gpus`
GPUS = ("H200", "H100", "A100", "L40S", "RTX 4090")

# What a comparison or a sweep may ask for besides: LLM-BIP with its propagation; parts that are
# dropped as far as the ratio allows, uniform widths making up the rest; and repairs with and
# without training, as values of the recipe's sections `recover` and `tune`.
CRITERIA_COMPARED = (*CRITERIA, *(f"llm_bip:{p}" for p in PROPAGATIONS))
DEPTH = "depth:"
LAYERS_COMPARED = (*LAYERS, f"{DEPTH}blocks", f"{DEPTH}attention", f"{DEPTH}ffn")
_LORA = {"tune": {"enabled": True, "method": "lora"}}
_FULL = {"tune": {"enabled": True, "method": "full"}}
_REFIT = {"method": "refit", "refit": {"reselect": False}}
_RESELECT = {"method": "refit", "refit": {"reselect": True}}
REPAIRS_COMPARED: dict[str, dict[str, Any]] = {
    "none": {"recover": {"method": "none"}},
    "bias": {"recover": {"method": "bias"}},
    "refit": {"recover": _REFIT},
    "refit_auto": {"recover": {**_REFIT, "refit": {"reselect": False, "ridge": "auto"}}},
    "reselect": {"recover": _RESELECT},
    "lora": {"recover": {"method": "none"}, **_LORA},
    "refit+lora": {"recover": _REFIT, **_LORA},
    "reselect+lora": {"recover": _RESELECT, **_LORA},
    "distil": {"recover": {"method": "none"}, **_FULL},
    "refit+distil": {"recover": _REFIT, **_FULL},
    "reselect+distil": {"recover": _RESELECT, **_FULL},
}


def repair_settings(name: str, method: str) -> dict[str, Any]:
    """The sections' values of a repair, in a recipe whose `tune.method` is `method`. A repair that
    trains by another has that one's own learning rate and share of KL: the recipe's are not
    meant for it."""
    settings = REPAIRS_COMPARED[name]
    tune = settings.get("tune")
    if tune is None or tune["method"] == method:
        return settings
    return {**settings, "tune": {**tune, "learning_rate": None, "distillation": {"weight": None}}}


def gpu_name(name: str) -> str:
    """A GPU's name as it is listed, whatever its case; `4090` for `RTX 4090`. Raises ValueError
    that says what is known."""
    wanted = name.upper().replace("-", " ").replace("_", " ").strip()
    for own in GPUS:
        if wanted in (own, own.replace(" ", ""), own.removeprefix("RTX ")):
            return own
    raise ValueError(f"no GPU is called {name!r}{did_you_mean(wanted, GPUS)}")


def criterion_fault(name: str) -> str | None:
    """What is wrong with a criterion's name; None where nothing is."""
    return None if name in CRITERIA_COMPARED else (
        f"no criterion is called {name!r}{did_you_mean(name, CRITERIA_COMPARED)}")


def layers_fault(name: str) -> str | None:
    """As `criterion_fault`, of layers."""
    return None if name in LAYERS_COMPARED else (
        f"no layers are called {name!r}{did_you_mean(name, LAYERS_COMPARED)}")


def repair_fault(name: str) -> str | None:
    """As `criterion_fault`, of a repair."""
    return None if name in REPAIRS_COMPARED else (
        f"no repair is called {name!r}{did_you_mean(name, REPAIRS_COMPARED)}")


def known(fault: Callable[[str], str | None]) -> AfterValidator:
    """A validator of lists of names, and of the lists in a mapping: a line for each that has a
    fault."""

    def check(names: Any) -> Any:
        listed: Iterable[str] = (names if not isinstance(names, Mapping) else
                                 [name for own in names.values() for name in own])
        faults = [message for name in listed if (message := fault(name))]
        if faults:
            raise ValueError("\n".join(faults))
        return names

    return AfterValidator(check)


# The axes that a comparison and a sweep share.
Criteria = Annotated[list[str], known(criterion_fault)]
Spreads = Annotated[list[str], known(layers_fault)]
Repairs = Annotated[list[str], known(repair_fault)]
