"""Progress without a terminal: one line a tenth, on stderr."""

import pytest

from videodit.progress import show_progress


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (3, 3), (10, 10), (1000, 11)])
def test_plain_lines(total: int, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("encode clips") as report:
        for done in range(1, total + 1):
            report(done, total)
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines
    assert err.splitlines()[-1] == f"encode clips: {total}/{total}"


def test_nothing_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("encode clips") as report:
        report(0, 0)
    assert capsys.readouterr().err == "encode clips: 0/0\n"
