"""The structure of the code, checked in its source."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from charlstm.config import base_config, flatten
from charlstm.filters import Settings
from charlstm.model import CharLSTM
from charlstm.streaming import stream

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "charlstm").glob("**/*.py"))
LAUNCH = sorted((ROOT / "launch").glob("**/*.py"))
MODULES = [path for path in PACKAGE if path.stem != "__init__"]
CONFIGS = sorted((ROOT / "configs").glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))

# The modules of the package from the core outwards. Each imports only what stands before it.
ORDER = """
    errors files system.paths system.extras system.tables system.console
    config checks config_check keys
    data.gutenberg data.encoding data.vocab data.cleaning data.find data.sources data.passes
    data.corpus data.batches
    lstm.reference lstm.backward lstm.fused lstm.native_library lstm.native lstm.cudnn
    model optim steps
    filters repetition sampling copy_limit streaming
    parallel.sharding parallel.native_output parallel.processes parallel.cluster
    runs.plots runs.metrics runs.folder runs.checksums
    exchange.card exchange.weights exchange.folder exchange.safetensors exchange.plain
    exchange.torch exchange.keras exchange.onnx exchange.stablehlo exchange.reading exchange.formats
    runs.orbax_calls runs.checkpoints
    planning.cost planning.chips runs.machine
    training.transfer training.setup training.progress training.validation training.loop
    evaluation.scoring evaluation.dynamic evaluation.passes evaluation.audit evaluation.baselines
    evaluation.memorization
    evaluation.inside evaluation.features evaluation.probes
    evaluation.report evaluation.sample_check evaluation.measure evaluation.surprise
    evaluation.endings evaluation.writing evaluation.calibration evaluation.units evaluation.score
    evaluation.score_formats evaluation.comparison
    evaluation.coding evaluation.compression
    cli.streams cli.signals cli.notebook cli.runtime cli.folders cli.options cli.usage
    exchange.export
    planning.rules planning.timing planning.memory planning.report planning.hlo planning.compile
    planning.topology planning.planner
    sweep.texts sweep.trials sweep.grid sweep.table sweep.search
    bench.cases bench.entropy bench.jax_backend bench.torch_backend bench.keras_backend
    bench.timing bench.report bench.serving bench.measure
    bench.scaling_picture bench.scaling
    pages.embed exchange.html pages.score pages.sections pages.held_out pages.report
    serving.address serving.requests serving.batch serving.batcher serving.worker
    serving.guard serving.protocol serving.app serving.server
""".split()
# Sections of a config that are passed on as **config.SECTION.to_dict().
SPREAD = {"model": CharLSTM, "sample": stream}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
TOP_LEVEL = set(
    "charlstm configs launch tests BUILD.md pyproject.toml README.md LICENSE .gitignore .ci".split()
)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type) -> list:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def functions(path: Path) -> list:
    return nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)


def names_imported(path: Path) -> set[str]:
    """Return all imports of a file in dotted form: 'absl', 'absl.flags'."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        assert not node.level, f"{path}: a relative import"
        found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """Return the name of a module of the package, such as 'data.corpus'."""
    return ".".join(path.relative_to(ROOT / "charlstm").with_suffix("").parts)


