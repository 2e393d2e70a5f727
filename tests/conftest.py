"""Settings before NumPy, JAX and Keras are imported, and fixtures of several modules."""

import atexit
import gc
import os
import random
import shutil
import signal
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

from charlstm.cli import runtime

# As in the launchers: the result of LAPACK depends on the number of its threads.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["KERAS_BACKEND"] = "jax"
if runtime.has_only_compilers():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# All processes of a session, workers and launchers included, share the caches of compiled programs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="charlstm-tests-")
    os.environ["CHARLSTM_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" not in os.environ:
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# A session in the background ignores these signals; the processes of tests must not inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# Collections take a twentieth of the time of tests. _collect_garbage collects after each module,
# whose last test then reports what was not closed. Launched processes collect as usual.
gc.disable()

# Eight virtual devices in the process of the tests; launched processes are not affected.
jax.config.update("jax_num_cpu_devices", 8)
# Implicit rank promotion hides mistakes in axes.
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example compiles.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=2000)
settings.load_profile("default")

ROOT = Path(__file__).resolve().parent.parent
# Modules that compile with little optimization: they check messages, files and texts, or formulas
# that hold at any optimization level. Modules that check exactness use the flags of users.
CHEAP = {
    f"test_{name}"
    for name in "api audit bench calibration checkpoints comparison compression console copy_limit "
    "cost documents dynamic folder folders fuzz html inside keys launch metrics "
    "mistakes model optim optimizers paths plan progress quality repetition "
    "report_page runtime sampling scaling score scoring sharded_step sharding steps "
    "surprise surroundings sweep switches tour writing".split()
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@contextmanager
def little_optimization():
    """Compile with little optimization within the block."""
    before = _has_little_optimization.get_global()
    _set_little_optimization(True)
    try:
        yield
    finally:
        _set_little_optimization(before)


@contextmanager
def little_optimization_everywhere():
    """Compile with little optimization within the block and in processes that it starts.

    No program may still run when it ends: XLA's threads call getenv, and a change of the
    environment at that moment is a segmentation fault.
    """
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with little_optimization():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# JAX's in-memory caches do not depend on the flag, but on this context.
_has_little_optimization = jax.make_user_context(False)


def _set_little_optimization(value):
    jax.config.update("jax_disable_most_optimizations", value)
    _has_little_optimization.set_global(value)


@pytest.fixture
def cheaply():
    """Compile with little optimization in a test whose exact numbers do not matter."""
    with little_optimization_everywhere():
        yield


@pytest.fixture
def rank_promotion():
    """Allow implicit rank promotion, which Keras needs."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _compile_cheaply(request):
    with little_optimization_everywhere() if request.path.stem in CHEAP else nullcontext():
        yield


@pytest.fixture(scope="module", autouse=True)
def _collect_garbage():
    yield
    gc.collect()
    gc.freeze()  # later collections skip what is left, most of it in the caches of JAX


@pytest.fixture(scope="session")
def native_library():
    """Load native.cc; skip the test where there is no C++ compiler."""
    from charlstm.lstm import native_library

    if not any(map(shutil.which, native_library.COMPILERS)):
        pytest.skip(f"found none of the compilers {native_library.COMPILERS}")
    native_library.load()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path) -> Path:
    """Hide compilers and what has been compiled; return the only folder in PATH, which is empty."""
    from charlstm.lstm import native_library

    monkeypatch.setattr(native_library, "_load", native_library._load.__wrapped__)
    native_library._log_once.cache_clear()
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("CHARLSTM_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="session")
def book() -> str:
    """Return a made-up text of 6,000 characters with words, lines and capitals."""
    chooser = random.Random(0)
    words = "the count came to a castle in night and said not I Lucy saw blood upon her".split()
    lines = (" ".join(chooser.choices(words, k=8)).capitalize() + ".\n" for _ in range(1000))
    return "".join(lines)[:6000]


@pytest.fixture
def book_path(book: str, tmp_path: Path) -> Path:
    """Return a file with the text of `book`."""
    path = tmp_path / "book.txt"
    path.write_text(book, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def browser():
    """Return a headless Chromium; skip the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra test has playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("no chromium in PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        # In a container its sandbox refuses to run for root, and /dev/shm is small.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()
