import ast
import atexit
import json
import math
import os
import re
import shlex
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from conftest import ROOT
from helpers import small_config, untrained_run
from launching import (
    TINY,
    TRAINING,
    WITHOUT_JAX,
    WarmLauncher,
    command_of,
    run_command,
    train_on,
)

from charlstm.evaluation import report


@pytest.fixture(scope="module")
def trained(tmp_path_factory, book):
    """Return (folder, result) of a run that was trained by command in folder/runs/tiny-book."""
    folder = tmp_path_factory.mktemp("launch")
    return folder, train_on(book, folder, *TINY)


@pytest.fixture(scope="module")
def launch_help():
    """Return launch(launcher, *flags, cwd=...) for processes that need no JAX."""
    warm = WarmLauncher(*WITHOUT_JAX)
    yield warm
    warm.close()


@cache
def warm_launcher():
    launcher = WarmLauncher(*TRAINING, "charlstm.evaluation.sample_check")
    atexit.register(launcher.close)
    return launcher


def sample(folder, *flags):
    result = warm_launcher()("sample", "--workdir=runs/tiny-book", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result


def test_order_of_config_flags_does_not_matter(tmp_path):
    flags = ["--config.num_steps=0", "--config=tutorial", "--config=tiny"]
    answer = warm_launcher()("train", *flags, "--config.data.path=none.txt", cwd=tmp_path)
    assert "none.txt" in answer.stderr


def test_score_takes_files_among_flags_and_writes_out(trained, book):
    folder, _ = trained
    words = ["book.txt", "--workdir=runs/tiny-book", "--by=word", "--rank", "book.txt"]
    shown = warm_launcher()("score", *words, cwd=folder)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert len(shown.stdout.splitlines()) == 2 * (len(book.split()) + 3) + 4
    written = warm_launcher()("score", *words, "--out=score.txt", cwd=folder)
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    assert (folder / "score.txt").read_text() == shown.stdout


def test_training_prints_text_model_and_progress_to_stdout(trained, book):
    _, result = trained
    assert [line for line in result.stderr.splitlines() if not line.startswith("warning: ")] == []
    for expected in (
        "book.txt",
        f"total characters: {len(book):,}",
        f"total vocabulary: {len(set(book))}",
        "model: 1 x 64 LSTM",
        "devices: ",
        "step 60: loss",
        "validation",
        "sample at step 30",
        "best validation",
        shlex.join(command_of("sample", "--workdir=runs/tiny-book")),
    ):
        assert expected in result.stdout


def test_same_command_again_has_nothing_to_do(trained):
    folder, _ = trained
    result = warm_launcher()("train", *TINY, "--config.data.path=book.txt", cwd=folder)
    assert result.returncode == 0
    assert "finished already, at step 60" in result.stdout


def test_sample_has_the_prompt_and_the_length(trained, book):
    text = sample(trained[0], "--prompt=The count", "--length=50").stdout
    assert text.startswith("The count")
    assert len(text) == len("The count") + 50 + 1  # and a newline
    assert set(text) <= set(book)


def test_same_seed_gives_the_same_text_streamed_or_not(trained):
    flags = ("--prompt=night ", "--length=40", "--seed=3")
    text = sample(trained[0], *flags).stdout
    assert sample(trained[0], *flags, "--stream").stdout == text
    assert sample(trained[0], *flags[:2], "--seed=4").stdout != text


def test_default_prompts_do_not_need_the_training_text(trained, book):
    folder, _ = trained
    (folder / "book.txt").rename(folder / "gone.txt")
    try:
        result = sample(folder, "--length=20", "--num_samples=3")
    finally:
        (folder / "gone.txt").rename(folder / "book.txt")
    texts = result.stdout.removesuffix("\n").split("\n\f\n")
    assert [len(text) for text in texts] == [20, 20, 20]
    prompts = re.findall(r"from the training text: (.*)", result.stderr)
    assert len(prompts) == 3
    assert all(ast.literal_eval(prompt) in book for prompt in prompts)


def test_stream_ends_silently_if_its_reader_ends(trained):
    command = [
        sys.executable,
        str(ROOT / "launch/sample.py"),
        "--workdir=runs/tiny-book",
        "--stream",
    ]
    flags = ["--length=1000000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command + flags, cwd=trained[0], **pipes) as process:
        try:
            assert len(process.stdout.read(10)) == 10
            process.stdout.close()
            assert process.wait(timeout=120) == 0
            assert b"Error" not in process.stderr.read()
        finally:
            process.kill()


def test_terminal_gets_control_characters_only_with_raw(tmp_path, book):
    (tmp_path / "book.txt").write_text("\x1b[31m" + book, encoding="utf-8")
    untrained_run(small_config(tmp_path / "book.txt"), tmp_path / "runs" / "tiny-book")
    flags = ["--workdir=runs/tiny-book", "--prompt=\x1b[31mso", "--length=1"]
    for more, wanted in (([], rb"\x1b[31mso"), (["--raw"], b"\x1b[31mso")):
        ours, theirs = os.openpty()
        terminal = {"out": os.ttyname(theirs), "err": os.devnull}
        process = warm_launcher().start("sample", *flags, *more, cwd=tmp_path, **terminal)
        assert process.wait() == 0
        os.close(theirs)
        shown = os.read(ours, 1000)
        os.close(ours)
        assert shown.startswith(wanted)
    # A file or a pipe gets the text unchanged.
    piped = sample(tmp_path, "--prompt=\x1b[31mso", "--length=1")
    assert piped.stdout.startswith("\x1b[31mso")


def metrics_of_check(stderr):
    """Return words, known share, longest span, its text and the number of long spans."""
    pattern = (
        r"words: ([\d,]+); ([\d.]+)% occur in the training text\n(?:.*words.*\n)*"
        r"longest copied span: ([\d,]+) characters, (.*)\n"
        r"copied spans of more than 40 characters: ([\d,]+), "
    )
    num_words, share, longest, quoted, num_runs = re.search(pattern, stderr).groups()
    return int(num_words), float(share), int(longest), ast.literal_eval(quoted), int(num_runs)


def test_check_reports_words_and_copies_of_the_same_text(trained, book):
    folder, part = trained[0], book[: len(book) - len(book) // 10]
    flags = ("--prompt=The count came", "--length=300", "--temperature=0.9")
    plain = sample(folder, *flags)
    checked = sample(folder, *flags, "--check")
    assert checked.stdout == plain.stdout
    assert plain.stderr == ""
    assert f" 300 characters with {len(part):,} of the training" in checked.stderr
    made = plain.stdout.removeprefix("The count came").removesuffix("\n")
    found = re.findall("[a-z]+", made.lower())[1:-1]
    num_words, share, longest, quoted, num_runs = metrics_of_check(checked.stderr)
    # The last word counts only if more text follows it.
    assert 0 <= num_words - len(found) <= 2
    known = set(re.findall("[a-z]+", part.lower()))
    assert abs(share / 100 - np.mean([word in known for word in found])) < 0.05
    assert len(quoted) == longest
    assert quoted in part
    assert quoted in made
    assert not any(made[i : i + longest + 1] in part for i in range(len(made) - longest))
    assert (num_runs > 0) == (longest > 40)
    # With --stream the report is the same; several texts have one report.
    assert sample(folder, *flags, "--check", "--stream").stderr == checked.stderr
    three = sample(folder, *flags, "--check", "--num_samples=3")
    assert " 900 characters with " in three.stderr
    assert metrics_of_check(three.stderr)[2] >= longest


def test_no_copy_limits_copies_that_begin_in_the_prompt_too(trained, book):
    folder, part = trained[0], book[: len(book) - len(book) // 10]
    prompt = part[200:220]
    flags = (f"--prompt={prompt}", "--length=200", "--temperature=0.5")

    def long_copies(text):
        spans = [text[end - 4 : end] for end in range(len(prompt) + 1, len(text) + 1)]
        return [span for span in spans if span in part]

    assert len(long_copies(sample(folder, *flags).stdout)) > 5
    limited = sample(folder, *flags, "--no_copy=3", "--check")
    assert long_copies(limited.stdout.removesuffix("\n")) == []
    assert metrics_of_check(limited.stderr)[2] == 3
    assert sample(folder, *flags, "--no_copy=3", "--stream").stdout == limited.stdout


def test_a_text_ends_before_the_stop(trained):
    folder, flags = trained[0], ("--prompt=The count. ", "--length=300")
    whole = sample(folder, *flags).stdout.removesuffix("\n")
    stop = whole[100:103]
    wanted = whole[: whole.index(stop, len("The count. "))] + "\n"
    for more in ([], ["--stream"]):
        assert sample(folder, *flags, f"--stop={stop}", *more).stdout == wanted


def test_word_list_makes_more_words_known(trained):
    folder, flags = trained[0], ("--length=300", "--temperature=2", "--check", "--prompt=so ")
    plain = sample(folder, *flags)
    (folder / "words.txt").write_text("\n".join(plain.stdout.split()), encoding="utf-8")
    listed = sample(folder, *flags, "--words=words.txt")
    assert "unknown words: " in plain.stderr
    assert "words: 100.0% occur there or in the word list" in listed.stderr
    assert "unknown words" not in listed.stderr


def test_window_method_writes_a_text(trained):
    text = sample(trained[0], "--method=window", "--length=10", "--temperature=0").stdout
    assert len(text) == 11


def test_export_writes_the_same_text_as_the_run(trained):
    folder, _ = trained
    flags = ("--length=40", "--seed=3")
    words = ("--workdir=runs/tiny-book", "--out=book.safetensors")
    exported = warm_launcher()("export", *words, cwd=folder)
    assert (exported.returncode, exported.stdout) == (0, "book.safetensors\n"), exported.stderr
    found = warm_launcher()("sample", "--workdir=book.safetensors", *flags, cwd=folder)
    assert found == sample(folder, *flags)
    refused = warm_launcher()("export", words[0], "--format=torch", cwd=folder)
    assert refused.returncode == 2
    assert "config.model.multiplicative=True" in refused.stderr
    assert not (folder / "runs" / "tiny-book-torch").exists()


def test_unknown_characters_of_a_prompt_file(trained):
    folder, _ = trained
    (folder / "prompt.txt").write_text("to € her", encoding="utf-8")
    flags = ("--prompt_file=prompt.txt", "--length=5")
    result = warm_launcher()("sample", "--workdir=runs/tiny-book", *flags, cwd=folder)
    assert result.returncode == 2
    assert "'€' (U+20AC) at position 3" in result.stderr
    assert sample(folder, *flags, "--unknown=drop").stdout.startswith("to  her")
    assert sample(folder, *flags, "--unknown=replace").stdout.startswith("to   her")


def test_evaluate_reports_metrics_of_any_text(trained, book):
    folder, _ = trained
    result = warm_launcher()("evaluate", "--workdir=runs/tiny-book", "--json", cwd=folder)
    figures = json.loads(result.stdout)
    assert figures["characters"] == len(book) // 10 - 1
    best = json.loads((folder / "runs/tiny-book/metrics.jsonl").read_text().splitlines()[-1])
    # The run reads its validation text in several streams, evaluate.py in one.
    assert abs(figures["bits_per_char"] - best["val/bits_per_char"]) < 0.02
    # In ASCII a character is a byte; the values differ by rounding only.
    assert math.isclose(figures["bits_per_byte"], figures["bits_per_char"], rel_tol=1e-12)
    assert figures["cold"]["window"] == 256
    assert figures["cold"]["characters"] == figures["characters"]
    assert 0.9 < figures["cold"]["bits_per_char"] / figures["bits_per_char"] < 1.2
    found = figures["baselines"]
    assert found["training_characters"] == len(book) - len(book) // 10
    assert found["bits_per_char"]["uniform"] == math.log2(len(set(book)))
    assert list(found["bits_per_char"]) == [
        *("uniform", "unigram", "5-gram", "7-gram", "gzip -9", "bz2 -9", "xz -9e")
    ]
    (folder / "other.txt").write_text(book[:500], encoding="utf-8")
    flags = ("--workdir=runs/tiny-book", "--text=other.txt", "--window=9999")
    other = warm_launcher()("evaluate", *flags, cwd=folder)
    assert "bits/char" in other.stdout
    assert re.search(r"characters +499\n", other.stdout)
    assert re.search(r"\n7-gram +\d", other.stdout)
    assert other.stdout.splitlines()[-1].startswith("The model is better than ")
    assert "cold, windows of 499 " in other.stdout  # the text has no longer one
    assert re.fullmatch("warning: about 100 % of other.txt .*verbatim .*\n", other.stderr)


def test_evaluate_reports_dynamic_and_temperature_scaling(trained):
    folder, _ = trained
    flags = ("--workdir=runs/tiny-book", "--dynamic", "--temperature", "--nobaselines", "--audit")
    figures = json.loads(warm_launcher()("evaluate", *flags, "--json", cwd=folder).stdout)
    dynamic = figures["dynamic"]
    assert dynamic["characters"] == figures["characters"]
    assert 0 < figures["bits_per_char"] - dynamic["bits_per_char"] < 1
    heat = figures["temperature"]
    assert 0.5 < heat["fitted"] < 2
    assert abs(heat["bits_per_char"] - heat["bits_per_char_at_1"]) < 0.2
    assert abs(heat["bits_per_char_at_1"] - figures["bits_per_char"]) < 0.2
    shown = "\n".join(report.format_report(figures | {"text": ""}, 0, 0))
    assert f"temperature of {heat['fitted']:.3f}, fitted on the first half" in shown
    assert re.search(rf"\ndynamic +{dynamic['bits_per_char']:.4f} ", shown)
    audit = figures["audit"]
    assert audit["passed"]
    names = {re.split("[:,]", check["name"])[0] for check in audit["checks"]}
    assert {"stateful", "cold", "dynamic"} < names
    size = figures["characters"]
    assert audit["counts"]["scored"] == audit["counts"]["scored_bytes"] == size
    assert audit["counts"]["file_bytes"] == os.path.getsize(folder / "book.txt")
    assert len(re.findall("\npass ", shown)) == len(audit["checks"])


def test_a_compressed_file_comes_back_in_another_process(trained, book):
    folder, _ = trained
    raw = "\ufeffNaïve\r\n".encode() + book[:200].encode() + b"\xff"
    (folder / "a.txt").write_bytes(raw)
    flags = ("compress", "--workdir=runs/tiny-book")
    packed = warm_launcher()(*flags, "a.txt", cwd=folder)
    assert (packed.returncode, packed.stderr) == (0, "")
    size = (folder / "a.txt.clstm").stat().st_size
    assert packed.stdout.startswith(f"a.txt.clstm: {size:,} bytes\n")
    assert re.search(r"evaluated: [\d.]+ bits per character", packed.stdout)
    (folder / "a.txt").write_bytes(b"")
    answer = warm_launcher()(*flags, "--decompress", "a.txt.clstm", "--overwrite", cwd=folder)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert (folder / "a.txt").read_bytes() == raw


def test_adapt_to_changes_the_sample_but_not_the_run(trained):
    folder, _ = trained
    (folder / "more.txt").write_text("blood and blood and " * 200, encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    flags = ("--prompt=upon ", "--length=60", "--temperature=0")
    plain = sample(folder, *flags)
    adapted = sample(folder, *flags, "--adapt_to=more.txt")
    assert adapted.stdout.count("blood and") > plain.stdout.count("blood and")
    assert "reading 4,000 characters of more.txt" in adapted.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}


def test_evaluate_compares_runs_on_the_same_text(trained):
    folder, _ = trained
    flags = ["--workdir=runs/tiny-book", "--compare=runs/tiny-book"]
    text = warm_launcher()("evaluate", *flags, cwd=folder)
    assert (text.returncode, text.stderr) == (0, "")
    assert re.search(r"A - B +\+0\.0000 bits/char\n\+- 0\.0000 +between \d+ blocks", text.stdout)
    assert "The noise between seeds is unknown" in text.stdout


def test_evaluate_without_the_training_text_has_no_baselines(trained, book):
    folder, _ = trained
    (folder / "new.txt").write_text(book[:300] + "\u20ac", encoding="utf-8")
    (folder / "book.txt").rename(folder / "gone.txt")
    try:
        flags = ("--workdir=runs/tiny-book", "--text=new.txt", "--unknown=drop", "--json")
        result = warm_launcher()("evaluate", *flags, cwd=folder)
        silent = warm_launcher()("evaluate", *flags, "--nobaselines", cwd=folder)
    finally:
        (folder / "gone.txt").rename(folder / "book.txt")
    assert json.loads(result.stdout) == json.loads(silent.stdout)
    assert json.loads(silent.stdout)["characters"] == 299
    assert json.loads(silent.stdout)["bits_per_byte"] is None  # a character is missing
    assert "baselines" not in json.loads(result.stdout)
    assert "no baselines, which need the run's own text" in result.stderr
    assert silent.stderr == ""


def test_config_is_a_path_or_a_name_in_any_folder(trained, tmp_path):
    missing = f"--config.data.path={tmp_path}/none.txt"
    for config in ("tiny", "configs/tiny.py", str(ROOT / "configs" / "tiny.py")):
        result = warm_launcher()("train", f"--config={config}", missing, cwd=tmp_path)
        assert "none.txt" in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("launcher", "flag", "message"),
    [
        ("train", "--config.batch_sise=3", "did you mean batch_size"),
        ("sample", "--temprature=1", "temperature"),
    ],
)
def test_mistake_of_a_cold_launcher_is_one_line(launcher, flag, message, tmp_path):
    # As test_mistakes.py, but in a new process.
    result = run_command(launcher, flag, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


SOURCES = {path.stem: path.read_text() for path in sorted((ROOT / "launch").glob("*.py"))}
LAUNCHERS = [name for name, source in SOURCES.items() if "\n    app.run(main" in source]


@pytest.mark.parametrize(("number", "launcher"), list(enumerate(LAUNCHERS)))
def test_help_lists_flags_configs_and_an_example(number, launcher, launch_help):
    result = launch_help(launcher, ("--help", "-h")[number % 2], cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    source = SOURCES[launcher]
    named = re.findall(r'flags\.DEFINE\w*\(\s*(?:options\.\w+, )?"(\w+)"', source)
    for flag in [*named, "debug"]:
        assert f"\n  --{flag}" in result.stdout
    command = shlex.join(command_of(launcher))
    assert result.stdout.splitlines()[-1].startswith(f"  {command} --")
    if "define_config" in source:
        text = [] if launcher == "scaling" else ["--config.data.path=PATH"]  # it reads none
        order = [*text, "\n  medium", "\n  --debug", "Example"]
        places = [result.stdout.index(word) for word in order]
        assert places == sorted(places)
        assert ("Dracula, downloaded" in result.stdout) == (launcher != "scaling")
        assert {path.stem for path in (ROOT / "configs").glob("*.py")} <= set(result.stdout.split())


def test_help_shows_defaults(launch_help):
    lines = launch_help("sample", "-h", cwd=ROOT).stdout.splitlines()
    assert "  --checkpoint=best|latest  which weights (default: best)" in lines
    assert "  --num_samples=N           how many texts (default: 1)" in lines
