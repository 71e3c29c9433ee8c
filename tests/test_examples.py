from __future__ import annotations

import contextlib
import csv
import difflib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patcher.errors import ExamplesError, PatcherError
from patcher.evaluation import expected_sets
from patcher.examples import MAX_TEXT_BYTES, Examples, data_hash
from patcher.examples_file import read_examples
from patcher.labelled import places_of
from patcher.words import label_words


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("column", ["text", "sentence", "sentece", "Utterance", " QUERY "])
def test_every_spelling_of_the_text_column_is_read(tmp_path, column):
    path = write(tmp_path, "a.csv", f"{column},label\nhello there,greeting\n")
    examples = read_examples(path)
    assert examples.texts == ("hello there",)
    assert examples.labels == ("greeting",)


def test_the_same_examples_come_out_of_every_format(tmp_path):
    rows = [("hello, there", "greeting"), ('say "bye"\nnow', "farewell")]
    quoted = "".join(f'"{t.replace(chr(34), chr(34) * 2)}",{label}\n' for t, label in rows)
    files = {
        "a.csv": "text,label\n" + quoted,
        "a.tsv": "text\tlabel\n" + quoted.replace('",', '"\t'),
        "a.jsonl": "\n".join(json.dumps({"text": t, "label": label}) for t, label in rows),
    }
    read = [read_examples(write(tmp_path, name, content)) for name, content in files.items()]
    assert {(e.texts, e.labels) for e in read} == {(tuple(t for t, _ in rows), tuple(label for _, label in rows))}


