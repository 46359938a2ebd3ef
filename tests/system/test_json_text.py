"""What JSON says, which keys it gives twice, and what is no JSON."""

import pytest

from bigq.system.json_text import parse_json


def test_keys_given_twice_are_named_wherever_they_are():
    assert parse_json(b'{"a": {"b": 1, "b": 2}, "c": [{"d": 1, "d": 2, "d": 3}], "e": {"b": 1}}') == (
        {"a": {"b": 2}, "c": [{"d": 3}], "e": {"b": 1}},
        ["b", "d"],
    )
    assert parse_json(b'{"a": 1, "b": {"a": 1}}') == ({"a": 1, "b": {"a": 1}}, [])


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1}}', b"1" * 5000], ids=lambda t: t[:9])
def test_what_is_no_json(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
