"""The shape of the package: imports go one way, files stay short, heavy libraries load late."""

from __future__ import annotations

import ast
from pathlib import Path

import bipdeploy
from tests.running import python

PACKAGE = Path(bipdeploy.__file__).parent
MODULES = {".".join(("bipdeploy", *path.relative_to(PACKAGE).with_suffix("").parts))
           .removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))}

# From the bottom up; a module imports from its own layer or from those below. A name ending in a
# dot stands for every module of that package.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "criteria"),  # `criteria` itself is a table of names and imports nothing
    ("recipe", "recipe_base", "recipe_bench", "recipe_lora", "recipe_sweep", "recipe_target",
     "comparison", "recipe_file", "gpus", "artifacts", "figures", "console", "stages.job", "tasks"),
    ("data", "data.", "families", "tensor_file", "checkpoint", "sources", "calibration",
     "activations", "blocks", "modeling", "modeling."),
    ("criteria.", "divisibility", "depth", "allocation", "cost", "latency", "targets", "footprint",
     "search", "slicing", "refit", "elimination", "reselection", "exporters", "exporters.", "ort",
     "ort.", "evaluation", "evaluation.", "measuring", "measuring.", "tuning", "tuning.",
     "serving", "serving.", "templates"),
    ("stages", "stages.", "summary"),
    ("preflight", "pipeline", "plan", "generation"),
    ("comparing", "comparing."),
    ("sweeping", "sweeping."),
    ("api", "screens", "options", "cli", ""),
]

HEAVY = {"torch", "transformers", "datasets", "safetensors", "tokenizers", "numpy", "matplotlib",
         "onnx", "onnx_ir", "onnxruntime", "lm_eval", "accelerate", "peft", "ray"}
LIGHT = ("cli", "console", "errors", "recipe", "recipe_base", "recipe_lora", "recipe_file",
         "pipeline", "plan", "artifacts", "sources", "figures", "summary", "screens", "families",
         "divisibility", "depth", "allocation", "calibration", "tensor_file", "checkpoint",
         "criteria", "api", "data", "data.pydocs", "data.text", "data.windows",
         "data.pydocs_choice", "tasks", "stages.job", "stages.gate", "modeling.formats", "serving",
         "serving.engine", "serving.server", "serving.command", "serving.probe", "templates",
         "exporters", "exporters.portability", "ort", "ort.installed", "ort.folder", "generation",
         "comparison", "comparing", "comparing.cells", "comparing.command", "comparing.records",
         "comparing.results", "comparing.plot", "recipe_bench", "recipe_target", "gpus", "cost",
         "latency", "targets", "footprint", "measuring.cpu_peak", "preflight", "recipe_sweep",
         "options", "sweeping", "sweeping.command", "sweeping.trials", "sweeping.running",
         "sweeping.sharing", "sweeping.results", "sweeping.plot")


def layer(module: str) -> int:
    """The number of a module's layer; a module's own name goes before its package's."""
    name = module.removeprefix("bipdeploy").removeprefix(".")
    package = name.rpartition(".")[0] + "."
    for wanted in (name, package):
        for number, members in enumerate(LAYERS):
            if wanted in members:
                return number
    raise AssertionError(f"{module} stands in no layer of tests/test_architecture.py; add it")


def imported(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, but for type checking; `everywhere`: in functions too."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES else str(node.module))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return names


def own(path: Path) -> set[str]:
    return {name for name in imported(path) if name in MODULES}


def test_imports_go_from_the_command_line_down_to_the_errors_never_up():
    upwards = [f"{module} imports {name}" for module, path in MODULES.items()
               for name in sorted(own(path)) if layer(name) > layer(module)]
    assert upwards == []


def test_no_module_imports_itself_through_others():
    graph = {module: own(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail, module))
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert done == set(MODULES)


def test_the_table_of_layers_names_only_what_exists():
    names = {name for members in LAYERS for name in members}
    known = {module.removeprefix("bipdeploy").removeprefix(".") for module in MODULES}
    known |= {f"{name.rpartition('.')[0]}." for name in known if "." in name}
    assert names - known == set()


def test_no_file_is_longer_than_400_lines():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines())
               for path in MODULES.values()}
    assert {name: count for name, count in lengths.items() if count > 400} == {}


def test_heavy_libraries_are_not_imported_at_the_top_of_light_modules():
    early = {name: imported(MODULES[f"bipdeploy.{name}"], everywhere=False) for name in LIGHT}
    assert {name: found for name, modules in early.items()
            if (found := {m.partition(".")[0] for m in modules} & HEAVY)} == {}


def test_importing_the_light_modules_loads_no_heavy_library():
    code = ("import importlib, sys\n"
            "for name in sys.argv[2:]: importlib.import_module(f'bipdeploy.{name}')\n"
            "print(sorted(set(sys.argv[1].split(',')) & set(sys.modules)))")
    assert python(code, ",".join(sorted(HEAVY)), *LIGHT).stdout.strip() == "[]"


def test_every_module_opens_with_a_sentence_about_it():
    empty = [name for name, path in MODULES.items() if path.read_text().strip()
             and not ast.get_docstring(ast.parse(path.read_text()))]
    assert empty == []
