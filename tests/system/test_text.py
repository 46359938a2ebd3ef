"""Lists of names short enough for an error."""

from bigq.system.text import shortlist


def test_the_first_ten_and_how_many_more():
    assert shortlist(["a", 1]) == "a, 1"
    assert shortlist(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_a_name_of_any_length_is_cut():
    assert shortlist(["a" * 10**6, "b"]) == "a" * 500 + "..., b"
