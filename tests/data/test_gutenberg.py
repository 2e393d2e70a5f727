"""Removal of Project Gutenberg's headers, footers and licences."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlstm.data import gutenberg
from charlstm.data.gutenberg import MAX_FRAME_CHARS, cut_gutenberg

NEW_START = "*** START OF THE PROJECT GUTENBERG EBOOK DRACULA ***"
NEW_END = "*** END OF THE PROJECT GUTENBERG EBOOK DRACULA ***"
BOOK = "CHAPTER I\n\n  3 May. Bistritz.\n\n* * * * *\n\nAnd so on to the end of it.\n"

HEADER = (
    "The Project Gutenberg eBook of Dracula\n\nThis ebook is for the use of anyone.\n\n"
    f"Title: Dracula\n\n{NEW_START}\n"
)
OLD_HEADER = (
    "***The Project Gutenberg Etext of Dracula, by Bram Stoker***\n\n"
    f"Copyright laws are changing all over the world.\n{'Please read this. ' * 700}\n"
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
)
LICENCE = (
    f"Updated editions will replace the previous one.\n{'Project Gutenberg is free. ' * 700}\n"
    "how to help produce our new eBooks, and how to\n"
    "subscribe to our email newsletter to hear about new eBooks.\n"
)

OTHER_HEADER = HEADER.replace(
    "The Project Gutenberg eBook of Dracula", "Project Gutenberg's Dracula, by Bram Stoker"
)
# Frames with a clear beginning or end, which other text may precede or follow.
CLEAR_HEADERS = [HEADER, OLD_HEADER, OTHER_HEADER, HEADER.replace("eBook of", "EBook,")]
CLEAR_FOOTERS = [
    f"{NEW_END}\n\n\n{LICENCE}",
    f"End of the Project Gutenberg EBook of Dracula, by Bram Stoker\n\n{NEW_END}\n{LICENCE}",
    f"{NEW_END}\n{LICENCE[:5000]}\n*** END: FULL LICENSE ***\n",
    f"{NEW_END}\n{LICENCE}\n\n*** END: FULL LICENSE ***\n",
    f"{NEW_END}\n",
]
CLEAR_HEADERS.append(f"{NEW_START}\n")
FOOTERS = [
    *CLEAR_FOOTERS,
    "End of Project Gutenberg's Etext of Dracula, by Bram Stoker\n",
    f"{NEW_END}\nA licence.\n",
    "",
]
LINE = "So it went on, and on, and nobody knew why. "
LONG = f"{LINE}\n\n" * 3000  # more than 131,072 characters
NEWLINES = st.integers(0, 3).map("\n".__mul__)


@st.composite
def compositions(draw):
    """Return (a file, what should remain of it): books and other text in any order."""
    content, pieces, last, has_book = "", [], "\n", False
    for number in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from([0, 3, 800, len(LINE) * 500, len(LONG)]))
        text = f"{number}: {LONG[:size]}.\nThe end of {number}."
        if last in ("\n", *CLEAR_FOOTERS) and draw(st.booleans()):
            content += f"{draw(NEWLINES) if pieces else ''}{text}\n"
            last = text
        else:
            # This header has no clear beginning: it includes other text before it.
            unclear = [f"A header.\n{NEW_START}\n"] if last in ("\n", *FOOTERS[:-1]) else []
            header = draw(st.sampled_from(CLEAR_HEADERS + unclear))
            last, has_book = draw(st.sampled_from(FOOTERS)), True
            content += f"{draw(NEWLINES)}{header}{draw(NEWLINES)}{text}\n{draw(NEWLINES)}{last}"
        pieces.append(text)
    return content, "\n\n".join(pieces) + "\n" if has_book else content


def chunks_of(content, size):
    return (content[begin : begin + size] for begin in range(0, len(content), size))


@settings(max_examples=40)
@given(compositions(), st.integers(1, 5000))
def test_books_and_the_text_between_them_remain(composition, size):
    content, wanted = composition
    chunks = chunks_of(content, max(size, len(content) // 200))
    assert "".join(cut_gutenberg(chunks)) == wanted


PIECES = [HEADER, NEW_START, NEW_END, "\n", "\n\n", "licence", "End of Project Gutenberg", "x"]
PIECES += ["*** END: FULL LICENSE", "The Project Gutenberg eBook of", "***", " " * 70, LINE * 9]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join), st.integers(1, 70))
def test_result_does_not_depend_on_chunks(content, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gutenberg, "MAX_FRAME_CHARS", 200)
        whole = "".join(cut_gutenberg([content]))
        assert "".join(cut_gutenberg(chunks_of(content, size))) == whole


FRAMES = {
    "new": (f"A header.\n\n{NEW_START}\n", f"{NEW_END}\nA licence.\n"),
    "this": (
        "A header.\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n",
        "*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nA licence.\n",
    ),
    "title over two lines": (
        "A header.\n*** START OF THE PROJECT GUTENBERG EBOOK X,\nVOLUME I ***\n",
        "*** END OF THE PROJECT GUTENBERG EBOOK X,\nVOLUME I ***\nA licence.\n",
    ),
    "title with stars": (
        "A header.\n*** START OF THE PROJECT GUTENBERG EBOOK M*A*S*H ***\n",
        "*** END OF THE PROJECT GUTENBERG EBOOK M*A*S*H ***\nA licence.\n",
    ),
    "two ends": (
        f"A header.\n{NEW_START}\n",
        f"End of the Project Gutenberg EBook of X, by Y\n\n{NEW_END}\nA licence.\n",
    ),
    "1993": (
        "A Gutenberg preface.\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
        "End of Project Gutenberg's Etext of X, by Y\n",
    ),
    "2002": (
        "A Gutenberg preface.\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN EBOOKS*Ver.02/11/02*END*\n",
        "End of the Project Gutenberg EBook of X, by Y\nA licence.\n",
    ),
    "curly apostrophe": (f"{NEW_START}\n", "End of Project Gutenberg\u2019s Etext of X, by Y\n"),
    "lower case": (f"{NEW_START.lower()}\n", f"{NEW_END.lower()}\na licence.\n"),
    "end in the header": (f"{NEW_END}\nA header.\n{NEW_START}\n", f"{NEW_END}\nA licence.\n"),
    "start only": (f"A header.\n{NEW_START}\n", ""),
}


@pytest.mark.parametrize("frame", FRAMES)
def test_each_form_of_a_frame_is_cut(frame):
    before, after = FRAMES[frame]
    content = f"{before}\n\n{BOOK}\n\n{after}"
    assert "".join(cut_gutenberg([content])) == BOOK
    if after:
        assert "".join(cut_gutenberg([content * 3])) == f"{BOOK}\n{BOOK}\n{BOOK}"


@pytest.mark.parametrize(
    "content",
    [
        "\n\n  A text of one's own.\n\n",
        "no newline at the end",
        "",
        "\n\n",
        # A frame needs a line of its own.
        f"He wrote: {NEW_START}\nand then: {NEW_END}\n",
        # A footer needs a header.
        f"One book.\n{NEW_END}\nAnother one.\n",
        f"{LONG}\nEnd of Project Gutenberg, I thought.\n{LONG}",
        f"The Project Gutenberg eBook of X is long.\n{BOOK}",
        # A header far from its last line, and a licence without a footer.
        f"The Project Gutenberg eBook of X\n{LONG}",
        LICENCE,
    ],
)
def test_text_without_a_frame_is_not_changed(content):
    assert "".join(cut_gutenberg([content])) == content


def test_long_text_before_or_after_a_book_remains():
    far = f"{LONG}\n{NEW_START}\n{BOOK}\n{NEW_END}\nA licence.\n{LONG}"
    wanted = f"{LONG.rstrip()}\n\n{BOOK}\nA licence.\n{LONG.rstrip()}\n"
    assert re.sub(" +\n", "\n", "".join(cut_gutenberg([far]))) == re.sub(" +\n", "\n", wanted)


@pytest.mark.parametrize("before", ["", HEADER, f"{HEADER}{BOOK}{NEW_END}\n", "x\n" + HEADER[:99]])
def test_buffer_is_bounded(before):
    num_read = 0

    def read():
        nonlocal num_read
        for chunk in [before, *[LINE * 20] * 200]:
            num_read += len(chunk)
            yield chunk

    num_written = 0
    for text in cut_gutenberg(read()):
        num_written += len(text)
        assert num_read - num_written < len(before) + MAX_FRAME_CHARS + 2000
    assert num_written > 200 * len(LINE)
