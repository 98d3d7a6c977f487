"""Data files are read row by row; what is wrong with a row is said with its place, or counted."""

import csv
import itertools
import json

from hypothesis import given, settings, strategies as st
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxjax.data import records
from ctxjax.data.grading.graders import GRADERS
from ctxjax.data.records import KINDS, Reader, RecordsConfig, read_context

GOOD = [{"q": f"{n} + 1?", "a": f"{n + 1}"} for n in range(5)]


def texts(path, **changes) -> tuple[list[list[str]], dict]:
    """The (question, answer) texts of a file, and the counts of what was left out."""
    reader, seen = Reader(RecordsConfig(**changes)), {}
    found = [(record, reader.get_texts(record, "q", "a")) for record in reader.read(path)]
    kept = [pair for record, pair in found if pair and reader.is_new(record, seen, *pair)]
    return kept, dict(reader.skipped)


def jsonl(path, rows, ending="\n"):
    path.write_bytes(b"".join(json.dumps(row).encode() + ending.encode() for row in rows))
    return path


def write(folder, kind: str, rows: list[dict]):
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["q", "a"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        jsonl(path, rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "ndjson", "parquet", "csv", "tsv"])
def test_every_format_gives_the_same_texts(tmp_path, kind):
    rows = [*GOOD, {"q": 'two\nlines, "quoted" and ünïcode', "a": "x"}]
    kept, skipped = texts(write(tmp_path, kind, rows))
    assert kept == [[row["q"], row["a"]] for row in rows] and skipped == {}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_limit_reads_the_first_rows_only(tmp_path, kind):
    reader = Reader(RecordsConfig())
    assert len(list(reader.read(write(tmp_path, kind, GOOD), limit=2))) == 2


def test_rows_are_read_one_after_the_other_and_never_all_at_once(tmp_path, monkeypatch):
    endless = ((f"line {n}", {"q": str(n)}) for n in itertools.count(1))
    monkeypatch.setitem(records.READERS, ".jsonl", lambda file: endless)
    found = Reader(RecordsConfig()).read(write(tmp_path, "jsonl", GOOD))
    assert [record.value["q"] for record in itertools.islice(found, 5)] == ["1", "2", "3", "4", "5"]


def test_repeats_do_not_count_towards_the_limit_of_rows_left_out(tmp_path):
    reader = Reader(RecordsConfig(max_skipped=1))
    for _ in range(102):
        reader.reject("duplicate", "line 2", "the same as line 1")
    assert reader.skipped == {"duplicate": 102}


def test_a_byte_order_mark_empty_lines_and_windows_line_ends_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in GOOD))
    assert len(texts(path)[0]) == 5
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfq;a\r\n\r\nwhat, now?;1\r\n")
    assert texts(path)[0] == [["what, now?", "1"]]


BROKEN = {
    "unreadable": [
        (b'{"q": "x", "a": \n', "line 6: not valid JSON"),
        (b'{"q": "x", "a": "1', r"line 6: not valid JSON: .* \(the file ends here: is it complete\?\)"),
        (b'{"q": "\xff", "a": "1"}\n', "line 6: not UTF-8 text"),
        (b'{"q": ' + b"9" * 5000 + b"}\n", "line 6: not valid JSON"),
        (b"[" * 100_000 + b"\n", "line 6: not valid JSON"),
        (rb'{"q": "\ud800", "a": "1"}' + b"\n", "line 6: no text in column 'q' that is valid Unicode"),
    ],
    "missing": [
        (b'{"a": "1"}\n', r"line 6: no text in column 'q'; its columns are \['a'\]"),
        (b'{"q": null, "a": "1"}\n', r"no text in column 'q'; its columns are \['a', 'q'\]"),
        (b'{"q": " ", "a": "1"}\n', "no text in column 'q'; it is empty"),
        (b"{}\n", r"its columns are \[\]"),
    ],
    "not_text": [
        (b'{"q": 7, "a": "1"}\n', "no text in column 'q', but int 7"),
        (b'{"q": ["x"], "a": "1"}\n', r"no text in column 'q', but list \['x'\]"),
        (b'{"q": "x", "a": NaN}\n', "no text in column 'a', but float nan"),
        (b"[1, 2]\n", "line 6: no text in column 'q'; the row is not an object"),
        (b"null\n", "the row is not an object"),
    ],
    "huge": [
        (b'{"q": "' + b"x" * 10_000_000 + b'", "a": "1"}\n', "10000000 characters are more than records.max_text")
    ],
    "duplicate": [(json.dumps(GOOD[1]).encode() + b"\n", "line 6: the same as line 2")],
    "conflict": [(b'{"q": "1 + 1?", "a": "3"}\n', "line 6: the same as line 2, with another answer")],
}


