"""Files of every kind, quick looks at them, and what is told of data that cannot be used. No torch."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_parts import data_config, write_jsonl

from orchestrator.config.data import SourceConfig
from orchestrator.config.demonstration import DEMONSTRATION
from orchestrator.data.sources.locate import held_out_source, known_kind, locate, splits_train
from orchestrator.data.sources.readers import read_rows
from orchestrator.data.sources.validate import inspect, validate_rows
from orchestrator.errors import DataError

ROWS: list[dict[str, Any]] = [{"instruction": f"q{i} ü", "input": "", "output": f"a{i}\n"} for i in range(5)]


def source(path: Path | str, **changes: Any) -> SourceConfig:
    return data_config(**{f"train__{key}": value for key, value in {"path": str(path), **changes}.items()}).train


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the kind that its name says."""
    name = path.name.removesuffix(".gz")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".json"):
        text = json.dumps(rows)
    if name.endswith((".csv", ".tsv")):
        import csv
        import io

        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0].keys(), delimiter="\t" if ".tsv" in name else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    if name.endswith((".parquet", ".arrow")):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows)
        if name.endswith(".parquet"):
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return path
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


KINDS = [
    "a.jsonl",
    "a.ndjson",
    "a.json",
    "a.csv",
    "a.tsv",
    "a.parquet",
    "a.arrow",
    "a.jsonl.gz",
    "a.json.gz",
    "a.csv.gz",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    rows = [row for _, row in read_rows(path, known_kind(path))]
    assert rows == ROWS
    facts = inspect(source(path), field="data.train")
    assert (facts.rows, facts.format, facts.files, facts.bytes) == (5, "alpaca", (path,), path.stat().st_size)
    assert validate_rows(source(path)) == 5


def test_arrow_random_access_file_and_folder_of_datasets(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert inspect(source(tmp_path), field="data.train").rows == 5


def test_text_lines_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two\n")
    assert [row for _, row in read_rows(tmp_path / "a.txt", "txt")] == [{"text": "one"}, {"text": " two"}]
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\n\n  \n" + json.dumps(ROWS[1]).encode()
    )
    assert [number for number, _ in read_rows(tmp_path / "b.jsonl", "jsonl")] == [1, 4]
    assert inspect(source(tmp_path / "b.jsonl"), field="data.train").rows == 2


def test_json_forms(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert inspect(source(tmp_path / "lines.json"), field="x").rows == 5
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": ROWS}, indent=1))
    assert inspect(source(tmp_path / "wrapped.json"), field="x").rows == 5
    (tmp_path / "single.json").write_text("{\n}")
    with pytest.raises(DataError, match="one object, a list of rows expected"):
        inspect(source(tmp_path / "single.json"), field="x")


def test_globs_folders_and_splits(tmp_path: Path) -> None:
    for name in ("train-1.jsonl", "train-0.jsonl", "test-0.jsonl", "README.md"):
        write_jsonl(tmp_path / name, ROWS)
    folder = locate(source(tmp_path), field="x")
    assert folder is not None and [path.name for path in folder] == ["train-0.jsonl", "train-1.jsonl"]
    test = locate(source(tmp_path, split="test"), field="x")
    assert test == (tmp_path / "test-0.jsonl",)
    assert len(locate(source(tmp_path / "*.jsonl"), field="x") or ()) == 3
    with pytest.raises(DataError, match=r"split=dev is not in .*: found test, train"):
        locate(source(tmp_path, split="dev"), field="x")
    with pytest.raises(DataError, match="matches no file"):
        locate(source(tmp_path / "*.csv"), field="x")


def test_hub_data_set_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    wanted = source("owner/set", split="test")
    facts = inspect(wanted, field="data.train")
    assert (facts.files, facts.rows) == ((), None)
    root = tmp_path / "datasets--owner--set"
    folder = root / "snapshots/abc/data"
    folder.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("abc")
    write_jsonl(folder / "test-00000-of-00001.jsonl", ROWS[:2])
    write_jsonl(folder / "train-00000-of-00001.jsonl", ROWS)
    assert inspect(wanted, field="data.train").rows == 2
    assert inspect(source("owner/set"), field="data.train").rows == 5


def test_demonstration_and_its_held_out_rows() -> None:
    config = data_config()
    facts = inspect(config.train, field="data.train")
    assert facts.rows is not None and facts.rows >= 240 and facts.format == "alpaca"
    held_out = held_out_source(config)
    assert held_out is not None and held_out.path == str(DEMONSTRATION / "held_out.jsonl")
    assert not splits_train(config)
    other = data_config(train__path="rows.jsonl")
    assert held_out_source(other) is None and splits_train(other)
    none = data_config(train__path="rows.jsonl", eval__path="none")
    assert held_out_source(none) is None and not splits_train(none)


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train.path=nowhere.jsonl does not exist"):
        inspect(source("nowhere.jsonl"), field="data.train")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        inspect(source(tmp_path / "e.jsonl"), field="data.train")
    with pytest.raises(DataError, match="holds no rows"):
        validate_rows(source(tmp_path / "e.jsonl", format="alpaca"))
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(DataError, match="an unknown kind"):
        inspect(source(tmp_path / "x.bin"), field="data.train")
    with pytest.raises(DataError, match="holds no data file"):
        (tmp_path / "empty").mkdir()
        inspect(source(tmp_path / "empty"), field="data.train")


def test_unknown_columns_name_the_formats_and_the_mapping(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(
        DataError,
        match=r"no format has the columns answer, question.*columns='\{instruction: question, output: answer\}'.*alpaca \(instruction",
    ) as caught:
        inspect(source(path), field="data.train")
    assert len(caught.value.problems) == 1
    mapped = source(path, columns={"prompt": "question", "completion": "answer"})
    assert inspect(mapped, field="data.train").format == "prompt_completion"


def test_all_faulty_rows_are_told_at_once(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in ROWS] * 10
    lines[3] = '{"instruction": "x", "output": 3}'
    lines[7] = "{not json"
    lines[8] = '"text"'
    lines[9] = '{"instruction": "\xff'
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError) as caught:
        validate_rows(source(path))
    problems = caught.value.problems
    assert problems[0] == f"{path}:4 output is the number 3, text expected [wrong_type]"
    assert problems[1].startswith(f"{path}:8 is not JSON (Expecting property name")
    assert problems[2] == f"{path}:9 row is text, an object expected [wrong_type]"
    assert problems[3].startswith(f"{path}:10 is not UTF-8")
    assert any(problem.startswith("[unreadable]") for problem in problems)


def test_many_faulty_rows_are_counted(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "output": ""}] * 1000)
    with pytest.raises(DataError) as caught:
        validate_rows(source(path))
    assert len(caught.value.problems) == 22
    assert caught.value.problems[20] == "... 1000 faulty rows in all: 1000 x empty_message"


