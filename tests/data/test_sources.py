import gzip
import importlib.util
import json
import subprocess
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.data import sources
from jaxrl_llm.data.sources import ParquetSource, TfdsSource, open_source, read_json_lines

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
    assert isinstance(source, ParquetSource)
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
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match=r"rows\.csv has an unknown ending; known are \.jsonl"):
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


# --- memory ---


def test_rows_in_memory():
    assert open_source(ROWS) is ROWS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, "b"], "row 1 is a str, not a mapping of columns: 'b'"),
        ({"train": [], "test": []}, r"mapping with the keys \['train', 'test'\]"),
        (iter(ROWS), "list_iterator has not"),
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


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face datasets is an optional extra")
def test_hugging_face_dataset(tmp_path):
    import datasets  # type: ignore

    rows = [{**ROWS[0], "tags": None}, ROWS[1]]
    dataset = datasets.Dataset.from_list(rows)
    assert contents(open_source(dataset)) == rows
    dataset.to_parquet(tmp_path / "train.parquet")
    assert len(open_source(f"hf:{tmp_path},split=train[1:]")) == 1
    with pytest.raises(ValueError, match=r"keys \['train'\]"):
        open_source(datasets.DatasetDict(train=dataset))


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
