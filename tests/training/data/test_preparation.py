"""Prepared rows: made once and whole, named by all that decides them, the same however they are made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_parts import FAMILIES, ROOT, data_config, write_jsonl, write_tokenizer

from orchestrator.config.data import DataConfig
from orchestrator.data.preparation import build as build_module
from orchestrator.data.preparation.prepare import Prepared, ensure_prepared
from orchestrator.data.prepared import key as key_module
from orchestrator.data.prepared.folder import PreparedFolder
from orchestrator.data.prepared.meta import DATA_VERSION
from orchestrator.data.prepared.parts import find_prepared
from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.errors import DataError, OrchestratorError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "is", "raining"]


def rows_of(count: int, *, start: int = 0) -> list[dict[str, str]]:
    def words(i: int, n: int) -> str:
        return " ".join(WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(1 + (i * 5) % n))

    return [
        {"instruction": f"{i}: {words(i, 9)}?", "input": "", "output": words(i + 1, 13)}
        for i in range(start, start + count)
    ]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer", FAMILIES["chatml"])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(60))
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def prepare(
    config: DataConfig, tokenizer: Path, cache: Path, *, say: list[str] | None = None, seed: int = 0, **more: Any
) -> Prepared:
    told: list[str] = [] if say is None else say
    return ensure_prepared(config, tokenizer_folder=tokenizer, cache=cache, seed=seed, say=told.append, **more)


def arrays_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    arrays = {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}
    return {name: (str(array.dtype), array.tobytes()) for name, array in arrays.items()}


def test_second_time_is_a_hit(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    config = data_config(train__path=str(data), packing="best_fit", max_length=128)
    first = prepare(config, tokenizer, tmp_path / "cache")
    again = prepare(config, tokenizer, tmp_path / "cache")
    assert not first.was_hit and again.was_hit
    assert first.train == again.train and first.train_statistics == again.train_statistics
    assert first.evaluation is not None and first.evaluation_digest != first.train_digest
    assert not list((tmp_path / "cache/data").glob(".building*"))


CHANGES: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 120},
    "loss_on": {"loss_on": "last_answer"},
    "packing": {"packing": "none"},
    "deduplicate": {"deduplicate": True},
    "template_date": {"template_date": "2025-02-02"},
    "format": {"train__columns": {"input": "instruction"}},
    "split": {"eval__fraction": 0.2},
    "mixture": {"train__rows": 20},
}


@pytest.mark.parametrize("name", [*CHANGES, "data", "tokenizer", "template", "template file", "seed", "code"])
def test_changing_any_one_thing_is_a_miss_and_says_which(
    name: str, data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"train__path": str(data), "packing": "best_fit", "max_length": 128}
    first = prepare(data_config(**settings), tokenizer, tmp_path / "cache")
    seed = 0
    match name:
        case "data":
            data.write_text(data.read_text().replace("quick", "quack"))
        case "tokenizer":
            state = json.loads((tokenizer / "tokenizer.json").read_text())
            (tokenizer / "tokenizer.json").write_text(json.dumps(state, indent=1))
        case "template":
            (tokenizer / "chat_template.jinja").write_text((tokenizer / "chat_template.jinja").read_text() + " ")
        case "template file":
            shutil.copy(tokenizer / "chat_template.jinja", tmp_path / "own.jinja")
            (tmp_path / "own.jinja").write_text((tmp_path / "own.jinja").read_text() + " ")
            settings["chat_template"] = str(tmp_path / "own.jinja")
        case "seed":
            seed = 1
        case "code":
            monkeypatch.setattr(key_module, "DATA_VERSION", DATA_VERSION + 1)
        case _:
            settings |= CHANGES[name]
    say: list[str] = []
    second = prepare(data_config(**settings), tokenizer, tmp_path / "cache", say=say, seed=seed)
    assert not second.was_hit and second.train != first.train
    said = say[0].split("these differ: ")[1]
    assert said.startswith(name.split()[0]) and ("seed" in said) == (name in ("seed",)), said


def test_what_does_not_decide_the_rows_is_a_hit(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__path": str(data), "max_length": 128}
    first = prepare(data_config(**settings), tokenizer, tmp_path / "cache")
    os.utime(data)
    moved = shutil.copy(data, tmp_path / "elsewhere.jsonl")
    for changed in (
        settings,
        {**settings, "train__path": str(moved)},
        {**settings, "train__format": "alpaca", "truncation": "accept"},
    ):
        assert prepare(data_config(**changed), tokenizer, tmp_path / "cache").train == first.train


def test_a_hit_imports_nothing_heavy_and_is_fast(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    prepare(data_config(train__path=str(data)), tokenizer, tmp_path / "cache")
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, 'tests/helpers'); from data_parts import data_config\n"
        "from orchestrator.data.preparation.prepare import ensure_prepared; start = time.perf_counter()\n"
        f"found = ensure_prepared(data_config(train__path={str(data)!r}), tokenizer_folder=Path({str(tokenizer)!r}), "
        f"cache=Path({str(tmp_path / 'cache')!r}), seed=0, say=print)\n"
        "print(found.was_hit, time.perf_counter() - start)\n"
        "assert not {'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    hit, seconds = done.stdout.split()
    assert hit == "True" and float(seconds) < 2


def test_processes_make_what_one_process_makes(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("jsonl", "json"):
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            write_jsonl(path, rows_of(3000))
        else:
            path.write_text(json.dumps(rows_of(3000)))
        config = data_config(train__path=str(path), packing="best_fit", max_length=128, num_processes=2)
        monkeypatch.setattr("orchestrator.data.encoding.chunks.CHUNK_BYTES", 1 << 14)
        alone = prepare(config, tokenizer, tmp_path / f"alone-{kind}")
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "TRIAL_SECONDS", 0.0)
            patch.setattr(build_module, "PARALLEL_SECONDS", 0.0)
            say: list[str] = []
            together = prepare(config, tokenizer, tmp_path / f"together-{kind}", say=say)
        assert any("in 2 processes" in sentence for sentence in say)
        assert arrays_of(alone.train) == arrays_of(together.train)
        assert alone.evaluation is not None and together.evaluation is not None
        assert arrays_of(alone.evaluation) == arrays_of(together.evaluation)


def test_two_at_once_build_once(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/helpers'); from data_parts import data_config\n"
        "from orchestrator.data.preparation.prepare import ensure_prepared\n"
        f"found = ensure_prepared(data_config(train__path={str(data)!r}), tokenizer_folder=Path({str(tokenizer)!r}), "
        f"cache=Path({str(tmp_path / 'cache')!r}), seed=0, say=lambda s: None)\n"
        "print(found.train_digest, found.train_statistics.tokens)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)
    ]
    answers = {process.communicate()[0] for process in running}
    assert len(answers) == 1 and all(process.returncode == 0 for process in running)
    assert len([path for path in (tmp_path / "cache/data").iterdir() if path.is_dir()]) == 1


def test_killed_at_any_moment_it_starts_clean(tokenizer: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(6000))
    config = data_config(train__path=str(data), packing="best_fit", max_length=128)
    whole = arrays_of(prepare(config, tokenizer, tmp_path / "reference").train)
    cache = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/helpers'); from data_parts import data_config\n"
        "from orchestrator.data.preparation.prepare import ensure_prepared\n"
        f"ensure_prepared(data_config(train__path={str(data)!r}, packing='best_fit', max_length=128), "
        f"tokenizer_folder=Path({str(tokenizer)!r}), cache=Path({str(cache)!r}), seed=0, say=lambda s: None)\n"
    )
    killed = 0
    for delay in (0.0, 0.05, 0.2, 0.4):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        deadline = time.monotonic() + 20
        while not list(cache.glob("data/.building*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        killed += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert killed >= 1
    found = prepare(config, tokenizer, cache)
    assert arrays_of(found.train) == whole
    assert not list(cache.glob("data/.building*"))


def test_a_process_that_dies_is_told(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data.encoding import worker_pool as processes

    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(3000))
    start = processes._start
    started: list[subprocess.Popen[bytes]] = []

    def doomed(context: Any) -> subprocess.Popen[bytes]:
        started.append(start(context))
        started[-1].kill()
        return started[-1]

    monkeypatch.setattr(processes, "_start", doomed)
    monkeypatch.setattr("orchestrator.data.encoding.chunks.CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(build_module, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(build_module, "PARALLEL_SECONDS", 0.0)
    with pytest.raises(OrchestratorError, match="a process that tokenises ended with code -9"):
        prepare(data_config(train__path=str(data), num_processes=2), tokenizer, tmp_path / "cache")
    assert all(process.poll() is not None for process in started)
    assert not list((tmp_path / "cache/data").glob(".building*"))


def test_what_takes_too_long_is_refused_with_the_command(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(3000))
    monkeypatch.setattr(build_module, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr("orchestrator.data.encoding.chunks.CHUNK_BYTES", 1 << 14)
    with pytest.raises(DataError, match=r"would take about \d+ s here, more than 0 s.*\northo prepare x") as caught:
        prepare(
            data_config(train__path=str(data)),
            tokenizer,
            tmp_path / "cache",
            refuse_over_seconds=0.001,
            prepare_command="ortho prepare x",
        )
    assert len(caught.value.problems) == 1
    assert (
        prepare(data_config(train__path=str(data)), tokenizer, tmp_path / "cache").train_statistics.source_rows == 3000
    )


def test_faults_of_train_and_eval_are_told_together(tokenizer: Path, tmp_path: Path) -> None:
    train = write_jsonl(
        tmp_path / "t.jsonl",
        [*rows_of(3), {"instruction": "x", "output": ""}, *rows_of(1), {"instruction": 1, "output": "y"}],
    )
    held = write_jsonl(tmp_path / "e.jsonl", [{"messages": [{"role": "robot", "content": "x"}]}, *rows_of(1)])
    config = data_config(train__path=str(train), eval__path=str(held), eval__format="messages")
    with pytest.raises(DataError) as caught:
        prepare(config, tokenizer, tmp_path / "cache")
    text = "\n".join(caught.value.problems)
    assert f"{train}:4 output is empty, text expected [empty_message]" in text
    assert f"{train}:6 instruction is the number 1, text expected [wrong_type]" in text
    assert f"{held}:1 messages[0].role is 'robot'" in text and "[unknown_role]" in text
    assert f"{held}:2 messages is missing" in text
    assert not [path for path in (tmp_path / "cache/data").iterdir() if path.is_dir()]


def test_truncation_is_refused_over_one_percent_and_counted_where_accepted(tokenizer: Path, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [*rows_of(30), {"instruction": "x", "output": "fox " * 400}, {"instruction": "x " * 400, "output": "y"}],
    )
    settings: dict[str, Any] = {"train__path": str(data), "eval__path": "none", "max_length": 100}
    with pytest.raises(DataError, match=r"2 of 32 rows \(6.2%\) lose trained tokens to max_length=100") as caught:
        prepare(data_config(**settings), tokenizer, tmp_path / "cache")
    assert any(f"{data}:31 loses" in problem for problem in caught.value.problems)
    say: list[str] = []
    counted = prepare(
        data_config(**settings, truncation="accept"), tokenizer, tmp_path / "cache", say=say
    ).train_statistics
    assert "truncation=accept" in say[-1]
    assert counted.truncated_rows == 1 and counted.rows_losing_trained_tokens == 2
    assert counted.dropped == {"dropped_behind_max_length": 1}
    assert counted.units == 31


def test_held_out_rows_that_stand_in_train(tokenizer: Path, tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", rows_of(20))
    held = write_jsonl(tmp_path / "e.jsonl", [*rows_of(5, start=100), *rows_of(2)])
    settings: dict[str, Any] = {"train__path": str(train), "eval__path": str(held)}
    with pytest.raises(DataError, match=r"2 of 7 rows of data\.eval also appear verbatim in data\.train") as caught:
        prepare(data_config(**settings), tokenizer, tmp_path / "cache")
    assert f"{held}:6 also appears in data.train [overlap]" in caught.value.problems
    assert prepare(data_config(**settings, overlap="accept"), tokenizer, tmp_path / "cache").was_hit


def test_split_takes_each_row_once_and_duplicates_to_one_side(tokenizer: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", rows_of(100) + rows_of(10))
    found = prepare(data_config(train__path=str(data), eval__fraction=0.2), tokenizer, tmp_path / "cache")
    assert found.evaluation is not None and found.evaluation_statistics is not None
    train, held = PreparedFolder(found.train), PreparedFolder(found.evaluation)
    ids = [row for folder in (train, held) for index in range(folder.rows) for row in folder.row_ids(index)]
    assert sorted(ids) == list(range(110))
    used = train.unit_hashes[np.unique(train.segment_documents)]
    assert not set(used.tolist()) & set(held.unit_hashes.tolist())
    assert found.evaluation_statistics.units == 22 and found.train_statistics.duplicates == 10
    clean = prepare(
        data_config(train__path=str(data), deduplicate=True, eval__path="none"), tokenizer, tmp_path / "cache"
    )
    assert clean.train_statistics.units == 100


def test_mixture_of_two_files(tokenizer: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", rows_of(50))
    second = write_jsonl(
        tmp_path / "b.jsonl",
        [
            {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}]}
            for i in range(30)
        ],
    )
    config = data_config(
        train__path=str(first),
        train__rows=10,
        mix=[{"path": str(second), "rows": 40}],
        eval__path="none",
        packing="best_fit",
        max_length=128,
    )
    found = PreparedFolder(prepare(config, tokenizer, tmp_path / "cache").train)
    units = found.segment_documents.tolist()
    assert len(units) == 50 and sum(unit < 50 for unit in units) == 10 and len(set(units)) == 40
    assert found.meta.file_rows == (50, 30)
    assert found.where(55, 6, (first, second)) == f"{second}:6"
    preference = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="mixes formats that cannot share a batch: alpaca, preference"):
        prepare(data_config(train__path=str(first), mix=[{"path": str(preference)}]), tokenizer, tmp_path / "cache")


def test_what_is_prepared_is_found_without_reading_rows(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", rows_of(4, start=200))
    for held_out in ("auto", "none", str(held)):
        config = data_config(train__path=str(data), eval__path=held_out)
        where: dict[str, Any] = {"tokenizer_folder": tokenizer, "cache": tmp_path / "cache", "seed": 0}
        assert find_prepared(config, **where) is None
        found = prepare(config, tokenizer, tmp_path / "cache")
        assert find_prepared(config, **where) == (found.train, found.evaluation)


def test_splitting_cuts_no_document_short(tokenizer: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fox " * 300}, {"text": "dog " * 5}])
    config = data_config(train__path=str(data), eval__path="none", packing="split", max_length=64)
    found = prepare(config, tokenizer, tmp_path / "cache")
    counted = found.train_statistics
    assert counted.truncated_tokens == 0 and counted.longest_tokens == 64 and counted.tokens > 300
    rows = PreparedFolder(found.train)
    assert all(length == 64 for length in rows.lengths[:-1])
    assert counted.trained_tokens == counted.tokens - len(rows.segment_documents)


def test_nowhere_to_write_and_nothing_to_tokenise_with(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the prepared rows cannot be written below"):
        prepare(data_config(train__path=str(data)), tokenizer, tmp_path / "file/cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OrchestratorError, match="holds no usable tokenizer"):
        prepare(data_config(train__path=str(data)), tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(DataError, match=r"chat_template=none.jinja is not a file"):
        prepare(data_config(train__path=str(data), chat_template="none.jinja"), tokenizer, tmp_path / "cache")
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="not valid Jinja: line 1"):
        prepare(
            data_config(train__path=str(data), chat_template=str(tmp_path / "bad.jinja")), tokenizer, tmp_path / "cache"
        )


def plain_tokenizer(folder: Path) -> Path:
    """Bytes as tokens: nothing is trained, so that the golden hash does not depend on the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate([*specials, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    write_tokenizer(folder, FAMILIES["qwen2"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


GOLDEN = (4, "aad9ad8f45592f1c")


def test_a_change_of_a_prepared_token_needs_a_new_version(tmp_path: Path) -> None:
    """Where this fails, the same configuration now prepares other rows: raise DATA_VERSION, then renew GOLDEN here."""
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": f"q{i} ü"},
                    {"role": "assistant", "content": "a" * i + " 東"},
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "\nend "},
                ]
            }
            for i in range(40)
        ],
    )
    digest = hashlib.sha256()
    for packing in ("none", "best_fit", "split"):
        found = prepare(
            data_config(train__path=str(data), packing=packing, max_length=256),
            plain_tokenizer(tmp_path / "tok"),
            tmp_path / "cache",
        )
        for name, values in arrays_of(found.train).items():
            digest.update(f"{name}:{values}".encode())
    assert (DATA_VERSION, digest.hexdigest()[:16]) == GOLDEN


def test_hub_data_set(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in the hub's cache is used without a network; one that is nowhere is one sentence."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = tmp_path / "hub/datasets--owner--set"
    (root / "snapshots/abc").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text("abc")
    write_jsonl(root / "snapshots/abc/train.jsonl", rows_of(30))
    found = prepare(data_config(train__path="owner/set"), tokenizer, tmp_path / "cache")
    assert found.train_statistics.source_rows == 30
    with pytest.raises(DataError, match="owner/other is not on this machine and the hub cannot be reached"):
        prepare(data_config(train__path="owner/other"), tokenizer, tmp_path / "cache")


def test_rows_are_opened_by_folder_alone(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    found = prepare(data_config(train__path=str(data)), tokenizer, tmp_path / "cache")
    rows = PreparedRows.open(found.train)
    assert rows.rows == len(rows.lengths) == len(rows.trained_tokens) == found.train_statistics.rows
    assert rows.digest == found.train_digest
    with pytest.raises(DataError, match="holds no prepared data"):
        PreparedRows.open(tmp_path)
