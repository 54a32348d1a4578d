"""The command line. Heavy imports stay inside the commands, so that `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bipdeploy.cli import single
from bipdeploy.cli.options import Criteria, Layers, Out, Ratios, Repairs, Set
from bipdeploy.errors import STAGE_FAILED, BipdeployError, GateError, StageError

app = typer.Typer(name="bipdeploy", no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Prune a causal language model, repair it, and prove that it is accurate "
                  "and faster.\n\nExit codes: 0 passed, 1 a stage failed, 2 bad input, "
                  "3 a gate failed.")

@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
        settings: Set = None,
        runs: Annotated[Path, typer.Option(help="Where run folders go.")] = Path("runs"),
        force: Annotated[bool, typer.Option("--force", help="Rerun every stage.")] = False,
        start: Annotated[str | None, typer.Option("--from", help="Rerun from this stage.")] = None,
        until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON on stdout.")] = False,
        ) -> None:
    """Run a recipe from the dense model to the report; unchanged stages are reused."""
    from bipdeploy import api
    from bipdeploy.cli import console, screens

    result = api.run(recipe, settings or [], runs, force=force, start=start, until=until,
                     reporting=console.bar)
    if as_json:
        print(json.dumps({"folder": str(result.folder), "ran": result.ran,
                          "reused": result.reused, "figures": result.figures,
                          "failed_gates": result.failed_gates}))
    else:
        screens.show_run(result)
    if result.failed_gates:
        raise GateError("\n".join(f"gate {g['figure']} {g['why']}" for g in result.failed_gates))


@app.command()
def check(recipes: Annotated[list[Path], typer.Argument(help="Recipes, YAML files.")],
          settings: Set = None) -> None:
    """Check recipes without loading anything; every fault is reported at once."""
    from rich.markup import escape

    from bipdeploy.cli import console
    from bipdeploy.errors import InputError, RecipeError
    from bipdeploy.pipeline import preflight
    from bipdeploy.recipe import file as recipe_file
    from bipdeploy.sweeping import trials

    faulty = []
    for path in recipes:
        try:
            recipe = recipe_file.load(path, settings or [])
            resolved = preflight.check_offline(recipe)
            trials.check_offline(recipe)
            console.out.print("[green]ok[/] ", escape(str(path)))
            if resolved and recipe.calibration.samples is None:
                console.out.print(f"    calibration: {resolved.text}", markup=False)
            if resolved and resolved.text_note:
                console.note(f"{path}: {resolved.text_note}")
        except InputError as error:
            named = isinstance(error, RecipeError) or str(path) in str(error)
            faulty.append(str(error) if named else f"{path}: {error}")
    if faulty:
        raise InputError("\n".join(faulty))


@app.command()
def compare(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
            out: Out,
            criteria: Criteria = None,
            layers: Layers = None,
            methods: Annotated[str | None, typer.Option(
                help="Single methods, such as flap@adaptive.")] = None,
            ratios: Ratios = None,
            repairs: Repairs = None,
            seeds: Annotated[str | None, typer.Option(help="Such as 0,1,2.")] = None,
            settings: Set = None,
            as_json: Annotated[bool, typer.Option(
                "--json", help="Summary as JSON on stdout.")] = False) -> None:
    """Compare criteria, layers, ratios and repairs on one model; what OUT holds is reused."""
    import shlex

    from bipdeploy import api
    from bipdeploy.cli import console, options, screens

    given = {"criteria": criteria, "layers": layers, "methods": methods, "ratios": ratios,
             "repairs": repairs, "seeds": seeds}
    with console.bar("compare") as bar:
        compared = api.compare(
            recipe, out, [*options.compare_settings(given), *(settings or [])], bar,
            command=shlex.join(["bipdeploy", *sys.argv[1:]]), said=console.log)
    if as_json:
        print(json.dumps({"folder": str(compared.folder), "measured": compared.measured,
                          "reused": compared.reused, **{name: compared.data[name] for name in (
                              "dense", "summary", "not_run")}}))
    else:
        screens.show_compared(compared)
    if compared.data["not_run"]:
        raise StageError("\n".join(f"not run: {c['cell']}: {c['why']}"
                                   for c in compared.data["not_run"]))


@app.command()
def sweep(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
          out: Out,
          ratios: Ratios = None,
          criteria: Criteria = None,
          layers: Layers = None,
          repairs: Repairs = None,
          vary: Annotated[list[str] | None, typer.Option(
              help="Any other field: section.field=value,value. Repeatable.")] = None,
          samples: Annotated[int | None, typer.Option(
              help="Combinations drawn at random; default: all of them.")] = None,
          max_perplexity_ratio: Annotated[float | None, typer.Option(
              help="Stop trials whose perplexity ratio is above this.")] = None,
          address: Annotated[str | None, typer.Option(
              help="A Ray cluster, HOST:PORT or auto; default: this machine.")] = None,
          concurrent: Annotated[int | None, typer.Option(help="Trials at once.")] = None,
          cpus: Annotated[int | None, typer.Option(help="Cores of each trial.")] = None,
          gpus: Annotated[float | None, typer.Option(help="GPUs of each trial.")] = None,
          settings: Set = None,
          verbose: Annotated[bool, typer.Option("--verbose", help="Show Ray's log.")] = False,
          as_json: Annotated[bool, typer.Option("--json", help="Trials as JSON.")] = False,
          ) -> None:
    """Run many settings of one recipe on Ray Tune, weigh quality against speed; OUT is reused."""
    import shlex

    from bipdeploy import api
    from bipdeploy.cli import console, options, screens

    given = options.sweep_settings(
        {"ratios": ratios, "criteria": criteria, "layers": layers, "repairs": repairs}, vary,
        {"samples": samples, "max_perplexity_ratio": max_perplexity_ratio,
         "engine.address": address, "engine.concurrent": concurrent, "engine.cpus": cpus,
         "engine.gpus": gpus})
    with console.bar("sweep") as bar:
        swept = api.sweep(recipe, out, [*given, *(settings or [])], bar,
                          command=shlex.join(["bipdeploy", *sys.argv[1:]]), said=console.log,
                          verbose=verbose)
    if as_json:
        print(json.dumps({"folder": str(swept.folder), "ran": swept.ran, "reused": swept.reused,
                          "trials": swept.data["trials"]}))
    else:
        screens.show_swept(swept)
    failed = [t for t in swept.data["trials"] if t["state"] == "failed"]
    if failed:
        raise StageError("\n".join(f"trial {t['label']}: {t['why']}" for t in failed))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context,
          path: Annotated[str, typer.Argument(
              help="A run such as runs/quickstart, an exported folder, or a model.")],
          host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
          port: Annotated[int, typer.Option(
              help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
          verbose: Annotated[bool, typer.Option(
              "--verbose", help="Show vLLM's log from the start.")] = False) -> None:
    """Serve a model with vLLM's OpenAI-compatible server; further options go to `vllm serve`."""
    from bipdeploy.cli import serving as command

    command.serve(path, host, port, context.args, verbose)


