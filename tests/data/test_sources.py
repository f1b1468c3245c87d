import gzip
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.data import sources
from jaxrl_llm.data.arrow import ArrowRows
from jaxrl_llm.data.files import read_json_lines
from jaxrl_llm.data.messages import check_messages, tools_of
from jaxrl_llm.data.sources import TfdsSource, open_source

ROWS = [{"prompt": "1+1=", "answer": 2}, {"prompt": "é", "answer": None, "tags": ["a", "b"]}]


def write_lines(path, lines):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return path


def contents(source):
    return [dict(source[index]) for index in range(len(source))]


# --- files ---


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("as_text", [True, False])
def test_json_lines(tmp_path, name, as_text):
    path = write_lines(tmp_path / name, [json.dumps(ROWS[0]), "", "  ", json.dumps(ROWS[1]), ""])
    assert contents(open_source(str(path) if as_text else path)) == ROWS


def test_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b\xe2\x80\xa8c"}\r\n')
    assert read_json_lines(path) == [{"prompt": "a"}, {"prompt": "b\u2028c"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1', r":3: not valid JSON \(Unterminated string.*, column 12\): \{\"prompt\": \"1"),
        ("[1, 2]", r":3: expected an object .* got list: \[1, 2\]"),
        ('"text"', r":3: expected an object .* got str"),
    ],
)
def test_bad_line_is_named(tmp_path, name, line, message):
    path = write_lines(tmp_path / name, ['{"prompt": "a"}', "", line, '{"prompt": "b"}'])
    with pytest.raises(ValueError, match=name + message):
        open_source(path)


def test_long_bad_line_is_cut(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", ["x" * 5000])
    with pytest.raises(ValueError, match=r"x{200}…$"):
        open_source(path)


def test_damaged_files(tmp_path):
    not_text = tmp_path / "a.jsonl"
    not_text.write_bytes(b'{"prompt": "\xff"}')
    cut = tmp_path / "b.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps({"prompt": "abc" * 1000}).encode())[:-12])
    not_gzip = tmp_path / "c.jsonl.gz"
    not_gzip.write_bytes(b'{"prompt": "a"}')
    not_parquet = tmp_path / "d.parquet"
    not_parquet.write_bytes(b"no parquet at all")
    for path in (not_text, cut, not_gzip, not_parquet):
        with pytest.raises(ValueError, match=f"{path} could not be read"):
            open_source(path)


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS, schema=pyarrow.schema(
        [("prompt", pyarrow.string()), ("answer", pyarrow.int64()), ("tags", pyarrow.list_(pyarrow.string()))]
    )), path)  # fmt: skip
    source = open_source(path)
    assert isinstance(source, ArrowRows)  # held as columns
    assert contents(source) == [{**ROWS[0], "tags": None}, ROWS[1]]


def test_missing_file_names_what_is_near(tmp_path):
    for name in ("test.jsonl", "train.jsonl", "notes.txt"):
        (tmp_path / name).write_text('{"a": 1}\n')
    with pytest.raises(FileNotFoundError) as caught:
        open_source(tmp_path / "trian.jsonl")
    message = str(caught.value)
    assert f"no data file {tmp_path / 'trian.jsonl'}" in message
    assert f"files near it: {tmp_path / 'train.jsonl'}, {tmp_path / 'test.jsonl'} " in message
    assert "notes.txt" not in message
    with pytest.raises(FileNotFoundError, match=f"near it: {tmp_path / 'train.jsonl'}"):
        open_source(tmp_path / "no" / "such" / "train.jsonl")


def test_missing_file_in_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"none in {tmp_path}"):
        open_source(tmp_path / "a.jsonl")


def test_relative_name_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no data file openai/gsm8k; .* none in {tmp_path} .*hf:NAME"):
        open_source("openai/gsm8k")


def test_unknown_ending_and_folder(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"rows\.tsv has an unknown ending; known are \.jsonl"):
        open_source(path)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(ValueError, match=r"is a folder; name one file of it: .*train\.jsonl"):
        open_source(tmp_path)


def test_empty_data_sets(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), tmp_path / "e.parquet")
    for spec in (write_lines(tmp_path / "e.jsonl", ["", ""]), tmp_path / "e.parquet"):
        with pytest.raises(ValueError, match=f"{spec} has no rows"):
            open_source(spec)
    with pytest.raises(ValueError, match="the given list has no rows"):
        open_source([])


