# ruff: noqa: RUF001 (quotation marks are data here)
import numpy as np
import pytest

from charlstm.evaluation.features import text_features

QUOTES, BRACKETS = "inside quotation marks", "inside brackets"


def marked(name, text):
    """Return `text` with '^' in place of the characters that have the feature `name`."""
    feature_M = text_features(text)[name]
    assert feature_M.shape == (len(text),)
    return "".join("^" if has else char for char, has in zip(text, feature_M, strict=True))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a “b” c", "a ^^” c"),
        ("“don’t,” he said", "^^^^^^^” he said"),
        ("“a ‘b’ c” d", "^^^^^^^^” d"),  # nested
        ("‘the boy’s hat’ x", "^^^^^^^^^^^^^^’ x"),
        ("the boys’ hat", "the boys’ hat"),
        ("‘tis so", "‘tis so"),  # not closed
        ('a "b"--"c" d', 'a ^^"--^^" d'),
        ("\"a 'b' c's\" 'tis", "^^^^^^^^^^\" 'tis"),
        ('6" by 9" wide', '6" by 9" wide'),
        ("“a\n\nb", "^^\n\nb"),  # a paragraph ends a quotation
        ("“a\n“b” c", "^^^^^” c"),  # opened again
        ("“a\x03b", "^^\x03b"),  # the end of a document
        ("„a“ b «c» d", "^^“ b ^^» d"),
        ("”", "”"),
    ],
)
def test_quotations_begin_at_a_mark_and_end_before_one(text, wanted):
    assert marked(QUOTES, text) == wanted


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        (BRACKETS, "a (b [c] d) e) f", "a ^^^^^^^^) e) f"),
        (BRACKETS, "a (b\n\nc", "a ^^\n\nc"),
        ("capital letter", "Ab É", "^b ^"),
        ("before a capital letter", "Ab CD", "Ab^^D"),
        ("start of word", "It’s 10 o'clock--_so_", "^t’s ^0 ^'clock--_^o_"),
        ("end of sentence", "Mr. A. Fox ran. So? yes", "Mr. A. Fox ran^ So? yes"),
        ("end of sentence", "“Go!” It was I. “Oh...” I.", "“Go^” It was I^ “Oh..^” I^"),
        ("diary heading", "x\n_3 May. Bistritz._--Left", "x\n_^^^^^. Bistritz._--Left"),
        ("diary heading", "Monday, May 3rd, 1897\nOn\n11 July at dawn", None),
    ],
)
def test_features_of_short_texts(name, text, wanted):
    wanted = wanted or "Monday, ^^^^^^^^^^^^^\nOn\n11 July at dawn"
    assert marked(name, text) == wanted


def test_positions_count_from_a_line_feed_and_a_heading():
    features = text_features("ab\nc\n3 May. d")
    np.testing.assert_array_equal(features["position in line"][:6], [1, 2, 0, 1, 0, 1])
    wanted = [0] * 10 + [1, 2, 3]  # nothing before the first heading
    np.testing.assert_array_equal(features["position in diary entry"], wanted)
    assert not text_features("no heading")["position in diary entry"].any()


@pytest.mark.parametrize("text", ["", "\x00<script>\ud800", "." * 20_000 + "x", "‘" * 20_000])
def test_any_text_has_a_value_for_each_character(text):
    assert {feature_M.shape for feature_M in text_features(text).values()} == {(len(text),)}