def test_broken_files_are_one_sentence(tmp_path: Path) -> None:
    cases = {
        "a.json": b"[1, 2",
        "a.parquet": b"PAR1 nonsense",
        "a.arrow": b"nonsense",
        "a.jsonl.gz": b"\x1f\x8b\x08 nonsense",
        "a.csv": b'instruction,output\n"x,y',
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as caught:
            validate_rows(source(tmp_path / name, format="alpaca"))
        assert len(caught.value.problems) == 1 and name in caught.value.problems[0]
    (tmp_path / "b.csv").write_text("instruction,output\na,b\nonly one\n")
    with pytest.raises(DataError, match=r"b.csv:3 has 1 cells, 2 as in the header expected"):
        validate_rows(source(tmp_path / "b.csv", format="alpaca"))


def test_a_hundred_thousand_rows_with_one_bad_in_the_middle(tmp_path: Path) -> None:
    """The million of the promise is in benchmarks/data.py; here a tenth, without a clock."""
    good = json.dumps({"messages": [{"role": "user", "content": "q" * 80}, {"role": "assistant", "content": "a" * 80}]})
    lines = [good] * 100_000
    lines[50_000] = good.replace('"aaaa', '["aaaa').replace('aaaa"}', 'aaaa"]}')
    path = tmp_path / "big.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        validate_rows(source(path))
    assert caught.value.problems[0] == f"{path}:50001 messages[1].content is a list, text expected [wrong_type]"


def test_a_quick_look_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS * 4000)
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, 'tests/helpers'); from data_parts import data_config\n"
        "from orchestrator.data.sources.validate import inspect, validate_rows\n"
        "from orchestrator.data import ledger, order; from orchestrator.data.prepared import folder, key, parts\n"
        "from orchestrator.data.preparation import packing, selection\n"
        f"source = data_config(train__path={str(path)!r}).train; start = time.perf_counter()\n"
        "facts = inspect(source, field='x'); print(facts.rows, time.perf_counter() - start)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "20000"