# --- JSON, CSV ---


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps({"data": ROWS, "version": "1", "tags": ["x"]}, indent=2),
        "\n".join(json.dumps(row) for row in ROWS) + "\n",
    ],
)
def test_json_files(tmp_path, text):
    (tmp_path / "rows.json").write_text("\ufeff" + text)
    assert contents(open_source(tmp_path / "rows.json")) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"train": [{"a": 1}], "test": [{"a": 2}]}', r"the lists of rows \['train', 'test'\]; write one array"),
        ('{"prompt": {"0": "a"}}', r"no list of rows under \['prompt'\]"),
        ('[{"a": 1}, 2]', "row 1 is a int, not an object: 2"),
        ('"a"', "expected an array of objects, got str"),
        ('[{"a": 1},\n {"a": ]', r"not valid JSON \(Expecting value, line 2, column 8\)"),
    ],
)
def test_json_that_is_no_rows(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json.*" + message):
        open_source(tmp_path / "rows.json")


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("NaN", "NaN is no number of JSON; write null"),
        ('{"x": [-Infinity]}', "-Infinity is no number of JSON"),
        ("1e999", "1e999 is beyond the numbers that can be held"),
        ("9" * 5000, "an integer of 5000 digits is beyond those that can be read; write it as text"),
        ('1, "answer": 2', "the entry 'answer' is there twice"),
        ('{"b": 1, "c": 2, "b": 1}', "the entry 'b' is there twice"),
        ("[" * 20000 + "]" * 20000, "nested too deep to be read"),
        ('{"a":' * 20000 + "1" + "}" * 20000, "nested too deep to be read"),
    ],
)
def test_json_that_cannot_be_meant(tmp_path, ending, value, message):
    rows = ['{"prompt": "a"}', f'{{"prompt": "b", "answer": {value}}}']
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
    place = r"rows\.jsonl:2: " if ending == "jsonl" else r"rows\.json: "
    with pytest.raises(ValueError, match=place + message) as caught:
        open_source(path)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_csv(tmp_path):
    long = "x" * 200_000
    path = tmp_path / "rows.csv"
    path.write_text(f'\ufeffquestion,answer\r\n"1, ""one""\n+ 1?",007\r\n\r\n{long},\r\n', newline="")
    first = {"question": '1, "one"\n+ 1?', "answer": "007"}
    assert contents(open_source(path)) == [first, {"question": long, "answer": ""}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", r"rows\.csv:3: 3 values for the 2 columns \['a', 'b'\]; .*double quotes: 1,2,3"),
        ("a,b\n1\n", r"rows\.csv:2: 1 values"),
        ("a,a\n1,2\n", r"rows\.csv:1: each column needs a name of its own, got \['a', 'a'\]"),
        ("a,\n1,2\n", r"rows\.csv:1: each column needs a name"),
        ('a\n1\n"2', r"rows\.csv could not be read after 1 rows: unexpected end of data"),
        ("a\n\udcff\n", r"rows\.csv could not be read after 0 rows: 'utf-8' codec"),
        ("a,b\n", "has no rows"),
    ],
)
def test_csv_that_is_damaged(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "rows.csv")


# --- Parquet ---


