"""The structure of the code, read from its source."""

import ast
import inspect
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "charlstm").glob("**/*.py"))
LAUNCH = sorted((ROOT / "launch").glob("**/*.py"))
MODULES = [path for path in PACKAGE if path.stem != "__init__"]
CONFIGS = sorted((ROOT / "configs").glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))

# The modules of the package from the core outwards. Each imports only what stands before it.
ORDER = """
    errors files system.paths system.tables system.console system.native_output
    config config_check checks keys
    data.gutenberg data.encoding data.vocab data.cleaning data.find data.sources data.passes
    data.corpus data.batches
    lstm.reference lstm.fused lstm.cudnn model optim steps sampling
    parallel.sharding parallel.processes
    runs.plots runs.metrics runs.folder runs.checksums runs.orbax_calls runs.checkpoints
    planning.cost runs.machine
    training.setup training.progress training.validation training.loop
    evaluation.scoring evaluation.dynamic evaluation.baselines evaluation.memorization
    evaluation.report evaluation.sample_check evaluation.measure evaluation.writing
    cli.streams cli.signals cli.notebook cli.runtime cli.folders cli.options cli.usage
    planning.rules planning.timing planning.memory planning.report planning.planner
    sweep.texts sweep.trials sweep.grid sweep.table sweep.search
    bench.cases bench.entropy bench.jax_backend bench.torch_backend bench.keras_backend
    bench.timing bench.command bench.report bench.time_to_quality bench.measure
    bench.scaling bench.scaling_report
""".split()
# The sections of a config that are handed on as **config.SECTION.to_dict().
SPREAD = ("model", "sample")
TOP_LEVEL = set(
    "charlstm configs launch tests BUILD.md pyproject.toml README.md LICENSE .gitignore .ci".split()
)


def each(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def nodes(path: Path, *kinds: type) -> list:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kinds)]


def names_imported(path: Path) -> set[str]:
    """All that a file imports, wherever in it, in dotted form: 'absl', 'absl.flags'."""
    found = {alias.name for node in nodes(path, ast.Import) for alias in node.names}
    for node in nodes(path, ast.ImportFrom):
        assert not node.level, f"{path}: a relative import"
        found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """The name of a module of the package, such as 'data.corpus'."""
    return ".".join(path.relative_to(ROOT / "charlstm").with_suffix("").parts)


