"""Results as text for a terminal and as a page of the documentation."""

from collections.abc import Mapping, Sequence

from bench.measure import Ratio, Result

_HOW = (
    "All sides of a table took turns in one run: every round ran each side once, after one round that does not count. "
    "A ratio is the median over the rounds of the two times of one round: below 1 is faster than the peer, and only "
    "ratios count where the machine is not quiet. Files lay in memory (tmpfs) on all sides. An aim stands beside the "
    "ratio it is for."
)
_HEAD = ("side", "median", "least", "time as a multiple of")


def as_text(result: Result) -> str:
    """One benchmark's table, in columns."""
    cells = [_HEAD, *_cells(result)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = [
        "  ".join(
            (cell.rjust if column in {1, 2} else cell.ljust)(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([_title(result), *lines, *result.remarks]) + "\n"


def as_page(results: Sequence[Result], facts: Mapping[str, str], command: str) -> str:
    """The page: how it was measured, on what, and all tables."""
    parts = [
        "# Benchmarks\n",
        f"Written by `{command}`; do not edit. {_HOW}\n",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n",
    ]
    for result in results:
        rows = ["| " + " | ".join(_HEAD) + " |", "| --- | ---: | ---: | --- |"]
        rows += ["| " + " | ".join(row) + " |" for row in _cells(result)]
        parts += [f"## {_title(result)}\n", "\n".join(rows) + "\n"]
        parts += [f"{remark}\n" for remark in result.remarks]
    return "\n".join(parts)


def _title(result: Result) -> str:
    return f"{result.benchmark.title} ({result.benchmark.unit})"


def _cells(result: Result) -> list[tuple[str, ...]]:
    unit = result.benchmark.unit_s
    return [
        (row.name, f"{row.median_s / unit:.2f}", f"{row.least_s / unit:.2f}", "; ".join(map(_ratio, row.ratios)))
        for row in result.rows
    ]


def _ratio(ratio: Ratio) -> str:
    aim = "" if ratio.to.at_most is None else f" (aim: {ratio.to.at_most:g})"
    return f"{ratio.to.name}: {ratio.value:.2f}{aim}"
