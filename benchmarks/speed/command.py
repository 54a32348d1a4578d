"""The command line of `gpu.py` and `cpu.py`: which cases, for how long, into which file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bipdeploy.errors import BipdeployError, InputError
from bipdeploy.running import machine
from bipdeploy.running.artifacts import read_json
from bipdeploy.running.machine import environment
from speed.cases import GIB, Case, Grid, Sizes, chosen
from speed.results import Results, table

RESULTS = Path(__file__).parents[1] / "results"
PREFIX = {"cuda": "gpu", "cpu": "cpu"}
TINY = (Grid(("tiny",), batches=(1, 2), contexts=(8, 24), removed=(50,)),
        Sizes(round_to=8, windows=4, tokens=16, batch=2, new=4, rounds=3, slow_rounds=2))


def main(description: str, grid: Grid, sizes: Sizes, device: str) -> None:
    """Run the command. Ends with 1 where a case failed, with 2 for a wrong argument."""
    arguments = _parser(description, grid, device).parse_args()
    machine.quiet_libraries()
    try:
        raise SystemExit(_run(arguments, grid, sizes, device))
    except BipdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _parser(description: str, grid: Grid, device: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="result file; where there is one, what it holds "
                        f"is not measured again (default: results/{PREFIX[device]}-HARDWARE.json)")
    parser.add_argument("--shape", action="append", choices=(*grid.shapes, "tiny"), default=[])
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN",
                        help="cases whose names match, such as '7B/decode/b1/*'")
    parser.add_argument("--budget-minutes", type=float, metavar="N",
                        help="start no case that would not be done by then")
    parser.add_argument("--dry-run", action="store_true", help="list cases and their memory")
    parser.add_argument("--table", action="store_true", help="show what the file holds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    parser.add_argument("--rounds", type=int, help="kept of each case, 2 or more")
    parser.add_argument("--eager", action="store_true", help="decode without torch.compile; on a "
                        "CPU it always is")
    parser.add_argument("--work", type=Path, help="folder for checkpoints that engines need")
    return parser


def _run(arguments: argparse.Namespace, grid: Grid, sizes: Sizes, device: str) -> int:
    began = time.monotonic()
    if arguments.rounds is not None:
        if arguments.rounds < 2:
            raise InputError(f"--rounds {arguments.rounds}: give 2 or more")
        sizes = replace(sizes, rounds=arguments.rounds)
    plan = _cases(arguments, grid, sizes)
    if arguments.dry_run:
        print(listing(plan))
        return 0
    if arguments.table and arguments.out:
        print(table(read_json(arguments.out)["records"]))
        return 0
    import torch

    from speed import hardware

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no CUDA GPU here; --dry-run lists the cases")
    place = torch.device(arguments.device)
    eager = arguments.eager or arguments.device == "cpu"
    out = arguments.out or RESULTS / f"{PREFIX[place.type]}-{hardware.name_of(place)}.json"
    if arguments.table:
        print(table(read_json(out)["records"]))
        return 0
    settings = {"eager": eager, **asdict(plan[0][1])}
    results = Results(out, hardware.setup(place, settings), "python " + " ".join(sys.argv))
    deadline = (None if arguments.budget_minutes is None
                else began + 60 * arguments.budget_minutes)
    failed = _measure(plan, results, place, eager, arguments.work, deadline)
    print(table({str(case): results.records[str(case)] for case, _ in plan
                 if str(case) in results.records}))
    print(f"\n{out}", file=sys.stderr)
    return 1 if failed else 0


def _cases(arguments: argparse.Namespace, grid: Grid, sizes: Sizes) -> list[tuple[Case, Sizes]]:
    """The cases that are asked for. The tiny shape has sizes of its own, and is asked for alone."""
    if "tiny" in arguments.shape:
        if len(set(arguments.shape)) > 1:
            raise InputError("--shape tiny: it is measured alone; leave the others out")
        if not (arguments.out or arguments.dry_run):
            raise InputError("--shape tiny: its figures are no result; say where with --out")
        own, tiny = TINY
        grid = replace(own, kinds=grid.kinds)
        sizes = replace(tiny, rounds=arguments.rounds or tiny.rounds)
    elif arguments.shape:
        grid = replace(grid, shapes=[s for s in grid.shapes if s in arguments.shape])
    if arguments.device == "cpu":
        sizes = replace(sizes, dtype="float32")
    return [(case, sizes) for case in chosen(grid.cases, arguments.only)]


def listing(plan: list[tuple[Case, Sizes]]) -> str:
    """Cases with their estimated memory and ideal speed-ups."""
    lines = []
    for case, sizes in plan:
        ideal = ", ".join(f"{name} at most {value:.2f} times as fast"
                          for name, value in case.ideal(sizes).items())
        lines.append(f"{case!s:<28} {case.memory(sizes) / GIB:7.1f} GiB  {ideal}".rstrip())
    return "\n".join([*lines, f"{len(plan)} cases"])


def _measure(plan: list[tuple[Case, Sizes]], results: Results, device: Any, eager: bool,
             work: Path | None, deadline: float | None) -> int:
    """Measure what is not done; how many cases failed."""
    from speed import engines, hardware
    from speed.torch_cases import Torch

    failed, left = 0, []
    torch_cases = Torch(device, plan[0][1], eager=eager)
    # What failed in an earlier run comes last: it may do so again, and take the device with it.
    for case, sizes in sorted(plan, key=lambda pair: results.failed(str(pair[0]))):
        if results.done(str(case)):
            continue
        expected = results.expected_seconds(str(case), case.work(sizes))
        if deadline is not None and time.monotonic() + expected > deadline:
            left.append(expected)
            continue
        outside = {"onnx": engines.onnx, "vllm": engines.vllm}.get(case.kind)
        torch_cases.hold(None if outside else case)
        needed = case.memory(sizes)
        free = hardware.free_memory(device) + torch_cases.kept_bytes(case)
        print(f"{case} …", end=" ", flush=True, file=sys.stderr)
        if needed > free:
            record: dict[str, Any] = {"not_run": f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} "
                                      "are free"}
        else:
            run = ((lambda run=outside, c=case, s=sizes: run(c, s, device, work)) if outside
                   else lambda c=case: torch_cases.measure(c))
            record = _record(run, lambda: hardware.state(device))
        results.add(str(case), {"needs_bytes": needed, "work": case.work(sizes), **record})
        told = record.get("not_run") or record.get("failed") or f"{record['seconds']:.0f} s"
        print(told, file=sys.stderr)
        failed += "failed" in record
        if "failed" in record and not _alive(device):
            print("the device does not answer any more; run the same command again to go on",
                  file=sys.stderr)
            break
    if left:
        print(f"cases left for another run of the same command: {len(left)}, of which each is "
              f"expected to take {min(left) / 60:.1f} to {max(left) / 60:.1f} minutes",
              file=sys.stderr)
    return failed


def _record(run: Callable[[], dict[str, Any]], state: Callable[[], dict[str, Any]]
            ) -> dict[str, Any]:
    """Figures of a case, or why there are none."""
    import torch

    before, began = state(), time.monotonic()
    try:
        found: dict[str, Any] = {"figures": run()}
    except InputError as error:
        return {"not_run": str(error)}
    except torch.OutOfMemoryError as error:
        return {"not_run": f"out of memory: {str(error).splitlines()[0]}"}
    except Exception as error:  # one case's failure leaves the others alone
        lines = str(error).strip().splitlines() or [""]
        found = {"failed": f"{type(error).__name__}: {lines[0]}"[:400]}
    return {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": environment()["git_commit"],
            "seconds": round(time.monotonic() - began, 1),
            "state": {"before": before, "after": state()}, **found}


def _alive(device: Any) -> bool:
    """Whether the device still works: some errors of CUDA end it for the whole process."""
    import torch

    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True
