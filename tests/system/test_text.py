"""Lists of names short enough for an error."""

from bigq.system.text import bytes_text, itemized, shortlist


def test_the_first_ten_and_how_many_more():
    assert shortlist(["a", 1]) == "a, 1"
    assert shortlist(range(12)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


def test_problems_stand_on_lines_of_their_own():
    assert itemized(["a", "b"]) == "\n  - a\n  - b"
    assert itemized(["a", "b"], limit=1) == "\n  - a\n  - and 1 more"


def test_a_name_of_any_length_is_cut():
    assert shortlist(["a" * 10**6, "b"]) == "a" * 500 + "..., b"


def test_numbers_of_bytes():
    cases = {0: "0 bytes", 999: "999 bytes", 1000: "1.00 KB", 786_432: "786 KB", 9_996: "10.0 KB", 99_960: "100 KB"}
    cases |= {999_600: "1.00 MB", 16_060_522_496: "16.1 GB", 141_107_412_992: "141 GB", 2.5e12: "2,500 GB"}
    assert {nbytes: bytes_text(nbytes) for nbytes in cases} == cases
