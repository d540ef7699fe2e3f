"""Several sets, interpolations, soups and a stage's own tuning in the plan: what is seen, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import ROW, Asker, latest, write_model, write_rows

from orchestrator.composition.compose import compose
from orchestrator.config.tuning import FreezeTuning, FullTuning
from orchestrator.planning.absolute_paths import resolve
from orchestrator.run_state.content_digests import content_digests
from orchestrator.run_state.reuse import stage_digest

SETS = "stages.e.sets={far: {path: far.jsonl, shift: true}}"
WISE = ("+experiment=llama_full", "+stage@stages.w=interpolate", "pipeline=[sft,w]")
SOUP = ("+experiment=llama_full", "+stage@stages.s=soup", "pipeline=[sft,s]")
EVALUATE = ("+experiment=llama_full", "+stage@stages.e=evaluate", "pipeline=[sft,e]")


def test_a_stage_sees_its_own_tuning_and_what_reads_it_the_same() -> None:
    words = ("+stage@stages.e=evaluate", "pipeline=[head,sft,e]", "stages.e.start_from=head")
    config = compose(["+experiment=llama_lpft", *words])
    assert isinstance(config.tuning, FullTuning) and isinstance(config.for_stage("sft").tuning, FullTuning)
    for name in ("head", "e"):
        tuning = config.for_stage(name).tuning
        assert isinstance(tuning, FreezeTuning) and tuning.head and tuning.layers == "none"
    assert config.for_stage("head").for_stage("head") == config.for_stage("head")
    other = compose(["+experiment=llama_lpft", *words, "tuning=freeze"])
    same = [name for name in config.pipeline if stage_digest(config, name, {}) == stage_digest(other, name, {})]
    assert same == ["head", "e"], "the run's tuning decides only the stage that has none of its own"


def test_the_plan_counts_what_each_stage_trains(ask: Asker) -> None:
    answer = ask("plan", "+experiment=llama_lpft", "format=json")
    assert answer.code == 0, answer
    told = json.loads(answer.out)
    head, whole = (stage["trainable_parameters"] for stage in told["stages"])
    assert told["tuning"] == "freeze then full" and head == 49152 * 576 and whole > 4 * head
    assert told["stages"][0]["memory"]["total"] < told["stages"][1]["memory"]["total"]


def test_plans_of_blends_know_what_they_hold(ask: Asker) -> None:
    sets = "{far: {path: demonstration, shift: true}}"
    words = ("+experiment=llama_full", "+stage@stages.w=interpolate", "+stage@stages.s=soup", "pipeline=[head,sft,w,s]")
    stages = (
        "+stage@stages.head=sft",
        "stages.w.origin=head",
        "stages.s.start_from=sft",
        "stages.s.members=['stage:head']",
    )
    choice = (f"stages.w.sets={sets}", "stages.w.choose_on=[data,far]", "stages.w.exact_match=true")
    answer = ask("plan", *words, *stages, *choice, "model.dtype=bfloat16", "format=json")
    assert answer.code == 0, answer
    by_name = {stage["name"]: stage for stage in json.loads(answer.out)["stages"]}
    assert by_name["w"]["input"] == "sft, head" and by_name["s"]["input"] == "sft, head"
    for name in ("w", "s"):
        phases = {phase["name"]: phase for phase in by_name[name]["memory"]["phases"]}
        assert ("rollout" in phases) == (name == "w") and list(phases)[-2:] == ["write", "prove"]
        assert 0 < phases["evaluation"]["host"]["ingredients"] < 3 * 134_515_008 * 2 / 2**30, "layers, not models"


def test_a_set_says_only_what_differs() -> None:
    stage = compose([*EVALUATE, SETS, "stages.e.options=[a,b]", "stages.e.sets.near.path=n.csv"]).stages["e"]
    assert stage.kind == "evaluate"
    assert {name: (entry.path, entry.shift, entry.options) for name, entry in stage.sets.items()} == {
        "far": ("far.jsonl", True, ("a", "b")),
        "near": ("n.csv", False, ("a", "b")),
    }


def test_the_sets_are_looked_at_before_the_spend(ask: Asker, tmp_path: Path) -> None:
    (told,) = ask.refused("plan", *EVALUATE, SETS)
    assert told.startswith(f"stages.e.sets.far.path={tmp_path}/far.jsonl does not exist")
    write_rows(tmp_path / "far.jsonl", [ROW, {"instruction": "x", "output": 3}])
    told = ask.refused("check", *EVALUATE, SETS)
    assert any("far.jsonl:2" in line and "output is the number 3" in line for line in told), told


def test_other_rows_in_a_set_make_the_stage_anew(ask: Asker, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    found: list[dict[str, str]] = []
    for rows in ([ROW], [ROW, ROW], [ROW]):
        write_rows(tmp_path / "far.jsonl", rows)
        config = resolve(compose([*EVALUATE, SETS, f"model.base={folder}"]), tmp_path)
        found.append(content_digests(config, "e", base_folder=folder))
    assert found[0] == found[2] and found[0]["data"] != found[1]["data"]
    assert found[0]["base"] == found[1]["base"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*EVALUATE, "stages.e.sets={forgetting: {path: x}}"), "stages.e.sets.forgetting: this name is taken"),
        ((*EVALUATE, "stages.e.sets={far: {paht: x}}"), "stages.e.sets.far.paht: unknown key; did you mean path?"),
        ((*EVALUATE, "stages.e.options=[yes]"), "stages.e.options"),
        ((*EVALUATE, "stages.e.start_from=e"), "stages.e.start_from: e is not a stage of kind"),
        ((*EVALUATE, "stages.e.data.packing=best_fit"), "stages.e.data.packing: rows are scored one by one"),
        (WISE, "stages.w.choose_on: choose=id_within needs a set with shift=true; name one (there are data (no shift))"),
        ((*WISE, "stages.w.choose=best_id"), "stages.w.choose_on: choose=best_id needs a set without shift"),
        ((*WISE, "stages.w.choose_on=[yelp]"), "stages.w.choose_on: yelp: no such set; there are data"),
        ((*WISE, "stages.w.origin=sft"), "stages.w.origin: sft is also what it starts from"),
        ((*WISE, "stages.w.origin=w"), "stages.w.origin: w is not a stage of kind"),
        ((*WISE, "pipeline=[w]"), "stages.w.start_from: no stage before w makes a policy"),
        (SOUP, "stages.s.members: a soup needs two or more different ingredients, these are stage:sft"),
        ((*SOUP, "stages.s.members=['stage:sft']"), "a soup needs two or more different ingredients"),
        ((*SOUP, "stages.s.members=['stage:x']"), "stages.s.members: x is not a stage of kind"),
        ((*SOUP, "stages.s.members=[x]"), "not a run folder (run.json expected); give FOLDER, FOLDER:STAGE or stage:NAME"),
        ((*SOUP, "stages.s.members=[x]", "stages.s.recipe=greedy"), "recipe=greedy uses held-out scores"),
        ((*WISE, "tuning=lora", "tuning.use_dora=true"), "the weights are not the sum of base and product"),
        (
            ("+experiment=llama_lora", "+tuning@stages.sft.tuning=freeze", "+stage@stages.b=sft", "pipeline=[sft,b]"),
            "stages.b.tuning: the stages are tuned differently (sft freeze, b lora)",
        ),
        (
            ("+experiment=llama_lpft", "stages.head.tuning.unfreeze_every_steps=1", "stages.head.tuning.unfreeze_every_epochs=1"),
            "stages.head.tuning: unfreeze_every_steps and unfreeze_every_epochs say the same thing twice",
        ),
        (
            ("+experiment=llama_lora", "+stage@stages.s=soup", "+stage@stages.b=sft", "pipeline=[sft,s,b]", "stages.s.members=[x]"),
            "stages.b.start_from: s makes an adapter whose rank is the sum of its ingredients'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    told = ask.refused("plan", *latest(words))
    assert any(sentence in line for line in told), told


def test_a_member_of_another_run_has_the_same_base_and_tuning(ask: Asker, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "other"
    (folder / "sft").mkdir(parents=True)
    config = compose(["+experiment=llama_lora", "model.dtype=float32"]).model_dump(mode="json")
    (folder / "run.json").write_text(json.dumps({"config": config}))
    words = (*SOUP, "stages.s.members=[runs/other]", "model.dtype=bfloat16")
    (told,) = ask.refused("plan", *words)
    assert told.endswith(f"sft is not done: there is no {folder}/sft/result.json")
    (folder / "sft" / "result.json").write_text("{}")
    (dtype, tuning) = ask.refused("plan", *words)
    assert "has model.dtype float32, this run bfloat16; members of a soup must share base and tuning" in dtype
    assert "has tuning.method lora, this run full" in tuning
    (told,) = ask.refused("plan", *SOUP, "stages.s.members=['runs/other:merge']")
    assert told.endswith("merge makes no policy; its stages that do are sft")


@pytest.mark.parametrize(
    "words",
    [
        ("+stage@stages.s=soup", "stages.s.members=['stage:head']"),
        ("+stage@stages.s=interpolate", "stages.s.origin=head", "stages.s.choose=best_id", "stages.s.choose_on=[data]"),
    ],
)
def test_whole_models_are_blended_whatever_of_them_was_trained(words: tuple[str, ...]) -> None:
    config = compose(["+experiment=llama_lpft", *words, "pipeline=[head,sft,s]"])
    assert {config.for_stage(name).tuning.method for name in ("head", "sft")} == {"freeze", "full"}
