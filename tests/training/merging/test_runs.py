"""LP-FT, interpolation, soups and evaluation on several sets from the command line: what they leave, and that later stages read it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, Done, make_bench
from merging_runs import answer_words, likeliest, write_answer_sets
from safetensors.torch import load_file

from orchestrator.dataloader.prepared_rows import PreparedRows
from orchestrator.files.atomic import read_json
from orchestrator.files.manifest import read_manifest
from orchestrator.metrics.jsonl import read_rows

SHORT = "stages.sft.max_steps=6"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = make_bench(tmp_path_factory.mktemp("robustness"))
    write_answer_sets(bench.root)
    return bench


def lpft_words(bench: Bench) -> list[str]:
    """The head, then all of the model; then WiSE-FT from the base, and an evaluation of what it chose."""
    words = answer_words(bench, "lpft", "head", "sft", "wise", "ev")
    more = ["stages.head.max_steps=4", "stages.sft.max_steps=80", "stages.wise.alphas=[0.0,0.5,1.0]"]
    more += ["stages.wise.choose_on=[data,outside]", "stages.wise.choose_by=loss", "stages.wise.choose=best_id"]
    more += ["stages.ev.exact_match=true", "stages.ev.rollout.max_new_tokens=8"]
    kinds = ["+stage@stages.wise=interpolate", "+stage@stages.ev=evaluate"]
    return ["+experiment=llama_lpft", *kinds, *words, *more]


@pytest.fixture(scope="module")
def lpft(bench: Bench) -> Done:
    return bench.run("lpft", words=lpft_words(bench))


def test_two_ranks_that_share_the_model_score_and_blend_as_one_does(bench: Bench, lpft: Done) -> None:
    shutil.copytree(lpft.folder.root, bench.runs / "two")
    for stage in ("wise", "ev"):
        shutil.rmtree(bench.runs / "two" / stage)
    ranks = ["name=two", "launcher=torchrun", "cluster.processes_per_node=2", "sharding=zero3", "model.shard_gib=5e-5"]
    done = bench.run("two", words=[*lpft_words(bench), *ranks])
    assert done.code == 0, done.told
    one, two = (run.folder.stage("wise") for run in (lpft, done))
    assert "is done" in done.told or read_json(done.folder.stage("sft").result) == read_json(lpft.sft.result)
    assert [row["world_size"] for row in read_rows(two.events) if row["event"] == "start"] == [2]
    assert_close(read_json(two.curves), read_json(one.curves))
    files = sorted(file.name for file in two.artifact.glob("*.safetensors"))
    assert len(files) > 2 and read_json(two.artifact / "model.safetensors.index.json")["weight_map"]
    shards = {name: tensor for file in files for name, tensor in load_file(two.artifact / file).items()}
    whole = load_file(one.artifact / "model.safetensors")
    assert shards.keys() == whole.keys() and all(torch.equal(shards[name], whole[name]) for name in whole)
    ev = [read_json(run.folder.stage("ev").artifact / "report.json") for run in (lpft, done)]
    assert_close(ev[1]["sets"], ev[0]["sets"])


def assert_close(one: Any, other: Any) -> None:
    """Equal trees of values, numbers up to the rounding of fp32 sums."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(other, float) else other)


def test_the_head_is_trained_first_and_then_all(bench: Bench, lpft: Done) -> None:
    assert lpft.code == 0, lpft.told
    before = load_file(bench.model / "model.safetensors")
    head = load_file(lpft.folder.stage("head").artifact / "model.safetensors")
    tuned = load_file(lpft.sft.artifact / "model.safetensors")
    assert {name for name in head if not torch.equal(head[name], before[name])} == {"lm_head.weight"}
    assert all(not torch.equal(tuned[name], head[name]) for name in tuned)
    tunings = [read_manifest(lpft.folder.stage(name).artifact)["tuning"] for name in ("head", "sft", "wise")]
    assert tunings == ["freeze", "full", "full"]


def test_the_chosen_model_is_the_interpolation_and_was_proven(bench: Bench, lpft: Done) -> None:
    assert lpft.code == 0, lpft.told
    wise = lpft.folder.stage("wise")
    curves, result, proof = read_json(wise.curves), read_json(wise.result), read_json(wise.proof)
    losses = [scores["data"]["loss"] for scores in curves["scores"]]
    alpha = curves["alphas"][losses.index(min(losses))]
    assert result["alpha"] == curves["chosen"] == alpha and result["artifact"]["kind"] == "model"
    before, after = load_file(bench.model / "model.safetensors"), load_file(lpft.sft.artifact / "model.safetensors")
    for name, tensor in load_file(wise.artifact / "model.safetensors").items():
        assert torch.allclose(tensor, torch.lerp(before[name], after[name], alpha), rtol=0, atol=1e-6), name
    assert proof["reopened_loss"] == pytest.approx(min(losses), abs=1e-4), "scored by options, and by tokens"
    assert wise.curves.with_suffix(".png").stat().st_size > 5000