@app.command()
def generate(path: Annotated[str, typer.Argument(
                 help="A run such as runs/quickstart, an exported folder, or a model.")],
             prompt: Annotated[str, typer.Argument(help="The text to continue.")],
             new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
             temperature: Annotated[float, typer.Option(
                 min=0, help="0 takes the likeliest token each time.")] = 0.0,
             top_p: Annotated[float, typer.Option(
                 min=0, max=1, help="Draw from the likeliest tokens of this mass.")] = 1.0,
             seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
             engine: Annotated[str | None, typer.Option(
                 help="transformers, onnx or vllm; by default what the folder is for.")] = None,
             device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
             compare: Annotated[bool, typer.Option(
                 "--compare", help="Dense and pruned side by side; takes a run.")] = False,
             trust_remote_code: Annotated[bool, typer.Option(
                 "--trust-remote-code", help="Run the Python code that its tokenizer is of."
                 )] = False) -> None:
    """Continue a prompt with any model that bipdeploy wrote, streamed."""
    from bipdeploy.cli import screens
    from bipdeploy.serving import generation

    sampling = generation.Sampling(new_tokens, temperature, top_p, seed)
    if compare:
        dense, pruned = generation.pair(path)
        screens.show_side_by_side({
            "dense": generation.generate(dense, prompt, sampling, None, device,
                                         trust_remote_code=trust_remote_code),
            "pruned": generation.generate(pruned, prompt, sampling, engine, device,
                                          trust_remote_code=trust_remote_code)})
    else:
        screens.show_stream(generation.generate(generation.artefact(path), prompt, sampling,
                                                engine, device,
                                                trust_remote_code=trust_remote_code))


