import click
import pytest

from kiln.cli.units import Duration, IdRange, Size, shown_size, shown_time


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("17", 17), ("1K", 1024), ("2m", 2 << 20), ("3G", 3 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: str, count: int) -> None:
    assert Size().convert(text, None, None) == count


@pytest.mark.parametrize(("text", "seconds"), [("1", 1), ("0.5", 0.5), ("2m", 120), ("6h", 21600), ("1d", 86400)])
def test_times(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1.5", "1KB", "K", "0x10", "\u0661"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


@pytest.mark.parametrize("text", ["", "0", "0s", "-1", "1w", "nan", "inf", "1e3"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


def test_ranges_of_ids() -> None:
    assert IdRange().convert("0x70000000-0x7000ffff", None, None) == (0x70000000, 0x7000FFFF)
    assert IdRange().convert("1000-2000", None, None) == (1000, 2000)
    for text in ("", "1", "2-1", "0-5", "1-4294967295", "1-x"):
        with pytest.raises(click.BadParameter):
            IdRange().convert(text, None, None)


def test_for_people() -> None:
    assert [shown_size(count) for count in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
    assert [shown_time(s) for s in (0.0321, 1.25, 61, 3661)] == ["32 ms", "1.2 s", "1:01", "1:01:01"]