def test_a_parquet_column_whose_name_is_no_text(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    # The name occurs in several places (metadata, schema, footer), so it is replaced everywhere.
    parquet.write_table(pa.table({"sentence": ["hello"], "intent": ["greeting"]}), path)
    path.write_bytes(path.read_bytes().replace(b"intent", b"\xb4ntent"))
    with pytest.raises(ExamplesError):
        read_examples(path)


def test_parquet_keeps_to_the_limits(tmp_path, monkeypatch):
    """A few KB may expand to a million texts of a megabyte; no more is read than the limits allow."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, rows = tmp_path / "a.parquet", 5000
    columns = {
        name: arrow.DictionaryArray.from_arrays(arrow.array([0] * rows, arrow.int32()), arrow.array([text]))
        for name, text in (("text", "x" * 1000), ("label", "a"), ("unread", "y" * 1000))
    }
    parquet.write_table(arrow.table(columns), path)
    assert path.stat().st_size < 10_000
    assert len(read_examples(path)) == rows
    monkeypatch.setattr("patcher.examples_file.MAX_FILE_BYTES", 100_000)
    with pytest.raises(ExamplesError, match=r"line 101: more than 100,000 bytes of texts so far"):
        read_examples(path)
    monkeypatch.setattr("patcher.examples_file.MAX_EXAMPLES", rows - 1)
    with pytest.raises(ExamplesError, match=r"5,000 rows; expected at most 4,999"):
        read_examples(path)


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"sentence": ["hello", "bye"], "intent": ["greeting", "farewell"]}), path)
    examples = read_examples(path)
    assert (examples.texts, examples.labels) == (("hello", "bye"), ("greeting", "farewell"))


def test_lines_are_those_an_editor_shows(tmp_path):
    path = write(tmp_path, "a.csv", 'text,label\n"two\nlines",x\nnext,x\n')
    assert read_examples(path).lines == (2, 4)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "\n", "no text column"),
        ("a.csv", "text;label\nhello, you;x\n", "separated by semicolons: use commas"),
        ("a.csv", "text\tlabel\nhello\tx\n", "separated by tabs: use commas, or end the name in .tsv"),
        ("a.tsv", "label,text\nx,hello\n", "separated by commas: use tabs$"),
        ("a.csv", "where is my card,card_lost\nit is gone,card_lost\n", "names missing"),
        ("a.csv", "words,label\nhello,x\n", "content$"),
        ("a.json", '[{"text": "hello"}]', "one object per line"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.csv", "words,label\nhello,x\n", "found 'words', 'label'; expected one named text"),
        ("a.csv", "text,label\nhello,x\nworld\n", "line 3: 1 fields, expected 2"),
        ("a.csv", 'text,label\nhello,x\n"cut off in the mid', "line 3: .*cut off"),
        ("a.csv", "text,label\nhello,x\ntext,label\nbye,y\n", "line 3: the line with the column names again"),
        ("a.csv", "text,label\n   ,x\n", "line 2: the text is empty"),
        ("a.csv", "text,label\nhello,\n", "line 2: the label is empty"),
        ("a.csv", "text,label\nhello,a\tb\n", r"line 2: the label .* has an unprintable character \(U\+0009\)"),
        ("a.csv", "text,label\nhello,a\u202eb\n", r"line 2: the label .* has an unprintable character \(U\+202E\)"),
        ("a.csv", "text,label\nhello,ab\u200c\n", r"line 2: the label .* has an unprintable character \(U\+200C\)"),
        ("a.jsonl", '{"text": "hello", "label": " a"}', "line 1: the label ' a' has spaces around it$"),
        ("a.csv", "text,label\nhel\0lo,x\n", "line 2: a NUL byte"),
        ("a.csv", b"text,label\nhello,x\nna\xefve,x\n", "line 3: not UTF-8"),
        ("a.csv", f"text,label\n{'a' * (MAX_TEXT_BYTES + 1)},x\n", "line 2: the text has 1,048,577 bytes"),
        ("a.jsonl", '{"text": "hello"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", '["hello"]', "line 1: expected an object, got list"),
        ("a.jsonl", '{"text": 3}', "line 1: expected a text, got int"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', "line 1: expected a label, got float"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}', "line 2: no label"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b", "label": "x"}', "line 1: no label, although line 3 has one"),
        ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": null}', "line 1: the label is null"),
        ("a.csv", "Text,text,label\na,b,x\n", "a.csv has 2 columns of the same name, 'Text', 'text'"),
        ("a.csv", "text,label, Label\na,x,y\n", "2 columns of the same name, 'label', 'Label'"),
        ("a.jsonl", '{"text": "a", "label": "x", "label": "y"}', "line 1: an object has 'label' more than once"),
        (
            "a.jsonl",
            '[\n{"text": "a"},\n{"text": "b"}\n]',
            "line 1: not JSON .*one object per line, not a list of them",
        ),
        ("a.jsonl", '[{"text": "a"}, {"text": "b"}]', "line 1: expected an object, got list; .*, not a list of them"),
        ("a.csv.gz", b"\x1f\x8b\x08", "ending '.gz'; .*: unpack it first .`gunzip FILE`"),
        ("a.csv", b"\x1f\x8b\x08\0", "is compressed .gzip., whatever its name; unpack it first"),
        ("a.csv", "text,label\nhello,x\n".encode("utf-16"), "in UTF-16; save it as UTF-8 .*`iconv -f UTF-16 -t UTF-8"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-be"), "in UTF-16; save it as UTF-8"),
        ("a.csv", "sep=,\ntext,label\nhello,x\n", "which tells Excel the separator, is no header: remove it"),
        ("a.csv", "sep=;\ntext;label\nhello;x\n", "which tells Excel the separator, is no header: remove it"),
        (
            "a.csv",
            "text,label,label_text,Label_Text\na,0,x,y\n",
            "2 columns of the same name, 'label_text', 'Label_Text'",
        ),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: the text is not valid Unicode"),
        ("a.csv", "text,lable\nhello,x\n", "a.csv has a column 'lable'; did you mean 'label'"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "intents": "x"}', "line 2 has a column 'intents'"),
        ("a.jsonl", '{"text": "hello", "intents": "x"}', "line 1 has a column 'intents'; did you mean 'intent'"),
        ("a.csv", b"PK\x03\x04\x14\xff", "an Excel file"),
        ("a.txt", "text,label\nhello,x\n", "a.txt looks like a table: .*rename it to end in .csv"),
        ("a.txt", "label\tsentence\r\nx\thello\n", "a.txt looks like a table: .*rename it to end in .tsv"),
        ("a.xlsx", "text", "ending '.xlsx'.*save the spreadsheet as CSV"),
        ("texts", "text", "the name has no ending; expected .csv"),
        ("a.parquet", "PAR1 not really", "Parquet"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ExamplesError, match=message):
        read_examples(write(tmp_path, name, content))


def test_columns_that_are_neither_texts_nor_labels_are_told(tmp_path):
    examples = read_examples(write(tmp_path, "a.csv", "id,text,lables,label\n7,hello,greetings,x\n"))
    assert (examples.labels, examples.unread) == (("x",), ("id", "lables"))
    assert read_examples(write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": "b", "id": 7}')).unread == ("id",)


def test_columns_are_looked_at_once_for_all_lines_that_have_them(tmp_path, monkeypatch):
    compared, close = [], difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda *args: compared.append(args[0]) or close(*args))
    lines = [{"text": "a", "id": 1}, {"id": 1, "text": "a", "user": "b"}] * 20
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_examples(path).unread == ("id", "user")
    assert sorted(compared) == ["id", "id", "user"]


def test_a_space_after_each_comma_is_part_of_no_field(tmp_path):
    path = write(tmp_path, "a.csv", 'text, label\n"hello, you", greeting\nbye, "farewell"\n')
    examples = read_examples(path)
    assert (examples.texts, examples.labels) == (("hello, you", "bye"), ("greeting", "farewell"))
    with pytest.raises(ExamplesError, match="line 2: the label ' x' has spaces around it"):
        read_examples(write(tmp_path, "b.csv", "text,label\nhello, x\n"))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "ids, taken, unread",
    [
        ((7, 0, 7), ("music", "alarm", "music"), ("id",)),
        ((7, -1, 7), ("music", "alarm", "music"), ("id",)),
        ((7.0, 0.0, 7.0), ("music", "alarm", "music"), ("id",)),
        ((7, "new", 7), ("7", "new", "7"), ("label_text", "id")),
    ],
)
def test_where_the_labels_are_ids_their_names_are_read(tmp_path, ids, taken, unread, ending):
    columns = {"text": ["a", "b", "c"], "label": ids, "label_text": ["music", "alarm", "music"], "id": [1, 2, 3]}
    rows, path = list(zip(*columns.values(), strict=True)), tmp_path / f"a.{ending}"
    if ending == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns["label"] = list(ids if all(isinstance(each, (int, float)) for each in ids) else map(str, ids))
        parquet.write_table(arrow.table(columns), path)
    elif ending == "csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)))
    else:
        path.write_text("\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    examples = read_examples(path)
    assert (examples.labels, examples.unread) == (taken, unread)


def test_an_id_without_a_name_is_said_with_its_line(tmp_path):
    rows = [{"text": "a", "label": 7, "label_text": "x"}, {"text": "b", "label": 0, "label_text": None}]
    with pytest.raises(ExamplesError, match="line 2: no name for the label 0, although other lines have one"):
        read_examples(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))))
    named = [{**row, "label": f"is {row['label']}"} for row in rows]
    assert read_examples(write(tmp_path, "b.jsonl", "\n".join(map(json.dumps, named)))).labels == ("is 7", "is 0")


def test_a_column_of_label_names_alone_is_the_label_column(tmp_path):
    assert read_examples(write(tmp_path, "a.csv", "text,label_name\nhello,x\n")).labels == ("x",)


@pytest.mark.parametrize(
    "names, labels, expected",
    [
        (["alarm", "music"], [1, 0], ("music", "alarm")),
        (["alarm", "music"], ["1", "0"], ("1", "0")),
        ("alarm", [1, 0], ("1", "0")),
        (None, [1, 0], ("1", "0")),
        (["alarm", "music"], [1, -1], "line 2: no label has the id -1; expected 0 to 1"),
        (["alarm", "music"], [2, 0], "line 1: no label has the id 2; expected 0 to 1"),
    ],
)
def test_the_names_that_hugging_face_gives_to_ids_in_parquet_are_read(tmp_path, names, labels, expected):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": ["a", "b"], "label": labels})
    feature = {"dtype": "int64", "_type": "Value"} if names is None else {"names": names, "_type": "ClassLabel"}
    features = {"text": {"dtype": "string", "_type": "Value"}, "label": feature}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet")
    if isinstance(expected, tuple):
        assert read_examples(tmp_path / "a.parquet").labels == expected
    else:
        with pytest.raises(ExamplesError, match=expected):
            read_examples(tmp_path / "a.parquet")


def test_columns_of_numpy_are_read():
    examples = Examples(np.array(["a", "b"]), np.array([5, 6]))
    assert (examples.texts, examples.labels) == (("a", "b"), ("5", "6"))
    assert Examples(("a",), np.array(["x"])).labels == ("x",)
    with pytest.raises(ExamplesError, match="expected a label, got bool"):
        Examples(("a",), np.array([True]))


def test_a_label_that_names_none_is_refused_for_several(tmp_path):
    examples = read_examples(write(tmp_path, "a.csv", "text,label\na,x|y\nb,|\n"))
    head = SimpleNamespace(exclusive=False)
    for read in (
        lambda: examples.by_label(several=True),
        lambda: examples.once(several=True),
        lambda: places_of(examples, len, several=True),
    ):
        with pytest.raises(ExamplesError, match=r"a\.csv, line 3: the label '\|' names no label"):
            read()
    with pytest.raises(ExamplesError, match=r"text 2: the label '\|' names no label"):
        expected_sets(head, examples.labels)
    assert examples.by_label() == {"x|y": ["a"], "|": ["b"]}


@pytest.mark.parametrize("label", ["x\u200d|y", "x|\u200cy", "x\u200d|"])
def test_each_of_several_labels_is_checked(tmp_path, label):
    examples = read_examples(write(tmp_path, "a.csv", f"text,label\na,x\nb,{label}\nc,a\u200db|c\n"))
    with pytest.raises(ExamplesError, match=r"a\.csv, line 3: the label '.*' has an unprintable character \(U\+200"):
        examples.labels_of_each(several=True)
    assert examples.part([0, 2]).labels_of_each(several=True) == [("x",), ("a\u200db", "c")]


def test_a_null_label_in_parquet_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a", "b"], "label": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(ExamplesError, match="line 2: the label is null"):
        read_examples(tmp_path / "a.parquet")


@pytest.mark.parametrize("label", ["x", ""])
def test_long_fields_are_read_and_the_limit_of_the_process_stays(tmp_path, label):
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f"text,label\n{'a' * (before + 1)},{label}\n")
    with contextlib.nullcontext() if label else pytest.raises(ExamplesError):
        assert len(read_examples(path)) == 1
    assert csv.field_size_limit() == before


def test_a_text_with_a_comma_is_no_header(tmp_path):
    path = write(tmp_path, "a.txt", "Question, how do I pay?\nMessage\n")
    assert read_examples(path).texts == ("Question, how do I pay?", "Message")


def test_no_such_file(tmp_path):
    with pytest.raises(ExamplesError, match="No such file"):
        read_examples(tmp_path / "none.csv")
    with pytest.raises(ExamplesError, match="No such file"):
        read_examples(tmp_path / "none")


@given(data=st.binary(max_size=300), ending=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]))
def test_any_bytes_are_read_or_refused_in_words(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"fuzz{ending}"
    path.write_bytes(data)
    try:
        assert len(read_examples(path)) > 0
    except PatcherError as error:
        assert str(path) in str(error)


def test_the_data_hash_tells_texts_from_labels():
    assert data_hash(["ab"], ["c"]) != data_hash(["a"], ["bc"])
    assert data_hash(["ab"], ["c"]) == data_hash(("ab",), ("c",))


@pytest.mark.parametrize(
    "label, words",
    [
        ("card_lost", "card lost"),
        ("rollover_401k", "rollover 401k"),
        ("HowBusy", "how busy"),
        ("größe-ändern", "größe ändern"),
        ("LABEL_12", None),
        ("17", None),
        ("c3", None),
        ("other", None),
    ],
)
def test_a_label_is_words_or_a_code(label, words):
    assert label_words(label) == words
