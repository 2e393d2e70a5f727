import logging

from charlstm.console import ConsoleHandler


def test_the_console_shows_control_characters_and_obeys_none(capsys):
    text = "a sample:\n\x1b[2J\x1b]0;owned\x07\u009b31m[bold]:smile:\ttab"
    record = logging.LogRecord("charlstm", logging.WARNING, "", 0, text, None, None)
    ConsoleHandler().emit(record)
    shown = capsys.readouterr().err
    expected = r"warning: a sample:\n\x1b[2J\x1b]0;owned\x07\x9b31m[bold]:smile:"
    assert shown.startswith(expected.replace(r"\n", "\n", 1))
    assert shown.endswith("tab\n")
