"""Run every launcher command that README.md prints, shortened, on made-up texts in a new folder.

usage: python .ci/commands.py
"""

import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--config.num_steps=4", "--config.eval_every_steps=4", "--config.model.hidden_size=8"]
# Flags that shorten each command. They come last, so that they win.
SHORTER = {
    "train": [*TINY, "--config.sample.length=20"],
    "sample": ["--length=20"],
    "evaluate": [],
    "score": [],
    "report": [],
    "compress": [],
    "export": [],
    "serve": ["--port=0"],
    "plan": ["--minutes=0.5"],
    "sweep": [*TINY, "--config.data.path=FILE"],
    "bench": ["--quick", "--what=step", "--repeats=1", "--peers=none"],
    "scaling": ["--devices=2"],
}
TEXTS = (
    "FILE other.txt FOLDER/one.txt FOLDER/two.txt books/1901.txt stories.txt chinese.txt"
).split()
LINE = "Four men went to mow, went to mow a meadow.<|end|>\n"


def main() -> None:
    """Run the commands in README's order; exit with 1 at the first that fails."""
    readme = (ROOT / "README.md").read_text("utf-8").replace("\\\n", " ")
    folder = Path(tempfile.mkdtemp())
    for name in TEXTS:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(LINE * 300, encoding="utf-8")
    for command in re.findall(r"python launch/[^`&#\n]*", readme):
        command = command.replace("KEY=VALUE,VALUE", "model.dropout_rate=0,0.1")
        command = command.replace("runs/default-pg345", "runs/default-FILE")
        _, script, *flags = shlex.split(command)
        flags += SHORTER[Path(script).stem]
        start = time.monotonic()
        call = serve if Path(script).stem == "serve" else subprocess.call
        code = call([sys.executable, str(ROOT / script), *flags], cwd=folder)
        print(f"{code}: {command.strip()} ({time.monotonic() - start:.0f} s)", flush=True)
        if code:
            sys.exit(1)


def serve(words: list[str], cwd: Path) -> int:
    """Start a server, get its page, and stop it as Ctrl-C does; return 0 if all went well."""
    server = subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().split()[-1]
    page = urllib.request.urlopen(url, timeout=60).read()
    server.send_signal(signal.SIGINT)
    return 0 if b"<html" in page and server.wait(60) == 128 + signal.SIGINT else 1


main()
