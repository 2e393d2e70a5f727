from rich.table import Table

from charlstm.system.tables import plain_text


def test_plain_text_neither_cuts_nor_interprets_cells(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    long_name, markup = "name" * 100, "[bold]book[/bold] :smile:"
    table = Table("name", box=None, pad_edge=False)
    table.add_row(long_name)
    table.add_row(markup)
    assert plain_text(table).splitlines() == ["name", long_name, markup]


def test_plain_text_escapes_control_characters():
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("a\x1b[2Jb")
    assert plain_text(table) == r"a\x1b[2Jb"