def dotted(node: ast.AST) -> str:
    """Return the text of an expression such as 'config.data.path', with '?' for other parts."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def faults(paths: Iterable[Path], check: Callable[[Path], Iterable]) -> dict[str, list]:
    """Return what `check` finds in each file, without the files in which it finds nothing."""
    found = {str(path.relative_to(ROOT)): list(check(path)) for path in paths}
    return {path: faults for path, faults in found.items() if faults}


def test_there_are_files_to_check():
    assert len(PACKAGE) > 10
    assert len(LAUNCH) >= 4
    assert len(CONFIGS) >= 3
    assert Path(__file__) in TESTS


# --- imports ---


def test_order_lists_every_module_once():
    assert sorted(ORDER) == sorted(module_of(path) for path in MODULES)


def test_modules_import_only_modules_before_them():
    def later_modules(path):
        imported = {name.removeprefix("charlstm.") for name in names_imported(path)}
        return imported & set(ORDER[ORDER.index(module_of(path)) :])

    assert faults(MODULES, later_modules) == {}


def test_only_launchers_use_flags():
    flags = ("absl.app", "absl.flags", "ml_collections.config_flags")
    paths = [path for path in PACKAGE + CONFIGS if path.parent.name != "cli"]
    uses = lambda path: [name for name in names_imported(path) if name.startswith(flags)]  # noqa: E731
    assert faults(paths, uses) == {}


def test_no_module_imports_private_jax_at_the_top():
    def private_imports(path):
        kinds = ast.Import | ast.ImportFrom
        imports = [node for node in tree_of(path).body if isinstance(node, kinds)]
        names = {alias.name for node in imports for alias in node.names}
        names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        return [name for name in names if name.startswith("jax._")]

    assert faults(PACKAGE + LAUNCH, private_imports) == {}


# --- settings ---


def test_defaults_of_settings_are_in_config_py_only():
    def reads_with_default(path):
        for call in nodes(path, ast.Call):
            is_get = isinstance(call.func, ast.Attribute) and call.func.attr == "get"
            is_getattr = dotted(call.func) == "getattr" and len(call.args) == 3
            subject = call.func.value if is_get else call.args[0] if is_getattr else None
            # config, run.config, config.model ...
            if subject is not None and "config" in dotted(subject).split("."):
                yield ast.unparse(call)

    assert faults(PACKAGE + LAUNCH + CONFIGS, reads_with_default) == {}


def test_every_setting_is_read():
    readers = [path for path in PACKAGE if not path.stem.startswith("config")] + LAUNCH
    attributes = [node for path in readers for node in nodes(path, ast.Attribute)]
    reads = [dotted(node) for node in attributes if isinstance(node.ctx, ast.Load)]
    # 'config.seed' and 'data.path'
    ends = {".".join(read.split(".")[-2:]) for read in reads}
    keys = [key for key in flatten(base_config()) if key.split(".")[0] not in SPREAD]
    assert {key if "." in key else f"config.{key}" for key in keys} <= ends


@pytest.mark.parametrize(("section", "function"), SPREAD.items())
def test_a_spread_section_has_only_parameters_of_its_function(section, function):
    keys = {key.split(".")[1] for key in flatten(base_config()) if key.startswith(f"{section}.")}
    assert keys
    assert keys <= inspect.signature(function).parameters.keys() | set(Settings._fields)
    calls = [call for path in PACKAGE for call in nodes(path, ast.Call)]
    spread = [word.value for call in calls for word in call.keywords if word.arg is None]
    assert f"config.{section}.to_dict()" in map(ast.unparse, spread)


# --- loading executes nothing ---


def test_no_module_can_execute_a_file():
    def unsafe_uses(path):
        imported = names_imported(path)
        yield from (name for name in imported if name.split(".")[0] in UNSAFE_MODULES)
        called = {dotted(call.func) for call in nodes(path, ast.Call)}
        yield from called & {"eval", "exec", "builtins.eval", "builtins.exec"}
        used = {dotted(node) for node in nodes(path, ast.Attribute)} | imported
        yield from used & {"np.load", "numpy.load", "jnp.load", "jax.numpy.load"}
        keywords = {keyword.arg or "" for keyword in nodes(path, ast.keyword)}
        yield from (word for word in keywords | used if "pickle" in word)

    assert faults(PACKAGE + LAUNCH + CONFIGS, unsafe_uses) == {}


# --- sizes, names and places ---


def test_no_file_has_more_than_400_lines():
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE + LAUNCH
    }
    assert {path: length for path, length in lengths.items() if length > 400} == {}


# The training loop is easier to follow in one piece.
LONG = {"resume": 100}


def test_no_function_has_more_than_60_lines():
    def long_functions(path):
        lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}
        return [name for name, length in lengths.items() if length > LONG.get(name, 60)]

    assert faults(PACKAGE + LAUNCH, long_functions) == {}


def test_no_test_module_imports_another():
    def imported_tests(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.startswith(("from test_", "import test_"))]

    assert faults(TESTS, imported_tests) == {}


def test_names_of_tests_have_at_most_60_characters():
    def long_names(path):
        names = [function.name for function in functions(path)]
        return [name for name in names if name.startswith("test_") and len(name) > 60]

    assert faults(TESTS, long_names) == {}


def test_no_file_names_a_path_of_one_machine():
    def paths_in(path):
        folders = [f"/{folder}/" for folder in ("work", "tmp")]
        lines = path.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if any(folder in line for folder in folders)]

    files = [*PACKAGE, *LAUNCH, *CONFIGS, *TESTS, ROOT / "README.md", ROOT / "pyproject.toml"]
    assert faults(files, paths_in) == {}


def test_top_of_the_repository_has_only_known_entries():
    try:
        answer = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git repository, or no git: {error}")
    top = {line.split("/")[0] for line in answer.stdout.splitlines()}
    assert top - TOP_LEVEL == set()
    assert {"charlstm", "configs", "launch", "pyproject.toml"} <= top


# --- the public API ---


def test_public_names_can_be_imported():
    import charlstm

    assert len(charlstm.__all__) == len(set(charlstm.__all__))
    for name in charlstm.__all__:
        assert getattr(charlstm, name).__name__ == name
    assert dir(charlstm) == sorted(charlstm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = charlstm.nonsense


def test_type_checkers_see_the_public_names():
    from charlstm import __all__ as public

    [block] = [node for node in tree_of(ROOT / "charlstm" / "__init__.py").body if is_typing(node)]
    homes = {alias.name: line.module for line in block.body for alias in line.names}
    assert homes.keys() == set(public)
    for name, home in homes.items():
        assert getattr(import_module(home), name) is getattr(import_module("charlstm"), name)


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("module", ["charlstm", "charlstm.config"])
def test_package_and_config_do_not_import_jax(module):
    program = (
        f"import sys, {module}; print(sorted({{'jax', 'jaxlib', 'flax'}} & sys.modules.keys()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n"