def test_damaged_parquet_names_the_row_group(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [f"What is {i}?" for i in range(30)]})
    whatever = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pyarrow.parquet.write_table(table, path, row_group_size=10, **whatever)
    whole = path.read_bytes()
    at = whole.index(b"What is 10?")
    path.write_bytes(whole[:at] + bytes(byte ^ 255 for byte in whole[at : at + 3]) + whole[at + 3 :])
    with pytest.raises(ValueError, match=r"row group 1 of 3 \(rows 10 to 19\) is damaged .*fetch the file again"):
        open_source(path)
    for damaged in (whole[:-8] + b"\0\0\0\0PAR1", whole[: len(whole) // 2], whole[:-20] + b"\xff" * 12 + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"rows\.parquet could not be read as Parquet, its footer is damaged"):
            open_source(path)


def test_text_that_is_not_utf8_in_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["aaaa", "bbbb"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"bbbb", b"bb\xff\xfe", 1))
    with pytest.raises(ValueError, match=r"row group 0 of 1 \(rows 0 to 1\) is damaged \(.*Invalid UTF8"):
        open_source(path)


def test_nulls_that_arrow_adds_to_messages_and_tools(tmp_path):
    """They are not read, whichever way rows come from Arrow; those of other columns are."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": given}}]},
            ],
            "tools": [{"function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}],
            "metadata": {"x": None, "y": name},
        }
        for name, given in (("weather", {"city": "Paris"}), ("add", {"a": 1, "of": [{"x": 1}, {"y": 2}]}))
    ]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    given = [table, tmp_path / "rows.parquet"]
    if importlib.util.find_spec("datasets"):
        import datasets  # type: ignore

        given.append(datasets.Dataset(table))
    for spec in given:
        for row, read in zip(rows, contents(open_source(spec)), strict=True):
            messages = check_messages(read["messages"])
            assert messages == row["messages"] and tools_of(read, messages) == row["tools"]
            assert read["metadata"] == row["metadata"]


# --- paths ---


def test_what_is_no_file_of_rows(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for spec in (tmp_path / "pipe.jsonl", "/dev/null"):
        with pytest.raises(ValueError, match=f"{spec} is a pipe, socket or device; write the rows to a file"):
            open_source(spec)
    for spec in ("", " "):
        with pytest.raises(ValueError, match="the name of the data is empty: give a file"):
            open_source(spec)
    with pytest.raises(FileNotFoundError, match=r"no data file ~nobody-of-that-name/x.jsonl"):
        open_source("~nobody-of-that-name/x.jsonl")


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "rows.jsonl", ['{"prompt": "a"}'])
    assert contents(open_source("~/rows.jsonl")) == contents(open_source(Path("~/rows.jsonl"))) == [{"prompt": "a"}]


# --- memory ---


def test_tables_and_frames():
    rows = [{"prompt": "a", "answer": "1", "level": 2}, {"prompt": "b", "answer": None, "level": 3}]
    table = pyarrow.Table.from_pylist(rows)
    for given in (table, table.to_batches()[0]):
        assert contents(open_source(given)) == rows
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows, index=[7, 8])
    assert contents(open_source(frame)) == rows
    assert {type(value) for row in contents(open_source(frame)) for value in row.values()} == {str, int, type(None)}
    for nothing in (float("nan"), pandas.NaT, pandas.NA):
        assert contents(open_source(pandas.DataFrame({"x": ["a", nothing]}))) == [{"x": "a"}, {"x": None}]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "answer", "prompt"])
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([["a", "b", "c"]], columns=table.schema.names)
    for given, place in ((path, f"{path}: "), (table, ""), (table.to_batches()[0], ""), (frame, "")):
        with pytest.raises(ValueError, match=f"^{place}there are several columns 'prompt', and only one can be meant"):
            open_source(given)


def test_streams_are_read_as_far_as_is_asked():
    def endless():
        while True:
            yield {"prompt": "a"}

    assert contents(open_source(endless(), max_rows=3)) == [{"prompt": "a"}] * 3
    assert len(open_source(iter(ROWS), max_rows=9)) == 2
    with pytest.raises(ValueError, match="row 1 is a int"):
        open_source(iter([{"prompt": "a"}, 3]), max_rows=5)
    assert open_source({"train": ROWS}) is ROWS


def test_rows_in_memory():
    assert open_source(ROWS) is ROWS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, "b"], "row 1 is a str, not a mapping of columns: 'b'"),
        ({"train": [], "test": []}, r"mapping with the keys \['train', 'test'\]"),
        (iter(ROWS), r"list_iterator is a stream without a length: .*data.max_train_prompts.* or give list\(rows\)"),
        (3, "int has not"),
        (b"rows", "bytes has not"),
    ],
)
def test_bad_rows_in_memory(rows, message):
    with pytest.raises(ValueError, match=message):
        open_source(rows)


# --- named data sets ---


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:a/b,splt=test", r"unknown option 'splt' in 'a/b,splt=test'; did you mean 'split'\?"),
        ("tfds:gsm8k,train", "expected option=value, got 'train'"),
        ("hf:", "hf: names no data set; write one after it"),
        ("hf:,split=train", "hf: names no data set"),
        ("tfds:", "tfds: names no data set"),
    ],
)
def test_bad_options(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec)


def test_hugging_face_is_asked_for_name_config_and_split(monkeypatch):
    calls = []
    module = types.ModuleType("datasets")
    module.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS  # type: ignore
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert open_source("hf:openai/gsm8k,config=main,split=test[:10]") is ROWS
    open_source("hf:squad")
    assert calls == [
        (("openai/gsm8k", "main"), {"split": "test[:10]"}),
        (("squad", None), {"split": "train"}),
    ]


def test_hugging_face_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxrl-llm\[datasets\]'"):
        open_source("hf:openai/gsm8k")


DATASETS = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="Hugging Face datasets is an optional extra"
)


@DATASETS
def test_hugging_face_dataset(tmp_path):
    import datasets  # type: ignore

    rows = [{**ROWS[0], "tags": None}, ROWS[1]]
    dataset = datasets.Dataset.from_list(rows)
    assert contents(open_source(dataset)) == rows
    dataset.to_parquet(tmp_path / "train.parquet")
    assert len(open_source(f"hf:{tmp_path},split=train[1:]")) == 1
    with pytest.raises(ValueError, match=r"^hf:\S+ could not be loaded: ValueError: .*(?s:.)*nothing"):
        open_source(f"hf:{tmp_path},split=nothing")


@DATASETS
def test_splits_and_streams():
    import datasets  # type: ignore

    dataset = datasets.Dataset.from_list(ROWS[:1] * 3)
    assert len(open_source(datasets.DatasetDict(train=dataset))) == 3
    with pytest.raises(ValueError, match=r"keys \['train', 'test'\]; give one of its splits"):
        open_source(datasets.DatasetDict(train=dataset, test=dataset))
    assert contents(open_source(dataset.to_iterable_dataset(), max_rows=2)) == ROWS[:1] * 2
    assert contents(open_source(datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()), max_rows=9)) == (
        ROWS[:1] * 3
    )
    with pytest.raises(ValueError, match=r"an? IterableDataset is a stream without a length"):
        open_source(dataset.to_iterable_dataset())


@DATASETS
def test_saved_to_disk(tmp_path, monkeypatch):
    import datasets  # type: ignore

    monkeypatch.setenv("HOME", str(tmp_path))
    train, test = (datasets.Dataset.from_list([{"prompt": name}]) for name in ("a", "b"))
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(test=test).save_to_disk(tmp_path / "only")
    for spec, prompt in [
        (tmp_path / "one", "a"),
        ("~/one", "a"),
        ("~/two/test", "b"),
        ("hf:~/two,split=test", "b"),
        ("~/only", "b"),
        ("hf:~/one", "a"),
    ]:
        assert contents(open_source(spec)) == [{"prompt": prompt}]
    with pytest.raises(ValueError, match=r"two holds several splits; name one of them: \S+/two/test or \S+/two/train$"):
        open_source("~/two")
    with pytest.raises(ValueError, match=r"two holds no split 'tain'; name one"):
        open_source("hf:~/two,split=tain")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"one could not be read as a saved data set: "):
        open_source("~/one")


PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "prompt": tfds.features.Text(),
            "answer": np.int64,
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "meta": {"level": np.float32, "scores": tfds.features.Tensor(shape=(2,), dtype=np.int32)},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            meta = {"level": 0.5, "scores": np.array([i, -i], np.int32)}
            yield i, {"prompt": f"é{i}", "answer": i, "tags": ["a", "ö"][: i % 3], "meta": meta}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def run_beside_tensorflow(folder, code, *arguments):
    """Runs a script where TensorFlow seems installed, but ends the process when it is imported."""
    (folder / "tensorflow").mkdir(exist_ok=True)
    (folder / "tensorflow" / "__init__.py").write_text("import os; os._exit(77)")
    script = folder / "script.py"  # a script's folder comes first on its path
    script.write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode} (77: imported TensorFlow)\n{done.stderr}"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of five rows, prepared as array_record."""
    folder = tmp_path_factory.mktemp("tfds")
    run_beside_tensorflow(folder, PREPARE, str(folder))
    return folder


def test_tfds_rows_are_plain_python(prepared):
    source = TfdsSource("tiny", data_dir=prepared)
    rows = sorted(contents(source), key=lambda row: row["answer"])
    assert rows == [
        {
            "prompt": f"é{i}",
            "answer": i,
            "tags": ["a", "ö"][: i % 3],
            "meta": {"level": 0.5, "scores": [i, -i]},
        }
        for i in range(5)
    ]
    assert {type(row["answer"]) for row in rows} == {int}
    json.dumps(rows)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnst", "train", r"^tfds:mnst is neither .* nor one prepared in \S+; did you mean 'mnist'\?$"),
        ("mnist:9.9.9", "train", r"^tfds:mnist:9\.9\.9: .* cannot be loaded at version 9\.9\.9, only: "),
        ("tiny", "tain", r"^Unknown split 'tain'\. Should be one of \['train'\]"),
    ],
)
def test_tfds_that_is_not_there(prepared, name, split, message):
    with pytest.raises(ValueError, match=message):
        TfdsSource(name, split=split, data_dir=prepared)


def test_tfds_imports_no_tensorflow(prepared):
    code = """
import sys
from jaxrl_llm.data.sources import open_source
source = open_source(sys.argv[1])
assert len(source) == 3 and source[2]["prompt"].startswith("é")
assert "tensorflow" not in sys.modules
"""
    run_beside_tensorflow(prepared, code, f"tfds:tiny,split=train[:3],data_dir={prepared}")


def test_bytes_that_are_no_text():
    with pytest.raises(ValueError, match=r"row 3, column 'x' holds bytes that are not UTF-8"):
        sources._as_python([b"\xff\xd8"], "row 3, column 'x'")
