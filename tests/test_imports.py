"""Imports go one way: a layer imports from the layers above it in this list, and from itself without a circle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "segnet_scratch"

# From below; modules on one line are one layer. README.md draws this.
LAYERS = [
    {"errors", "recipes", "config"},
    {"files", "run_folder", "progress"},  # atomic writes; the files of a run; bars
    {"runtime"},  # how a kernel gets to run
    {"ops"},  # plan, run, reference and cases of every operation
    {"parallel"},  # what a process knows of others that train with it
    {"nn"},  # autograd, functions, modules
    {"segnet"},  # the networks as lists of blocks
    {"torch_file", "checkpoint", "weights", "convert", "recalibrate", "nan_guard"},
    {"data"},
    {"engine"},  # the same networks in few large kernels
    {"optim"},
    {"step", "inference_step"},  # one training step and one inference step, whichever engine computes it
    {"metrics", "boundary"},
    {"inference", "evaluate", "submit", "predict", "video", "export"},
    {"train", "memory_check"},
    {"display", "run_record", "tensorboard", "report", "serve"},
    {"lab"},  # proofs, workbench, profiler, doctor: what looks at the rest
    {"cli"},
    {"__main__", "__init__"},
]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports: within functions too, and for type checkers alone."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "segnet_scratch":
            module = str(node.module).removeprefix("segnet_scratch").removeprefix(".")
            below = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
            names |= {name if name in MODULES else module or "__init__" for name in below}
        elif isinstance(node, ast.Import):
            names |= {
                a.name.removeprefix("segnet_scratch.") for a in node.names if a.name.startswith("segnet_scratch.")
            }
    return names


GRAPH = {name: imported(path) for name, path in MODULES.items()}


def layer(module: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if module.partition(".")[0] in names)
    return found


def test_a_module_imports_from_its_own_layer_and_those_below():
    edges = [(module, name) for module in GRAPH for name in GRAPH[module] - {"__init__"}]
    assert [edge for edge in edges if layer(edge[1]) > layer(edge[0])] == []


def test_no_module_imports_itself_by_way_of_others():
    def circle(module: str, path: tuple[str, ...], done: set[str]) -> tuple[str, ...]:
        if module in path:
            return (*path[path.index(module) :], module)
        if module in done:
            return ()
        for name in sorted(GRAPH.get(module, ())):
            if found := circle(name, (*path, module), done):
                return found
        done.add(module)
        return ()

    done: set[str] = {"__init__"}  # resolves its names when they are asked for
    assert [circle(module, (), done) for module in sorted(GRAPH)] == [()] * len(GRAPH)


def test_no_framework_and_no_pickle():
    def names(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        return {name.partition(".")[0] for name in imports}

    foreign = {module: names(path) & {"torch", "tensorflow", "jax", "pickle"} for module, path in MODULES.items()}
    assert {module: found for module, found in foreign.items() if found} == {}
