"""Models and data that cannot be used: exit code 2, each file, line and field named, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import ROW, Asker, write_model, write_rows, write_tensors

from orchestrator.architecture.base_model import find_base
from orchestrator.composition.compose import compose
from orchestrator.config.run import RunConfig
from orchestrator.data.sources.validate import inspect
from orchestrator.errors import DataError, ModelError

LORA = "+experiment=llama_lora"


def remove(*names: str) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def lose_a_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def cut_off(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


MODEL_FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), "MODEL has no config.json"),
    "config cut off": (write("config.json", '{"a"'), "MODEL/config.json is damaged: Expecting ':' delimiter"),
    "config that is a list": (write("config.json", "[]"), "MODEL/config.json holds no object"),
    "config with an absurd number": (
        lambda model: (model / "config.json").write_text(
            (model / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": -2')
        ) and None,
        "MODEL/config.json: num_hidden_layers: Input should be greater than or equal to 1, not -2",
    ),
    "config with no heads": (
        write("config.json", '{"num_attention_heads": 0, "hidden_size": 8, "model_type": "x", "vocab_size": 1, '
              '"intermediate_size": 1, "num_hidden_layers": 1}'),
        "MODEL/config.json is not a model's config: integer division or modulo by zero",
    ),
    "no weights": (remove("model.safetensors"), "MODEL has no weights (model.safetensors or model.safetensors.index.json)"),
    "weights of another kind": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin") and None,
        "MODEL has no weights (model.safetensors or model.safetensors.index.json); it has pytorch_model.bin, which are not read",
    ),
    "a missing shard": (lose_a_shard, "MODEL lacks the shard model-00002-of-00002.safetensors"),
    "a damaged index": (write("model.safetensors.index.json", "{}"), "MODEL/model.safetensors.index.json is damaged"),
    "weights cut off": (cut_off, "bytes, its header implies"),
    "weights that are a Git LFS pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "MODEL/model.safetensors is a Git LFS pointer: type git lfs pull",
    ),
    "weights that are empty": (write("model.safetensors", ""), "MODEL/model.safetensors is truncated or not a safetensors file"),
    "weights with another header": (
        write("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        "MODEL/model.safetensors is damaged: its header is not that of a safetensors file",
    ),
    "no tokenizer": (remove("tokenizer.json"), "MODEL has no tokenizer (one of tokenizer.json, tokenizer.model,"),
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose([LORA])


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_a_model_folder_that_lacks_something(tmp_path: Path, config: RunConfig, fault: str) -> None:
    damage, sentence = MODEL_FAULTS[fault]
    model = write_model(tmp_path / "model")
    damage(model)
    with pytest.raises(ModelError) as error:
        find_base(config.model.model_copy(update={"base": str(model)}))
    (told,) = error.value.problems
    assert sentence.replace("MODEL", str(model)) in told


def test_all_that_a_model_folder_lacks_is_told(ask: Asker) -> None:
    (ask.folder / "model").mkdir()
    told = ask.refused("run", LORA, "model.base=model")
    assert [line.split(" has no ")[1].split(" ")[0] for line in told] == ["config.json", "weights", "tokenizer"]


def test_a_whole_model_folder_is_planned_with_its_own_facts(ask: Asker) -> None:
    write_model(ask.folder / "model")
    answer = ask("plan", LORA, "model.base=model", "format=json")
    assert answer.code == 0
    plan = json.loads(answer.out)
    assert plan["base"] == str(ask.folder / "model") and plan["base_source"] == "folder"
    assert plan["stages"][0]["parameters"] == 2 * 260 * 32 + 2 * (3 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32


def test_a_path_that_is_no_folder(ask: Asker) -> None:
    (told,) = ask.refused("plan", LORA, "model.base=./nowhere")
    assert told.endswith("/nowhere is not a folder; give a folder with config.json, weights and tokenizer, or a hub id")


DATA_FAULTS: dict[str, tuple[str, str | bytes | None, str]] = {
    "missing": (
        "rows.jsonl",
        None,
        "stages.sft.data.train.path=FILE does not exist: give a file, a glob, a folder or a hub id",
    ),
    "empty": ("rows.jsonl", "", "stages.sft.data.train.path=FILE holds no rows: FILE is empty"),
    "blank": ("rows.jsonl", "\n \n", "stages.sft.data.train.path=FILE holds no rows: FILE is empty"),
    "no text": ("rows.jsonl", b"\xff\xfe\x00", "stages.sft.data.train.path=FILE: FILE holds no readable row"),
    "half a list": ("rows.json", '[{"text": "a"}', "FILE is not JSON"),
    "other columns": ("rows.jsonl", '{"foo": 1}\n', "stages.sft.data.train.path=FILE: no format has the columns foo"),
    "unknown kind": ("rows.xyz", "a", "FILE is of an unknown kind"),
    "no Parquet": ("rows.parquet", "a", "FILE"),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_that_cannot_be_used(tmp_path: Path, config: RunConfig, fault: str) -> None:
    name, content, sentence = DATA_FAULTS[fault]
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = config.stages["sft"].data.train.model_copy(update={"path": str(file)})
    with pytest.raises(DataError) as error:
        inspect(source, field="stages.sft.data.train")
    (told,) = error.value.problems
    assert sentence.replace("FILE", str(file)) in told


def test_empty_and_missing_data_are_refused_before_anything_is_written(ask: Asker) -> None:
    write_rows(ask.folder / "empty.jsonl", [])
    told = ask.refused("run", LORA, "stages.sft.data.train.path=empty.jsonl", "stages.sft.data.eval.path=no.jsonl")
    assert told == (
        f"stages.sft.data.train.path={ask.folder}/empty.jsonl holds no rows: {ask.folder}/empty.jsonl is empty",
        f"stages.sft.data.eval.path={ask.folder}/no.jsonl does not exist: give a file, a glob, a folder or a hub id (owner/name)",
    )


def test_corrupt_rows_are_named_by_file_line_and_field(ask: Asker) -> None:
    good = json.dumps(ROW)
    rows = write_rows(
        ask.folder / "rows.jsonl", [good, good[:-1], {**ROW, "output": 3}, good, {"instruction": "a", "input": ""}]
    )
    held_out = write_rows(ask.folder / "held_out.jsonl", [good, "nonsense"])
    words = ("stages.sft.data.train.path=rows.jsonl", "stages.sft.data.eval.path=held_out.jsonl")
    told = "\n".join(ask.refused("run", LORA, *words))
    for place, fault in {
        f"{rows}:2 ": "is not JSON",
        f"{rows}:3 output": "text expected",
        f"{rows}:5 output": "",
        f"{held_out}:2 ": "is not JSON",
    }.items():
        assert [line for line in told.splitlines() if line.startswith(place) and fault in line], (place, told)


def test_a_damaged_row_does_not_stop_a_plan(ask: Asker) -> None:
    write_rows(ask.folder / "rows.jsonl", [ROW] * 30 + ["nonsense"])
    assert ask("plan", LORA, "stages.sft.data.train.path=rows.jsonl").code == 0


def test_faults_of_model_and_data_are_told_together(ask: Asker) -> None:
    write_tensors(ask.folder / "model.safetensors")
    words = (
        "model.base=./model.safetensors",
        "stages.sft.data.train.path=a.jsonl",
        "stages.sft.data.eval.path=b.jsonl",
    )
    told = ask.refused("run", LORA, *words)
    assert [line.split("=")[0].split(":")[0] for line in told] == [
        "model.base",
        "stages.sft.data.train.path",
        "stages.sft.data.eval.path",
    ]