@pytest.mark.parametrize(
    ("kind", "line", "message"), [(kind, *case) for kind, cases in BROKEN.items() for case in cases], ids=lambda x: ""
)
def test_a_bad_row_is_an_error_with_its_place_or_is_left_out_and_counted(tmp_path, kind, line, message):
    path = jsonl(tmp_path / "a.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(ValueError, match=message) as error:
        texts(path, skip=())
    assert str(path) in str(error.value) and f"--config.records.skip=\"('{kind}',)\"" in str(error.value)
    assert texts(path, skip=(kind,)) == ([[row["q"], row["a"]] for row in GOOD], {kind: 1})
    with pytest.raises(ValueError, match=message):
        texts(path, skip=tuple(KINDS.keys() - {kind}))


def test_more_bad_rows_than_the_limit_are_an_error_with_the_counts(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [*GOOD, {"q": None}, {"q": 1}, {"q": 2}])
    assert texts(path, skip=("missing", "not_text"), max_skipped=3)[1] == {"missing": 1, "not_text": 2}
    with pytest.raises(ValueError, match=r"line 8: .*3 rows are left out \(missing 1, not_text 2\), more than .* = 2"):
        texts(path, skip=("missing", "not_text"), max_skipped=2)
    path = jsonl(tmp_path / "b.jsonl", [{"q": "1234567?", "a": "8"}, {"q": "12345678?", "a": "9"}])
    assert texts(path, skip=("huge",), max_text=8) == ([["1234567?", "8"]], {"huge": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'q,a\nx,1\n"y,2\n', "line 3: not valid CSV: unexpected end of data"),
        (b"q,a\nx,1\ny,2,3\n", "line 3: not valid CSV: 3 fields, but the header names 2"),
        (b"q,a\nx,1\n\xff,2\n", "line 3: no text in column 'q' that is valid Unicode"),
        (b"q,a\nx,1\n,2\n", "line 3: no text in column 'q'; it is empty"),
        (b"q,q\nx,1\n", "the header names a column twice"),
        (b"q,a\n", "has no rows"),
        (b"", "has no rows"),
    ],
)
def test_a_bad_row_of_a_csv_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(path)


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_the_floats_of_a_parquet_file_are_the_decimals_that_were_stored(tmp_path, kind):
    path, nested = tmp_path / "a.parquet", pa.struct([("one", kind), ("some", pa.list_(kind)), ("text", pa.string())])
    inner = [{"one": 0.1, "some": [0.3, None], "text": "0.7"}, None, {"one": None, "some": None, "text": None}]
    table = {"a": pa.array([0.1, None, -2.5], kind), "b": pa.array(inner, nested)}
    table["c"] = pa.array([[{"one": 0.1, "some": [], "text": ""}], [], None], pa.list_(nested))
    pq.write_table(pa.table(table), path)
    rows = [record.value for record in Reader(RecordsConfig()).read(path)]
    assert [row["a"] for row in rows] == [0.1, None, -2.5] and [row["b"] for row in rows] == inner
    assert [row["c"] for row in rows] == [[{"one": 0.1, "some": [], "text": ""}], [], None]
    for grading in ("numeric", "short", "math"):
        grader = GRADERS[grading]
        assert grader.grade("#### 0.1", grader.read_reference(rows[0]["a"])).correct


