"""Build the text of --help: description, texts, configs, flags, an example."""

import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path

from absl import flags

from charlstm.cli import options, streams
from charlstm.system.console import launcher_command

TEXT = (
    "--config.data.path=PATH sets the text: a UTF-8 file, a folder of files, or a pattern such as "
    "'books/*.txt'; .gz, .zst, .bz2 and .xz are decompressed. Default: Dracula, downloaded once."
)
SETTINGS = "--config.KEY=VALUE changes one setting; charlstm/config.py describes them."
INDENT = 28  # columns of the names of flags


def help_text(example: str) -> str:
    """Return the help of this launcher, with `example` as the flags of the example.

    If the example has a book.txt, the help describes config.data.path.
    """
    name, width = Path(sys.argv[0]).stem, min(shutil.get_terminal_size().columns or 80, 100)
    document = sys.modules["__main__"].__doc__ or ""
    parts = [re.sub(r"python launch/(\w+)\.py", lambda found: launcher_command(found[1]), document)]
    if "book.txt" in example:
        parts.append("Text\n" + textwrap.indent(textwrap.fill(TEXT, width - 2), "  "))
    if "config" in flags.FLAGS:
        configs = [_entry(f"  {stem}", about, width) for stem, about in _configs().items()]
        parts.append("\n".join(["Configs (--config=NAME or --config=FILE)", *configs]))
        parts.append(textwrap.indent(textwrap.fill(SETTINGS, width - 2), "  "))
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    shown = [flag for flag in own if flag.name not in ("config", "debug")]
    lines = [_entry(*_describe(flag), width) for flag in [*shown, flags.FLAGS["debug"]]]
    parts.append("\n".join(["Flags", *lines]))
    parts.append(f"Example\n  {launcher_command(name)} {example}")
    return "\n\n".join(part.strip("\n") for part in parts)


def _configs() -> dict[str, str]:
    """Return the first sentence of each config's docstring by the config's name."""
    found = {}
    for path in sorted(Path(streams.REPOSITORY, "configs").glob("*.py")):
        document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = document.split("\n\n")[0]
    return found


def _describe(flag: flags.Flag) -> tuple[str, str]:
    """Return the syntax of a flag and its help."""
    about, default = re.sub("^<.*?>: ", "", flag.help), flag.default  # of an enum's values
    if isinstance(flag, flags.BooleanFlag):
        return f"  --{flag.name}", f"{about}; --no{flag.name} turns it off" if default else about
    if isinstance(flag, flags.EnumFlag):
        values = "|".join(flag.parser.enum_values)
    elif isinstance(flag.parser, options.PathParser):
        values = "PATH"
    else:
        values = {"int": "N", "float": "X"}.get(flag.flag_type(), flag.name.upper())
    if default not in (None, "", []):
        about += f" (default: {','.join(default) if isinstance(default, list) else default})"
    return f"  --{flag.name}={values}", about


def _entry(name: str, about: str, width: int) -> str:
    lines = textwrap.wrap(" ".join(about.split()), max(width - INDENT, 20))
    first = f"{name:{INDENT}}" if len(name) < INDENT else f"{name}\n{'':{INDENT}}"
    return first + f"\n{'':{INDENT}}".join(lines)
