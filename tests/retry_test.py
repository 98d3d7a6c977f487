"""A read that fails for a moment is repeated and counted; other errors are raised at once."""

import errno

import pytest
import tenacity

from ctxjax.data import records
from ctxjax.host import retry


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses that were asked for; none is made."""
    made = []
    monkeypatch.setattr(tenacity.nap.time, "sleep", made.append)
    monkeypatch.setattr(retry, "counts", type(retry.counts)())
    return made


def failing(times: int, error: Exception):
    calls = iter(range(times + 1))

    def read():
        if next(calls) < times:
            raise error
        return "read"

    return read


STALE = OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("times", [0, 1, 3])
def test_transient_errors_are_followed_by_another_attempt(times, pauses, capsys):
    assert retry.retry(failing(times, STALE), "the file") == "read"
    assert retry.counts["the file"] == times == len(pauses)
    assert all(2**place <= pause <= 2**place + 1 for place, pause in enumerate(pauses))
    assert capsys.readouterr().err.count("warning: the file: OSError: [Errno 116] Stale file handle; trying") == times


def test_after_the_last_attempt_the_error_is_the_callers(pauses):
    with pytest.raises(OSError, match="Stale"):
        retry.retry(failing(9, STALE), "the file")
    assert retry.counts["the file"] == len(pauses) == retry.ATTEMPTS - 1


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "no"), PermissionError(errno.EACCES, "no"), ValueError()]
)
def test_other_errors_are_not_tried_again(error, pauses):
    with pytest.raises(type(error)):
        retry.retry(failing(1, error), "the file")
    assert not pauses and not retry.counts


def test_a_data_file_is_read_again_after_a_transient_error(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    trouble = failing(2, STALE)

    def shaky(file):
        yield "line 1", "one"
        trouble()
        yield "line 2", "two"

    monkeypatch.setitem(records.READERS, ".txt", shaky)
    found = records.Reader(records.RecordsConfig()).read(path)
    assert [record.value for record in found] == ["one", "two"] and retry.counts[f"data file {path}"] == 2
