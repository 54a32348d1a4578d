"""Stage `gate`: the recipe's bounds against the figures. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from xml.etree import ElementTree

from bipdeploy.planning.job import Job
from bipdeploy.recipe.gates import Bounds
from bipdeploy.running import artifacts

GATES = "gates.json"


@dataclass(frozen=True)
class Verdict:
    """One gate: `value` is None where the figure was not measured, which fails."""

    figure: str
    value: float | None
    bound: str
    passed: bool
    why: str


def judge(gates: Mapping[str, Bounds], figures: Mapping[str, float]) -> list[Verdict]:
    """A verdict per gate, in the recipe's order."""
    return [_judge(name, bounds, figures.get(name)) for name, bounds in gates.items()]


def _judge(name: str, bounds: Bounds, value: float | None) -> Verdict:
    limits = [f"{word} {limit:g}" for word, limit in (("at least", bounds.min),
                                                      ("at most", bounds.max))
              if limit is not None]
    bound = " and ".join(limits)
    if value is None or math.isnan(value):
        return Verdict(name, None, bound, False, "was not measured")
    for limit, word, sign in ((bounds.max, "above", 1), (bounds.min, "below", -1)):
        if limit is not None and sign * (value - limit) > 0:
            by = abs(value - limit)
            share = f" ({by / abs(limit):.1%})" if limit else ""
            return Verdict(name, value, bound, False,
                           f"is {value:.4g}, {by:.4g} {word} the bound of {limit:g}{share}")
    return Verdict(name, value, bound, True, f"is {value:.4g}, {bound}")


def run(job: Job) -> None:
    """Write `gates.json` and `junit.xml`. A failed gate is a result, not a failure to run."""
    job.reporter.total(max(1, len(job.recipe.gates)), "gates")
    verdicts = judge(job.recipe.gates, artifacts.figures(list(job.inputs.values())))
    made = {name: artifacts.read_manifest(folder) for name, folder in job.inputs.items()}
    job.write(GATES, {"passed": all(v.passed for v in verdicts),
                      "gates": [asdict(v) for v in verdicts],
                      "keys": {name: found["key"] for name, found in made.items() if found}})
    (job.out / "junit.xml").write_bytes(junit(job.recipe.name, verdicts))


def junit(suite: str, verdicts: list[Verdict]) -> bytes:
    """The verdicts as JUnit XML, one test case per gate."""
    root = ElementTree.Element("testsuite", name=f"bipdeploy.{suite}", tests=str(len(verdicts)),
                               failures=str(sum(not v.passed for v in verdicts)))
    for verdict in verdicts:
        case = ElementTree.SubElement(root, "testcase", classname=f"bipdeploy.{suite}",
                                      name=f"{verdict.figure} {verdict.bound}")
        if not verdict.passed:
            ElementTree.SubElement(case, "failure", message=f"{verdict.figure} {verdict.why}")
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
