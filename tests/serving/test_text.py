"""Text of a stream: never taken back, and in the end the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.serving.text import TextStream


class Bytes:
    """A token is a byte."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode(errors="replace")


class Words:
    """A token is a word with a space before it, which is dropped at the beginning of a text."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f" {id}" for id in ids).removeprefix(" ")


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    return [stream.push(id) for id in ids], stream


@given(st.text(alphabet="aé€😀 ", max_size=12))
def test_characters_come_whole(text):
    shown, stream = pieces(Bytes(), text.encode())
    assert "".join(shown) == text and stream.finish(text) == ""
    assert all("\ufffd" not in piece for piece in shown)


def test_spaces_between_words_are_kept():
    assert pieces(Words(), [1, 22, 3])[0] == ["1", " 22", " 3"]


def test_bytes_that_are_no_character_do_not_hold_back_the_rest():
    shown, stream = pieces(Bytes(), b"a\xff\xffbcdef")
    whole = Bytes().decode(b"a\xff\xffbcdef")
    assert "".join(shown) + stream.finish(whole) == whole and "bcdef" in "".join(shown)


@pytest.mark.parametrize(("text", "shown"), [("abc", "a"), ("abd", "abd"), ("ab", "a"), ("bbc", "b"), ("abcx", "abcx")])
def test_what_may_become_a_stop_text_is_held_back(text, shown):
    assert "".join(pieces(Bytes(), text.encode(), ("bcd", "bb!"))[0]) == shown


@given(st.text(alphabet="ab", max_size=20), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_is_never_shown(text, stops):
    found = [text.index(stop) + len(stop) for stop in stops if stop in text]
    end = min(found, default=len(text))
    *before, _ = text[:end].encode() or b"?"
    shown, stream = pieces(Bytes(), before, stops)
    first = min(((text[:end].index(stop), stop) for stop in stops if stop in text[:end]), default=None)
    whole = text[: first[0]] if first else text[:end]
    assert whole.startswith("".join(shown))
    assert "".join(shown) + stream.finish(whole) == whole