def test_the_report_says_what_plain_passes_say(bench: Bench, lpft: Done) -> None:
    """Accuracy, loss and exact match of the out-of-distribution set, again by transformers alone."""
    from transformers import AutoModelForCausalLM

    assert lpft.code == 0, lpft.told
    files = lpft.folder.stage("ev")
    report = read_json(files.artifact / "report.json")
    assert report["sets"].keys() == {"data", "outside", "forgetting"} and "worse than the base: " in report["lost"]
    assert [report["sets"][name]["shift"] for name in report["sets"]] == [False, True, None]
    assert report["base"]["loss"] == report["sets"]["data"]["base"]["loss"]
    rows = PreparedRows.open(Path(read_json(files.prepared)["sets"]["outside"]))
    documents = [rows.document(rows.document_of(index)) for index in range(rows.rows)]
    prompts = [ids[: int(trained.argmax())].tolist() for ids, trained in documents]
    answers = [ids[trained].tolist() for ids, trained in documents]
    options = sorted({tuple(answer) for answer in answers})
    for what, folder in (("base", bench.model), ("tuned", lpft.folder.stage("wise").artifact)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
        told = report["sets"]["outside"][what]
        logprobs = [likeliest(model, prompt, options) for prompt in prompts]
        right = [options.index(tuple(answer)) for answer in answers]
        hits = [
            max(range(len(options)), key=row.__getitem__) == place for row, place in zip(logprobs, right, strict=True)
        ]
        assert told["accuracy"] == pytest.approx(sum(hits) / len(hits)), what
        total = -sum(row[place] for row, place in zip(logprobs, right, strict=True))
        assert told["loss"] == pytest.approx(total / sum(map(len, answers)), abs=1e-4), what
        exact = [_greedy(model, p, len(a)) == a for p, a in zip(prompts, answers, strict=True)]
        assert told["exact_match"] == pytest.approx(sum(exact) / len(exact)), what
    assert report["sets"]["data"]["tuned"]["accuracy"] > report["sets"]["data"]["base"]["accuracy"], "it learnt"


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids_1T = torch.tensor([prompt])
    for _ in range(count):
        with torch.no_grad():
            ids_1T = torch.cat([ids_1T, model(input_ids=ids_1T).logits[:, -1:].argmax(-1)], dim=1)
    return ids_1T[0, len(prompt) :].tolist()


def test_a_resumed_run_has_nothing_left_to_do_and_generates(bench: Bench, lpft: Done) -> None:
    words = [str(lpft.folder.root)]
    again = bench.run("lpft", words=words, verb="resume")
    assert again.code == 0 and again.out.count("done already") == 4, again.told
    done = bench.run("lpft", words=[*words, "--prompt", "red 7", "--max-new-tokens", "4"], verb="generate")
    assert done.code == 0 and "tuned" in done.out, done.told


@pytest.fixture(scope="module")
def one(bench: Bench) -> Done:
    """An ingredient from another run than the soup's."""
    return bench.run("one", words=["+experiment=llama_lora", *answer_words(bench, "one", "sft"), SHORT, "seed=1"])


def soup_words(bench: Bench, one: Done) -> list[str]:
    """A soup of two adapters, merged into its base."""
    kinds = ["+stage@stages.soup=soup", "+stage@stages.merge=merge", "stages.merge.start_from=soup"]
    words = answer_words(bench, "soup", "sft", "soup")
    words += ["pipeline=[sft,soup,merge]", f"stages.merge.data.train.path={bench.root}/inside.jsonl"]
    members = ["stage:sft", str(one.folder.root)]
    words += ["stages.soup.start_from=null", f"stages.soup.members={members}"]
    return ["+experiment=llama_lora", *kinds, *words, SHORT]


@pytest.fixture(scope="module")
def soup(bench: Bench, one: Done) -> Done:
    assert one.code == 0, one.told
    return bench.run("soup", words=soup_words(bench, one))


def test_a_soup_of_adapters_is_the_sum_of_their_products(one: Done, soup: Done) -> None:
    """One ingredient of the same run, one of another run."""
    assert soup.code == 0, soup.told
    cooked, members = soup.folder.stage("soup"), ["stage:sft", str(one.folder.root)]
    assert read_json(cooked.result)["members"] == members
    assert list(read_json(cooked.curves)["scores"]) == ["base", *members, "soup"]
    wanted = [_products(folder) for folder in (soup.sft.artifact, one.sft.artifact)]
    assert read_json(cooked.artifact / "adapter_config.json")["r"] == 32
    for name, product in _products(cooked.artifact).items():
        assert torch.allclose(product, sum(part[name] for part in wanted) / 2, rtol=0, atol=1e-6), name
        assert not torch.allclose(wanted[0][name], wanted[1][name], atol=1e-3), "the ingredients differ"


def test_two_ranks_that_share_the_model_cook_and_merge_as_one_does(bench: Bench, one: Done, soup: Done) -> None:
    assert soup.code == 0, soup.told
    shutil.copytree(soup.folder.root, bench.runs / "shared")
    for stage in ("soup", "merge"):
        shutil.rmtree(bench.runs / "shared" / stage)
    ranks = ["name=shared", "launcher=torchrun", "cluster.processes_per_node=2", "sharding=zero3"]
    two = bench.run("shared", words=[*soup_words(bench, one), *ranks])
    assert two.code == 0, two.told
    for stage, weights in (("soup", "adapter_model.safetensors"), ("merge", "model.safetensors")):
        alone, shared = (run.folder.stage(stage) for run in (soup, two))
        assert [row["world_size"] for row in read_rows(shared.events) if row["event"] == "start"] == [2]
        tensors, same = load_file(alone.artifact / weights), load_file(shared.artifact / weights)
        assert tensors.keys() == same.keys() and all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert_close(read_json(two.folder.stage("soup").curves), read_json(soup.folder.stage("soup").curves))
    alone, shared = (read_json(run.folder.stage("merge").result)["ways"] for run in (soup, two))
    assert_close(shared, alone)


def _products(folder: Path) -> dict[str, torch.Tensor]:
    """(alpha / rank) B A of every layer."""
    settings, factors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    downs = [name for name in factors if "lora_A" in name]
    return {name: scale * factors[name.replace("lora_A", "lora_B")] @ factors[name] for name in downs}
