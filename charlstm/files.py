"""Writing files whole."""

from etils import epath


def write_file(path: epath.Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one whole."""
    raw = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_bytes(raw)
    temporary.replace(path)