def test_the_largest_and_smallest_floats_of_a_parquet_file_are_read(tmp_path):
    pq.write_table(
        pa.table({"a": pa.array([float("inf"), 3e38, 1e-45, 16777216.0], pa.float32())}), tmp_path / "a.parquet"
    )
    rows = [record.value["a"] for record in Reader(RecordsConfig()).read(tmp_path / "a.parquet")]
    assert rows == [float("inf"), 3e38, 1e-45, 16777216.0]


def test_a_bad_row_of_a_parquet_file_is_named_and_the_others_are_read(tmp_path):
    raw = pa.array([b"x", b"\xff", b"z"], pa.binary())
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"q": column, "a": pa.array(["1", "2", None])}), path)
    with pytest.raises(ValueError, match=r"a.parquet, row 2: column 'q': .*can't decode"):
        texts(path)
    assert texts(path, skip=("unreadable", "missing")) == ([["x", "1"]], {"unreadable": 1, "missing": 1})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet cannot be read"):
        texts(path)


def test_lines_of_a_text_file_keep_their_places(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\nthree\r\n")
    assert [record.value for record in Reader(RecordsConfig()).read(path)] == ["one", "", "three"]


def test_a_column_inside_a_column_is_found_by_its_path(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": {"text": "x", "n": {"m": "y"}}, "q.text": "z"}])
    reader = Reader(RecordsConfig())
    [record] = reader.read(path)
    assert reader.get_texts(record, "q.n.m", "q.text") == ["y", "z"]  # a column's own name goes first
    with pytest.raises(ValueError, match="no text in column 'q.n.k'"):
        reader.get_texts(record, "q.n.k")


@pytest.mark.parametrize("name", ["a.xlsx", "a"])
def test_an_unknown_ending_is_named_with_those_that_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=r"is not known; set qa_jsonl.path to a .*\.parquet.* or \.txt"):
        Reader(RecordsConfig()).read(tmp_path / name, field="qa_jsonl.path")


def test_a_context_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfThink.\n")
    assert read_context(str(tmp_path / "c.txt")) == "Think."
    with pytest.raises(ValueError, match="is a folder"):
        read_context(str(tmp_path))
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_context(str(tmp_path / "c.txt"))


@pytest.mark.parametrize(
    "text", ["First.\n\nSecond.", "a\n \n\n\n# b\n\n    indented\n\nc", "one line", "x" * 70_000 + "\n\ny"]
)
def test_a_context_file_is_read_whole(tmp_path, text):
    (tmp_path / "c.txt").write_text(f"\n\n{text}\n\n")
    assert read_context(str(tmp_path / "c.txt")) == text


def test_every_kind_has_a_case():
    assert BROKEN.keys() == records.KINDS.keys() - {"label"}  # what a label may be is for the tasks to say


# --- Any bytes, any values ---

FREE = RecordsConfig(skip=tuple(KINDS), max_skipped=1000)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("qax"), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(kind=st.sampled_from(sorted(records.READERS)), content=st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_value_error_that_names_the_file(folder, kind, content):
    path = folder / f"any{kind}"
    path.write_bytes(content)
    reader = Reader(FREE)
    try:
        for record in reader.read(path):
            found = reader.get_texts(record, "q", "a")
            assert found is None or all(isinstance(text, str) and text.strip() for text in found)
    except ValueError as error:
        assert str(path) in str(error)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(values=st.lists(VALUES, min_size=1, max_size=6))
def test_of_any_json_the_texts_are_kept_and_the_rest_is_counted(folder, values):
    path = jsonl(folder / "any.jsonl", values)
    reader = Reader(FREE)
    found = [reader.get_texts(record, "q") for record in reader.read(path)]
    good = [v["q"] for v in values if isinstance(v, dict) and isinstance(v.get("q"), str) and v["q"].strip()]
    assert [texts[0] for texts in found if texts] == good
    assert reader.skipped.total() == len(values) - len(good)
    try:
        texts(path)
    except ValueError as error:
        assert f"{path}, line " in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")
