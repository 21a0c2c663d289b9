"""What importing costs, which way imports run, and how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("efficient_lm", "pallas_kernels")
HEAVY = {"grain", "orbax", "matplotlib", "tensorboardX", "tensorstore", "tokenizers", "rich",
         "transformers", "datasets", "pyarrow", "torch", "IPython"}  # fmt: skip

# A module may import from its own layer and those after it.
LAYERS = (
    ("doors", ("train", "evaluate", "generate", "convert", "plan", "shardings", "sweep",
               "data.train_tokenizer", "data.write_shards")),
    ("application", ("__init__", "api", "cli", "distributed", "watch", "watch_server", "training",
                     "inference", "evaluation", "interop", "planning", "sweeping")),
    ("ingredients", ("objectives", "data", "parallel")),
    ("model", ("model",)),
    ("layers", ("mixers", "ffn")),
    ("foundation", ("compilation", "masks", "config", "fields", "registry", "errors")),
)  # fmt: skip
# What a mixer needs of the model package, which holds the layers and is built of them.
SHARED_WITH_LAYERS = {"context", "linear", "norm", "parameter", "rope"}


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_quick_and_light(package):
    program = f"""
import jax, sys, time
known = set(sys.modules)
start = time.process_time()
import {package}
seconds = time.process_time() - start
heavy = {HEAVY} & {{name.split(".")[0] for name in set(sys.modules) - known}}
assert not heavy, f"imports {{heavy}}"
assert seconds < 1.0, f"takes {{seconds:.2f}} s beyond jax"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def sources(*folders: str):
    """Paths of the Python files below the folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path):
    """(line, dotted module name) of every import in the file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
                is_package = (ROOT / name.replace(".", "/") / "__init__.py").exists()
                yield node.lineno, name if is_module or is_package else node.module


def layer_of(module: str) -> int | None:
    """Rank of a module of efficient_lm; None for the others."""
    parts = module.split(".")
    if parts[0] != "efficient_lm":
        return None
    names = {".".join(parts[1:]), parts[1] if len(parts) > 1 else "__init__"}
    ranks = [rank for rank, (_, members) in enumerate(LAYERS) if names & set(members)]
    assert ranks, f"{module} has no layer; give it one in LAYERS"
    return ranks[0]


def module_of(path: Path) -> str:
    """Dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_one_way():
    wrong = []
    for path in sources("efficient_lm"):
        module = module_of(path)
        mine = layer_of(module)
        for line, name in imported(path):
            theirs = layer_of(name)
            if theirs is None or theirs >= mine:
                continue
            parts = name.split(".")
            shared = parts[1] == "model" and parts[-1] in SHARED_WITH_LAYERS
            if shared and mine == layer_of("efficient_lm.mixers"):
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_named_parts_of_the_model_are_shared_with_layers():
    for name in SHARED_WITH_LAYERS:
        for line, imports in imported(ROOT / f"efficient_lm/model/{name}.py"):
            rank = layer_of(imports)
            allowed = rank is None or rank > layer_of("efficient_lm.mixers")
            allowed = allowed or imports.split(".")[-1] in SHARED_WITH_LAYERS
            assert allowed, f"efficient_lm/model/{name}.py:{line} imports {imports}"


def test_mixers_and_kernels_name_no_mesh_axis_module():
    for path in sources("efficient_lm/mixers", "efficient_lm/ffn", "efficient_lm/model"):
        for line, name in imported(path):
            assert not name.startswith("efficient_lm.parallel"), f"{path}:{line}"


def test_kernels_depend_on_jax_alone():
    allowed = {"jax", "jaxlib", "numpy", "jaxtyping", "pallas_kernels"} | sys.stdlib_module_names
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("pallas_kernels")
        for line, name in imported(path)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_packages_import_no_tests_experiments_or_configs():
    for path in sources(*PACKAGES):
        for line, name in imported(path):
            assert name.split(".")[0] not in ("tests", "experiments", "configs"), f"{path}:{line}"


def test_no_import_is_silently_optional():
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                silent = all(isinstance(statement, ast.Pass) for statement in node.body)
                names = {n.id for n in ast.walk(node.type or node) if isinstance(n, ast.Name)}
                guilty = silent and names & {"ImportError", "ModuleNotFoundError"}
                assert not guilty, f"{path}:{node.lineno} swallows a missing import"


def test_files_stay_under_400_lines():
    long = [
        f"{path.relative_to(ROOT)} has {count} lines"
        for path in sources(*PACKAGES, "configs", "experiments", "tests")
        if (count := len(path.read_text().splitlines())) > 400
    ]
    assert not long, "\n".join(long)


def test_names_of_test_files_are_unique():
    """Without packages in tests/, pytest cannot tell two of one name apart."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