@app.command()
def plan(recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
         settings: Set = None,
         runs: Annotated[Path, typer.Option(help="Where run folders are.")] = Path("runs"),
         gpu: Annotated[str | None, typer.Option(
             help="Estimate times on this GPU, such as H100; else hardware.gpu.")] = None,
         as_json: Annotated[bool, typer.Option("--json", help="Plan as JSON on stdout.")] = False,
         ) -> None:
    """Show what a recipe will make and cost, and what its widths divide by; no weights are read."""
    from dataclasses import asdict

    from bipdeploy import api
    from bipdeploy.cli import screens
    from bipdeploy.errors import InputError
    from bipdeploy.recipe.names import gpu_name

    try:
        named = [f"hardware.gpu={gpu_name(gpu)}"] if gpu else []
    except ValueError as error:
        raise InputError(f"--gpu: {error}") from error
    made = api.plan(recipe, [*(settings or []), *named], runs)
    if as_json:
        print(json.dumps(asdict(made)))
    else:
        screens.show_plan(made)


@app.command()
def profile(source: Annotated[str, typer.Argument(
                metavar="MODEL|RECIPE", help="A recipe, or builtin:pico, a folder or a hub id.")],
            settings: Set = None,
            batch: Annotated[int | None, typer.Option(min=1, help="Sequences at once.")] = None,
            context: Annotated[int | None, typer.Option(
                min=1, help="Tokens of the prompt, which decoding then sees.")] = None,
            cache: Annotated[Path | None, typer.Option(
                help="Where tables are kept; by default below the user's cache folder.")] = None,
            force: Annotated[bool, typer.Option("--force", help="Measure again.")] = False,
            as_json: Annotated[bool, typer.Option("--json", help="The table as JSON.")] = False,
            ) -> None:
    """Time a model's attention and FFN at several widths on this machine; no weights are read."""
    from dataclasses import asdict

    from bipdeploy import api
    from bipdeploy.cli import console, screens

    with console.bar("profile") as bar:
        table = api.profile(source, settings or [], batch=batch, context=context, cache=cache,
                            force=force, reporter=bar)
    if as_json:
        print(json.dumps(asdict(table)))
    else:
        screens.show_profile(table)


@app.command()
def schema() -> None:
    """Print the recipe's JSON Schema, for completion in an editor."""
    from bipdeploy.recipe import file as recipe_file

    print(json.dumps(recipe_file.schema(), indent=2))


for _stage in (single.score, single.curves, single.prune, single.recover, single.tune,
               single.export, single.evaluate, single.bench, single.gate, single.report):
    app.command(rich_help_panel="One stage on plain paths")(_stage)


def _version(wanted: bool) -> None:
    if wanted:
        from bipdeploy.running.machine import version_of

        print(f"bipdeploy {version_of('bipdeploy')}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option(
        "--version", callback=_version, is_eager=True, help="Show the version.")] = False) -> None:
    pass


def main() -> None:
    """Entry point: shows an error as one line and turns it into an exit code."""
    from bipdeploy.cli import console
    from bipdeploy.running import machine

    machine.quiet_libraries()
    try:
        app()
    except BipdeployError as error:
        if os.environ.get("BIPDEPLOY_DEBUG"):
            raise
        console.err.print("error:", str(error), style="red", markup=False)
        sys.exit(error.exit_code)
    except OSError as error:
        if os.environ.get("BIPDEPLOY_DEBUG"):
            raise
        console.err.print("error:", str(error), style="red", markup=False)
        sys.exit(STAGE_FAILED)
