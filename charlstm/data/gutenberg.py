"""Remove the headers, footers and licences that Project Gutenberg puts around its books."""

import itertools
import re
from collections.abc import Iterable, Iterator

# The longest header or footer: a licence has 19,000 characters, an old header 13,000.
MAX_FRAME_CHARS = 2**15
# Longer than any match of _MARKS, one character of lookahead included.
_MAX_MARK_CHARS = 512
_TITLE = r"(?:[^*]|\*(?!\*\*)){0,300}"  # may go on in the next line
_END = r"END OF (?:THE |THIS )?PROJECT GUTENBERG\b"
_MARKS = re.compile(
    # The last line of a header. Until 2004 a header ended with its "small print".
    rf"(?P<start>^\*{{3}}[ \t]{{0,9}}START OF (?:THE |THIS )?PROJECT GUTENBERG E(?:BOOK|TEXT)"
    rf"{_TITLE}\*{{3}}[ \t]{{0,9}}$"
    r"|^\*END[* ]{1,9}THE SMALL PRINT![^\n]{0,200}\*END\*[ \t]{0,9}$)"
    # The first line of a footer; some books have both forms, one after the other.
    rf"|(?P<end>^\*{{3}}[ \t]{{0,9}}{_END}{_TITLE}\*{{3}}[ \t]{{0,9}}$"
    rf"|^(?:\*{{3}}[ \t]{{0,9}})?{_END}[^\n]{{0,300}})"
    # The first line of a header.
    r"|(?P<header>^[* \t]{0,20}(?:THE |THIS )?PROJECT GUTENBERG(?:['\u2019]S)? "
    r"(?:E-?BOOK|E-?TEXT|EDITION)S?(?:,| OF )"
    r"|^PROJECT GUTENBERG['\u2019]S [^\n]{1,200}, BY )"
    # The last line of a licence.
    r"|(?P<licence>SUBSCRIBE\s{1,9}TO\s{1,9}OUR\s{1,9}EMAIL\s{1,9}NEWSLETTER\s{1,9}TO\s{1,9}HEAR"
    r"\s{1,9}ABOUT\s{1,9}NEW\s{1,9}EBOOKS\.?|^\*{3}[ \t]{0,9}END: FULL LICENSE\b[^\n]{0,100})",
    re.ASCII | re.IGNORECASE | re.MULTILINE,
)
# Each match of _MARKS has one of these words within its first _MAX_LEAD characters, all in lower
# or all in upper case ("utenberg" is of "Gutenberg", too). To look for them first is much faster.
_MARK_WORDS = ("utenberg", "small print", "newsletter", "full license")
_MAX_LEAD = 64
# What a header or footer speaks of, and the text between two books rarely does.
_FRAME_WORDS = re.compile(
    r"gutenberg|licen[cs]e|copyright|header|footer|e-?book|e-?text", re.IGNORECASE
)


def cut_gutenberg(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a text without the headers, footers and licences of Project Gutenberg's books.

    A text may hold any number of books, and other text before, between and after them. A header
    needs its last line ("*** START OF ..."), and a footer needs a header before it: without one
    nothing is cut. Newlines next to a cut are dropped, an empty line separates the texts on both
    sides of it, and a text with a cut ends with one newline. The result does not depend on where
    the chunks end, and the memory in use is that of a chunk and of MAX_FRAME_CHARS characters.

    Args:
      chunks: the text, cut anywhere, with newlines as line ends.
    """
    is_begun = has_cut = is_after_cut = False
    num_newlines = 0  # held back, since a cut may follow
    for is_kept, text in _classify(_split(chunks)):
        if not is_kept:
            has_cut = is_after_cut = True
            continue
        if is_after_cut:
            text, num_newlines = text.lstrip("\n"), 2 if is_begun else 0
        line = text.rstrip("\n")
        if line:
            yield "\n" * num_newlines + line
            is_begun, is_after_cut, num_newlines = True, False, 0
        if not is_after_cut:
            num_newlines += len(text) - len(line)
    if not has_cut:
        yield "\n" * num_newlines
    elif is_begun:
        yield "\n"


def _split(chunks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text): each match of _MARKS with its group's name, and what lies between as ''.

    The concatenated texts are the input.
    """
    held = "\n"  # begins with the last character that was yielded, for ^
    for chunk in itertools.chain(chunks, [None]):
        held += chunk or ""
        # A match that begins here or later may depend on what follows.
        limit = len(held) if chunk is None else len(held) - _MAX_MARK_CHARS
        begin = 1
        for place in _find_words(held):
            window = max(begin, place - _MAX_LEAD), place + _MAX_MARK_CHARS
            match = _MARKS.search(held, *window) if place >= begin else None
            if match and match.start() <= place:
                if match.start() >= limit:
                    break
                yield "", held[begin : match.start()]
                yield match.lastgroup or "", match.group()
                begin = match.end()
        if limit > begin:
            yield "", held[begin:limit]
            begin = limit
        held = held[begin - 1 :]


def _find_words(text: str) -> list[int]:
    """Return the positions of _MARK_WORDS in `text`, in order."""
    places = []
    for word in [*_MARK_WORDS, *map(str.upper, _MARK_WORDS)]:
        place = text.find(word)
        while place >= 0:
            places.append(place)
            place = text.find(word, place + 1)
    return sorted(places)


def _classify(tokens: Iterable[tuple[str, str]]) -> Iterator[tuple[bool, str]]:
    """Yield (is_kept, text) from what _split yields, in order.

    Up to MAX_FRAME_CHARS characters are held back in three places, and kept if more follow:
      between: at the beginning, and after a licence. A "start" makes it a header, if it reads so.
      header: after the first line of a header. A "start" makes it a header.
      footer: after an "end". A "start" or the end of the text makes it a footer, if it reads so.
    """
    place, held, is_in_book = "between", "", False
    for kind, text in tokens:
        if kind == "start":
            is_header = place == "header" or _FRAME_WORDS.search(held)
            yield not is_header, held
            yield False, text
            place, held, is_in_book = "", "", True
        elif kind == "end" and (is_in_book or place == "footer"):
            yield is_in_book, held
            yield False, text
            place, held, is_in_book = "footer", "", False
        elif kind == "licence" and (place == "footer" or (place == "between" and held.isspace())):
            yield False, held + text
            place, held = "between", ""
        elif kind == "header" and place != "header":
            yield not (place == "footer" and _FRAME_WORDS.search(held)), held
            place, held = "header", text
        elif place:
            held += text
            if len(held) > MAX_FRAME_CHARS:
                yield True, held
                place, held = "", ""
        elif text:
            yield True, text
    yield not (place == "footer" and _FRAME_WORDS.search(held)), held
