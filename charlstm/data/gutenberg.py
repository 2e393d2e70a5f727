"""Remove the headers, footers and licences that Project Gutenberg puts around its books."""

import itertools
import re
from collections.abc import Iterable, Iterator

# The longest header or footer: a licence has 19,000 characters, an old header 13,000.
MAX_FRAME_CHARS = 2**15
# More than the longest match of _MARKS and one character of lookahead.
_MAX_MARK_CHARS = 512
_TITLE = r"(?:[^*]|\*(?!\*\*)){0,300}"  # may continue on the next line
_END = r"END OF (?:THE |THIS )?PROJECT GUTENBERG\b"
_MARKS = re.compile(
    # The last line of a header. Until 2004 a header ended with its "small print".
    rf"(?P<start>^\*{{3}}[ \t]{{0,9}}START OF (?:THE |THIS )?PROJECT GUTENBERG E(?:BOOK|TEXT)"
    rf"{_TITLE}\*{{3}}[ \t]{{0,9}}$"
    r"|^\*END[* ]{1,9}THE SMALL PRINT![^\n]{0,200}\*END\*[ \t]{0,9}$)"
    # The first line of a footer. Some books have both forms in succession.
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
# Each match of _MARKS has one of these words, in lower or upper case, within its first _MAX_LEAD
# characters ("utenberg" also finds "Gutenberg"). Searching them first is much faster.
_MARK_WORDS = ("utenberg", "small print", "newsletter", "full license")
_MAX_LEAD = 64
# Headers and footers contain these words; text between two books rarely does.
_FRAME_WORDS = re.compile(
    r"gutenberg|licen[cs]e|copyright|header|footer|e-?book|e-?text", re.IGNORECASE
)


def cut_gutenberg(chunks: Iterable[str]) -> Iterator[str]:
    """Yield a text without the headers, footers and licences of Project Gutenberg's books.

    A text may contain any number of books, and other text before, between and after them. A header
    is recognized by its last line ("*** START OF ..."), a footer only after a header; a text
    without a header is not changed. Newlines next to a cut are removed, an empty line separates
    the texts on both sides of it, and a text with a cut ends with one newline. The result does not
    depend on where the chunks end. At most a chunk and MAX_FRAME_CHARS characters are buffered.

    Args:
      chunks: the text, cut anywhere, with newlines as line ends.
    """
    has_text = has_cut = is_after_cut = False
    num_newlines = 0  # at the end of the text so far; not yielded yet, because a cut may follow
    for is_content, text in _classify(_split(chunks)):
        if not is_content:
            has_cut = is_after_cut = True
            continue
        if is_after_cut:
            text, num_newlines = text.lstrip("\n"), 2 if has_text else 0
        stripped = text.rstrip("\n")
        if stripped:
            yield "\n" * num_newlines + stripped
            has_text, is_after_cut, num_newlines = True, False, 0
        if not is_after_cut:
            num_newlines += len(text) - len(stripped)
    if not has_cut:
        yield "\n" * num_newlines
    elif has_text:
        yield "\n"


def _split(chunks: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Split a text into matches of _MARKS and the text between them.

    Yield (kind, text), where kind is the group of a match, or '' between matches. The concatenated
    texts are the input.
    """
    buffer = "\n"  # the last character that was yielded, for ^, and the text after it
    for chunk in itertools.chain(chunks, [None]):
        buffer += chunk or ""
        # A match that begins here or later may depend on the next chunk.
        limit = len(buffer) if chunk is None else len(buffer) - _MAX_MARK_CHARS
        begin = 1
        for place in _find_words(buffer):
            window = max(begin, place - _MAX_LEAD), place + _MAX_MARK_CHARS
            match = _MARKS.search(buffer, *window) if place >= begin else None
            if match and match.start() <= place:
                if match.start() >= limit:
                    break
                yield "", buffer[begin : match.start()]
                yield match.lastgroup or "", match.group()
                begin = match.end()
        if limit > begin:
            yield "", buffer[begin:limit]
            begin = limit
        buffer = buffer[begin - 1 :]


def _find_words(text: str) -> list[int]:
    """Return the positions of _MARK_WORDS in `text`, in ascending order."""
    places = []
    for word in [*_MARK_WORDS, *map(str.upper, _MARK_WORDS)]:
        place = text.find(word)
        while place >= 0:
            places.append(place)
            place = text.find(word, place + 1)
    return sorted(places)


def _classify(tokens: Iterable[tuple[str, str]]) -> Iterator[tuple[bool, str]]:
    """Yield (is_content, text) for the (kind, text) of _split, in order.

    In three places up to MAX_FRAME_CHARS characters are buffered; if more follow, they are content.
      between: at the beginning and after a licence. A "start" makes the buffer a header if it
        contains one of _FRAME_WORDS.
      header: after the first line of a header. A "start" makes the buffer a header.
      footer: after an "end". A "start" or the end of the text makes the buffer a footer if it
        contains one of _FRAME_WORDS.
    """
    place, buffer, is_in_book = "between", "", False
    for kind, text in tokens:
        if kind == "start":
            is_header = place == "header" or _FRAME_WORDS.search(buffer)
            yield not is_header, buffer
            yield False, text
            place, buffer, is_in_book = "", "", True
        elif kind == "end" and (is_in_book or place == "footer"):
            yield is_in_book, buffer
            yield False, text
            place, buffer, is_in_book = "footer", "", False
        elif kind == "licence" and (place == "footer" or (place == "between" and buffer.isspace())):
            yield False, buffer + text
            place, buffer = "between", ""
        elif kind == "header" and place != "header":
            yield not (place == "footer" and _FRAME_WORDS.search(buffer)), buffer
            place, buffer = "header", text
        elif place:
            buffer += text
            if len(buffer) > MAX_FRAME_CHARS:
                yield True, buffer
                place, buffer = "", ""
        elif text:
            yield True, text
    yield not (place == "footer" and _FRAME_WORDS.search(buffer)), buffer
