import argparse

import pytest

from services.options import between, seconds, size


@pytest.mark.parametrize(
    ("text", "bytes_"), [("4096", 4096), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2 TiB", 2 << 40)]
)
def test_sizes_may_carry_a_binary_unit(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "0", "-1", "1GB", "0.1", "GiB", "1e9", "1.5.2MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"such as 512MiB or 1.5GiB, got '{text}'"):
        size(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "soon"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"seconds above 0, got '{text}'"):
        seconds(text)


@pytest.mark.parametrize("text", ["", "0", "5", "-1", "1.5", "²", "one"])
def test_numbers_out_of_range_are_refused_with_the_range(text: str) -> None:
    assert between(1, 4)("4") == 4
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be from 1 to 4, got '{text}'"):
        between(1, 4)(text)