def dotted(node: ast.AST) -> str:
    """'config.data.path' for such an expression, with '?' for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_there_is_something_to_keep():
    # Every test below is a loop over these.
    assert len(PACKAGE) > 10
    assert len(LAUNCH) >= 4
    assert len(CONFIGS) >= 3
    assert Path(__file__) in TESTS


# --- who may import whom ---


def test_order_lists_every_module_once():
    assert sorted(ORDER) == sorted(module_of(path) for path in MODULES)


@each(MODULES)
def test_module_imports_only_modules_before_it(path):
    imported = {name.removeprefix("charlstm.") for name in names_imported(path)}
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(module_of(path))])


@each([path for path in PACKAGE + CONFIGS if path.parent.name != "cli"])
def test_flags_are_for_launchers_only(path):
    flags = ("absl.app", "absl.flags", "ml_collections.config_flags")
    assert not {name for name in names_imported(path) if name.startswith(flags)}


@each(PACKAGE + LAUNCH)
def test_nothing_private_of_jax_is_imported_when_a_module_is(path):
    imports = [node for node in tree_of(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.startswith("jax._")}


# --- settings ---


@each(PACKAGE + LAUNCH + CONFIGS)
def test_defaults_are_in_config_py_only(path):
    with_default = []
    for call in nodes(path, ast.Call):
        is_get = isinstance(call.func, ast.Attribute) and call.func.attr == "get"
        is_getattr = dotted(call.func) == "getattr" and len(call.args) == 3
        subject = call.func.value if is_get else call.args[0] if is_getattr else None
        # config, run.config, config.model ...
        if subject is not None and "config" in dotted(subject).split("."):
            with_default.append(ast.unparse(call))
    assert with_default == []


def config_keys() -> list[str]:
    from charlstm.config import base_config, flatten

    return list(flatten(base_config()))


def reads_of_settings() -> set[str]:
    """The ends 'config.seed' and 'data.path' of all that charlstm and launch read."""
    readers = [path for path in PACKAGE if not path.stem.startswith("config")] + LAUNCH
    reads = set()
    for path in readers:
        for node in nodes(path, ast.Attribute):
            if isinstance(node.ctx, ast.Load):
                reads.add(".".join(dotted(node).split(".")[-2:]))
    return reads


def spreads(path: Path) -> list[str]:
    """The expressions X of all f(**X) in a file."""
    return [
        ast.unparse(keyword.value)
        for call in nodes(path, ast.Call)
        for keyword in call.keywords
        if keyword.arg is None
    ]


@pytest.mark.parametrize("key", [key for key in config_keys() if key.split(".")[0] not in SPREAD])
def test_every_setting_is_read_by_somebody(key):
    wanted = key if "." in key else f"config.{key}"
    assert wanted in reads_of_settings()


@pytest.mark.parametrize("section", SPREAD)
def test_the_sections_that_are_spread_whole_have_a_taker_for_every_setting(section):
    from charlstm.model import CharLSTM
    from charlstm.sampling import stream

    taker = {"model": CharLSTM, "sample": stream}[section]
    keys = {key.split(".")[1] for key in config_keys() if key.startswith(f"{section}.")}
    assert keys
    assert keys <= inspect.signature(taker).parameters.keys()
    assert f"config.{section}.to_dict()" in {text for path in PACKAGE for text in spreads(path)}


# --- nothing that a stranger's file could run ---


@each(PACKAGE + LAUNCH + CONFIGS)
def test_nothing_reads_a_file_as_a_program(path):
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    imported = names_imported(path)
    assert not {name for name in imported if name.split(".")[0] in unsafe}
    called = {dotted(call.func) for call in nodes(path, ast.Call)}
    assert not called & {"eval", "exec", "builtins.eval", "builtins.exec"}
    used = {dotted(node) for node in nodes(path, ast.Attribute)} | imported
    assert not used & {"np.load", "numpy.load", "jnp.load", "jax.numpy.load"}
    keywords = {keyword.arg or "" for keyword in nodes(path, ast.keyword)}
    assert not {word for word in keywords | used if "pickle" in word}


# --- sizes and places ---


@each(PACKAGE + LAUNCH)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


# The training loop, which reads best as a whole: its parts would hand on all of its variables.
LONG_FUNCTIONS = {"training.loop.resume": 100}


@each(PACKAGE + LAUNCH)
def test_no_function_is_longer_than_60_lines(path):
    module = module_of(path) if path in PACKAGE else path.stem
    for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef):
        limit = LONG_FUNCTIONS.get(f"{module}.{node.name}", 60)
        assert node.end_lineno - node.lineno < limit, node.name


@each([*PACKAGE, *LAUNCH, *CONFIGS, *TESTS, ROOT / "README.md", ROOT / "pyproject.toml"])
def test_no_file_mentions_a_place_on_one_machine(path):
    places = [f"/{folder}/" for folder in ("work", "tmp")]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if any(place in line for place in places)] == []


def test_the_top_of_the_repository_holds_nothing_unexpected():
    try:
        answer = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git repository, or no git: {error}")
    top = {line.split("/")[0] for line in answer.stdout.splitlines()}
    assert top - TOP_LEVEL == set()
    assert {"charlstm", "configs", "launch", "pyproject.toml"} <= top


# --- the front door ---


def test_the_public_names_are_all_there():
    import charlstm

    assert len(charlstm.__all__) == len(set(charlstm.__all__))
    for name in charlstm.__all__:
        assert getattr(charlstm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = charlstm.nonsense


def test_type_checkers_see_the_same_public_names():
    from charlstm import __all__ as public

    [block] = [node for node in tree_of(ROOT / "charlstm" / "__init__.py").body if is_typing(node)]
    homes = {alias.name: line.module for line in block.body for alias in line.names}
    assert homes.keys() == set(public)
    for name, home in homes.items():
        assert getattr(import_module(home), name) is getattr(import_module("charlstm"), name)


def is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) == "TYPE_CHECKING"


@pytest.mark.parametrize("module", ["charlstm", "charlstm.config"])
def test_a_mistyped_flag_is_answered_before_jax_is_imported(module):
    program = (
        f"import sys, {module}; print(sorted({{'jax', 'jaxlib', 'flax'}} & sys.modules.keys()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n"
