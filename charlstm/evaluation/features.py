# ruff: noqa: RUF001 (quotation marks are data here)
"""Features of a text that a person understands, as one value per character."""

import re

import numpy as np

from charlstm.data.vocab import END

BRACKETS = {"(": ")", "[": "]", "{": "}"}
QUOTES = {"“": "”", "‘": "’", "«": "»", "»": "«", "„": "“", "「": "」", "『": "』"}
NEUTRAL = "x"  # replaces an apostrophe, so that it is not taken for a quotation mark
PARAGRAPH_END = re.compile(rf"(\n\s*\n|{END})")
APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
# Marks after a space, a dash or another opening mark, and before a word, open.
OPENING = r"(?<![^\s(\[{—–_*“‘\"'-])%s(?=[^\s,;:!?)\]])"
OPENING_DOUBLE, OPENING_SINGLE = re.compile(OPENING % '"'), re.compile(OPENING % "'")
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
SENTENCE_END = re.compile(
    r"""(?<![.!?…])[.!?…]*(?P<mark>[.!?…])
    [\"'”’»)\]_*]*                             # closing marks
    (?:\s+[\"'“‘«„(\[_*—-]*(?P<next>\w)|\s*\Z)  # the next sentence
    |(?P<wide>[。！？])""",
    re.VERBOSE,
)
LAST_WORD = re.compile(r"[^\W_]*\Z")
LONGEST_WORD = 8  # characters before a full stop that are compared with ABBREVIATIONS
ABBREVIATIONS = set(
    "Mr Mrs Ms Messrs Dr Prof St Mme Mlle Rev Hon Capt Col Gen No vol cf etc".split()
)
MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\.?)"
)
DAY = r"(?:[12]?\d|3[01])(?:st|nd|rd|th)?"
HEADING = re.compile(
    rf"^(?:[^\w\n]|_)*(?:\w+day,?\ )?(?P<date>(?:{DAY}\ {MONTH}|{MONTH}\ {DAY})(?:,?\ \d{{4}})?)"
    r"(?![^\W_])(?=\s*(?:[.,:;_*—-]|\d|$))",
    re.MULTILINE,
)


def text_features(text: str) -> dict[str, np.ndarray]:
    """Return the features of the M characters of `text` by name, arrays of M booleans or floats.

    A paragraph ends at a blank line or at the end of a document. Sentences, abbreviations and dates
    are those of English.

    inside quotation marks: from an opening mark up to the character before its closing mark, or to
      the end of the paragraph, for “ ” ‘ ’ « » „ “ " and '; apostrophes do not count, nor does a
      single mark that is not closed in its paragraph.
    inside brackets: from (, [ or { up to the character before its closing bracket, or to the end of
      the paragraph.
    capital letter: the character is in upper case.
    before a capital letter: the next character is in upper case.
    start of word: the first character of a word, which has letters, digits and apostrophes.
    end of sentence: the full stop, question or exclamation mark before a character that is not in
      lower case or before the end of the text; not after an abbreviation or an initial.
    diary heading: a date at the beginning of a line, such as '3 May.'.
    position in line: the number of characters since the last line feed, 0 at the line feed.
    position in diary entry: the number of characters since the last diary heading, 0 in a heading
      and before the first one.
    """
    capital_M = np.fromiter((char.isupper() for char in text), bool, len(text))
    heading_M = _spans(text, [match.span("date") for match in HEADING.finditer(text)])
    start_M = _spans(text, [(match.start(), match.start() + 1) for match in WORD.finditer(text)])
    breaks_M = np.fromiter((char in f"\n{END}" for char in text), bool, len(text))
    entry_M = _since(heading_M)
    entry_M[: heading_M.argmax() if heading_M.any() else None] = 0
    return {
        "inside quotation marks": inside_quotations(text),
        "inside brackets": _inside(text, BRACKETS),
        "capital letter": capital_M,
        "before a capital letter": np.append(capital_M[1:], False)[: len(text)],
        "start of word": start_M,
        "end of sentence": _ends_of_sentences(text),
        "diary heading": heading_M,
        "position in line": _since(breaks_M),
        "position in diary entry": entry_M,
    }


def inside_quotations(text: str) -> np.ndarray:
    """Return which of M characters are inside quotation marks, as text_features defines it."""
    text = APOSTROPHE.sub(NEUTRAL, text)
    text = OPENING_SINGLE.sub("‘", OPENING_DOUBLE.sub("“", text))
    text = text.replace('"', "”").replace("'", "’")
    paragraphs = []
    for paragraph in PARAGRAPH_END.split(text):
        closed, mark, rest = paragraph.rpartition("’")
        paragraphs.append(closed + mark + rest.replace("‘", NEUTRAL))
    return _inside("".join(paragraphs), QUOTES)


def _inside(text: str, closing: dict[str, str]) -> np.ndarray:
    """Return which characters are inside pairs of marks, given the closing mark of each."""
    inside = []
    for paragraph in PARAGRAPH_END.split(text):
        awaited: list[str] = []  # the closing marks of the open pairs
        for char in paragraph:
            if char in awaited:
                del awaited[awaited.index(char) :]
            elif char in closing:
                if closing[char] in awaited:  # as in a paragraph that continues a quotation
                    del awaited[awaited.index(closing[char]) :]
                awaited.append(closing[char])
            inside.append(bool(awaited))
    return np.array(inside, bool)


def _ends_of_sentences(text: str) -> np.ndarray:
    places = []
    for match in SENTENCE_END.finditer(text):
        place, following = match.start("mark" if match["mark"] else "wide"), match["next"] or ""
        before = LAST_WORD.findall(text[max(0, place - LONGEST_WORD) : place])[0]
        is_initial = len(before) == 1 and before.isupper() and before != "I"
        is_abbreviated = match["mark"] == "." and (before in ABBREVIATIONS or is_initial)
        if not is_abbreviated and not following.islower():
            places.append(place)
    return _spans(text, [(place, place + 1) for place in places])


def _spans(text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    is_in_M = np.zeros(len(text), bool)
    for start, stop in spans:
        is_in_M[start:stop] = True
    return is_in_M


def _since(is_zero_M: np.ndarray) -> np.ndarray:
    """Return the number of characters since the last one where `is_zero_M` is true.

    Characters before the first one are counted from the beginning, from 1.
    """
    place_M = np.arange(1, len(is_zero_M) + 1)
    return (place_M - np.maximum.accumulate(np.where(is_zero_M, place_M, 0))).astype(float)
