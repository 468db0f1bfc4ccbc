from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.errors import UserError, first_line
from longrope.lengths import format_length, parse_length, parse_lengths


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("4096", 4096),
        ("4k", 4096),
        ("128k", 131072),
        ("2048k", 2097152),
        ("2m", 2097152),
        (" 8K ", 8192),
        ("2M", 2097152),
    ],
)
def test_a_length_is_read_as_people_write_it(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "0k", "-4k", "4.5k", "4kb", "k", "four", "1e5", "4 k", "nan", "9" * 16])
def test_what_is_not_a_length_is_refused(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_length(text)
    expected = f"length: got {text!r}; a length is a positive whole number of tokens, with k for 1024 or m for 1024k; "
    assert str(error.value) == expected + "write it like 4096, 4k, 128k or 2m"


def test_a_list_of_lengths_ascends_and_repeats_nothing() -> None:
    assert parse_lengths("2k,256,1k,2048, 256") == [256, 1024, 2048]


def test_one_wrong_length_in_a_list_is_named() -> None:
    with pytest.raises(UserError, match="got 'x'"):
        parse_lengths("256,x")
    with pytest.raises(UserError, match="got ''"):
        parse_lengths("256,")


@pytest.mark.parametrize(("tokens", "text"), [(131072, "128k"), (300, "300"), (1023, "1023"), (2097152, "2048k")])
def test_a_length_is_written_the_short_way(tokens: int, text: str) -> None:
    assert format_length(tokens) == text


@given(st.integers(min_value=1, max_value=10**12))
def test_a_written_length_is_read_back(tokens: int) -> None:
    assert parse_length(format_length(tokens)) == tokens


def test_a_user_error_is_one_line_of_what_got_rule_and_do() -> None:
    error = UserError("thing", got="this\n  and that", rule="it is\tso", do="do so")
    assert str(error) == "thing: got this and that; it is so; do so"
    assert (error.what, error.got, error.rule, error.do) == ("thing", "this\n  and that", "it is\tso", "do so")
    assert str(error.changed(what="file: thing", do="go")) == "file: thing: got this and that; it is so; go"


def test_the_first_line_of_what_a_library_says_is_never_empty() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
