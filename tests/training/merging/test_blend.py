"""Options of a set, blends of models and the rules that choose among them: on tiny random models, in this process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from merging_runs import likeliest
from safetensors.torch import load_file, save_file

from orchestrator.composition.compose import compose
from orchestrator.config.merging import InterpolateStage, SoupStage
from orchestrator.data.encoding.tokenizer import TokenizerFacts, core_tokenizer, load_facts
from orchestrator.distributed.runtime import start_single_runtime
from orchestrator.errors import CheckpointError, DataError
from orchestrator.evaluation.answer_options import AnsweredRow, choices_of, option_logprobs_RO
from orchestrator.evaluation.score_tables import regressions_line, score_table
from orchestrator.evaluation.set_scores import SetScores, normalised
from orchestrator.merging.blend import AdapterBlend, whole_blend
from orchestrator.merging.blend_files import weighted
from orchestrator.merging.selection import choose_blend, greedy_members, inner_best
from orchestrator.models.tuning import apply_tuning
from orchestrator.run_state.artifact_kind import ArtifactKind
from orchestrator.run_state.stage_context import ParentArtifact

WORDS = ("+experiment=llama_lora", "model.dtype=float32", "cluster.device=cpu", "tracking=none")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write_llama(tmp_path_factory.mktemp("blends") / "base")


@pytest.fixture(scope="module")
def facts(base: Path) -> TokenizerFacts:
    return load_facts(base)


def rows_of(facts: TokenizerFacts, answers: list[str]) -> list[AnsweredRow]:
    tokenizer = core_tokenizer(facts.core)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

    return [
        AnsweredRow(prompt=ids(f"<|im_start|>question {number}"), answer=ids(f"{answer}<|im_end|>"))
        for number, answer in enumerate(answers)
    ]


# ---- options -------------------------------------------------------------------------------------


def test_options_are_collected_where_they_are_few(facts: TokenizerFacts) -> None:
    few = choices_of(rows_of(facts, ["yes", "no", "no", "yes", "yes"]), "auto", facts, field="stages.e")
    assert few is not None and few.names == ("no", "yes") and few.right == (1, 0, 0, 1, 1)
    assert choices_of(rows_of(facts, ["a", "b", "c", "d"]), "auto", facts, field="stages.e") is None, "one row for each"
    assert choices_of(rows_of(facts, ["a", "a", "a"]), "auto", facts, field="stages.e") is None, "nothing to choose"
    assert choices_of(rows_of(facts, ["a", "b"] * 4), "none", facts, field="stages.e") is None
    assert choices_of(None, "auto", facts, field="stages.e") is None


def test_listed_options_stand_where_the_answer_stands(facts: TokenizerFacts) -> None:
    rows = rows_of(facts, ["yes", "no"])
    three = choices_of(rows, ("yes", "no", "perhaps"), facts, field="stages.e")
    assert three is not None and three.names == ("no", "perhaps", "yes")
    assert three.options[1] == rows_of(facts, ["perhaps"])[0].answer
    with pytest.raises(
        DataError, match=r"stages.e.options: the rows are also answered by no; \['yes', 'maybe'\] is given"
    ):
        choices_of(rows, ("yes", "maybe"), facts, field="stages.e")
    with pytest.raises(DataError, match="the rows are no questions with one answer each"):
        choices_of(None, ("yes", "no"), facts, field="stages.e")


def test_log_likelihoods_on_a_shared_cache_are_those_of_whole_passes(base: Path, facts: TokenizerFacts) -> None:
    from transformers import AutoModelForCausalLM

    rows = rows_of(facts, ["yes", "no", "perhaps", "no"])
    choices = choices_of(rows, ("yes", "no", "perhaps", "n"), facts, field="stages.e")
    assert choices is not None and len({len(option) for option in choices.options}) > 2
    runtime = start_single_runtime(compose(WORDS), autocast=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    own_RO = option_logprobs_RO(runtime, model, choices)
    plain_RO = np.array([likeliest(model, row.prompt, choices.options) for row in rows])
    assert np.abs(own_RO.numpy() - plain_RO).max() < 1e-4
    assert np.ptp(plain_RO, axis=1).min() > 0.1, "the options differ, so that the comparison says something"


def test_what_exact_match_compares() -> None:
    assert normalised("  Positive.\n") == normalised("positive") == "positive"
    assert normalised("A  b!?") == "a b" and normalised("ﬁne") == "fine"
    assert normalised("not positive") != normalised("positive") and normalised("3.14") == "3.14"


# ---- blends --------------------------------------------------------------------------------------


def test_whole_models_are_interpolated_parameter_by_parameter(base: Path, tmp_path: Path) -> None:
    tuned = tiny_model.write_llama(tmp_path / "tuned", seed=1)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    frozen = "model.layers.0.mlp.up_proj.weight"
    save_file({**after, frozen: before[frozen]}, tuned / "model.safetensors", metadata={"format": "pt"})
    after = load_file(tuned / "model.safetensors")
    blend = whole_blend(
        compose([*WORDS, "tuning=full"]), base, [ParentArtifact(stage="sft", folder=tuned, kind=ArtifactKind.MODEL)]
    )
    for alpha, exact in ((0.0, True), (0.3, False), (1.0, True), (0.0, True)):
        blend.put([alpha])
        for name, parameter in blend.model.named_parameters():
            wanted = (1 - alpha) * before[name].double() + alpha * after[name].double()
            assert torch.allclose(parameter.double(), wanted, rtol=0, atol=1e-7), (alpha, name)
            assert torch.equal(parameter, wanted.float()) or not (exact or name == frozen), (alpha, name)


def test_weights_that_are_equal_stay_to_the_bit() -> None:
    torch.manual_seed(0)
    same, other = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(weighted(same, [same, same, same], [1 / 3] * 3), same.float())
    assert torch.equal(weighted(other, [same, other], [1.0, 0.0]), same)


def adapter(base: Path, folder: Path, *words: str, seed: int) -> ParentArtifact:
    """A LoRA adapter with random factors on every linear layer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = apply_tuning(AutoModelForCausalLM.from_pretrained(base), compose([*WORDS, *words]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return ParentArtifact(stage=folder.name, folder=folder, kind=ArtifactKind.ADAPTER)


def dense_logits(base: Path, shares: dict[Path, float], ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits of the base with weight x (alpha / rank) x B A added to its weights, by hand."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    parameters = dict(model.named_parameters())
    for folder, weight in shares.items():
        settings = json.loads((folder / "adapter_config.json").read_text())
        scale = settings["lora_alpha"] / settings["r"] ** (0.5 if settings["use_rslora"] else 1.0)
        factors = load_file(folder / "adapter_model.safetensors")
        for name in factors:
            if "lora_A" in name:
                place = name.removeprefix("base_model.model.").replace(".lora_A", "")
                product = factors[name.replace("lora_A", "lora_B")] @ factors[name]
                parameters[place].data += weight * scale * product
    with torch.no_grad():
        return model(ids_BT).logits


@pytest.mark.parametrize("rslora", ["false", "true"])
def test_adapters_are_summed_as_products_not_as_factors(base: Path, tmp_path: Path, rslora: str) -> None:
    words = (f"tuning.use_rslora={rslora}", "tuning.rank=4")
    one = adapter(base, tmp_path / "one", *words, seed=1)
    other = adapter(base, tmp_path / "other", *words, "tuning.rank=2", "tuning.alpha=6", seed=2)
    ids_BT = torch.arange(3, 40)[None]
    blend = AdapterBlend(compose([*WORDS, *words]), base, [one, other])
    blend.model.eval()
    for weights in ((0.5, 0.5), (0.3, 0.0), (0.0, 0.0), (0.2, 0.8)):
        blend.put(weights)
        wanted = dense_logits(base, {one.folder: weights[0], other.folder: weights[1]}, ids_BT)
        with torch.no_grad():
            assert torch.allclose(blend.model(ids_BT).logits, wanted, atol=2e-4), weights
    assert not torch.allclose(wanted, dense_logits(base, {}, ids_BT), atol=1e-2), "the adapters do something"


def test_adapters_that_do_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    one = adapter(base, tmp_path / "one", seed=1)
    other = adapter(base, tmp_path / "other", "tuning.target_modules=[q_proj]", seed=2)
    dora = adapter(base, tmp_path / "dora", "tuning.use_dora=true", seed=3)
    with pytest.raises(CheckpointError, match="it does not have the parameters of the others"):
        AdapterBlend(compose(WORDS), base, [one, other])
    with pytest.raises(CheckpointError, match="not a plain sum of low-rank products"):
        AdapterBlend(compose(WORDS), base, [dora])


# ---- choices -------------------------------------------------------------------------------------

CHOICE = ("+stage@stages.w=interpolate", "pipeline=[sft,w]", "stages.w.sets={o: {path: x.jsonl, shift: true}}")
INSIDE = (0.50, 0.70, 0.80, 0.90, 0.895, 0.90)
OUTSIDE = (0.60, 0.75, 0.85, 0.70, 0.80, 0.65)


def scores(inside: float, outside: float) -> dict[str, SetScores]:
    return {
        "data": SetScores(rows=100, loss=1 - inside, accuracy=inside),
        "o": SetScores(rows=100, loss=1 - outside, accuracy=outside),
    }


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
@pytest.mark.parametrize(
    ("rule", "within", "chosen"),
    [("best_ood", 0.0, 2), ("best_id", 0.0, 3), ("id_within", 0.01, 4), ("id_within", 0.2, 2), ("id_within", 0.0, 3)],
)
def test_the_rules_choose_as_they_say(rule: str, within: float, chosen: int, measure: str) -> None:
    words = (f"stages.w.choose={rule}", f"stages.w.within={within}", f"stages.w.choose_by={measure}")
    stage = compose([*WORDS, *CHOICE, "stages.w.choose_on=[data,o]", *words]).stages["w"]
    assert isinstance(stage, InterpolateStage)
    table = [scores(*pair) for pair in zip(INSIDE, OUTSIDE, strict=True)]
    assert choose_blend(stage, table, {"data": False, "o": True}).number == chosen


def test_a_set_without_options_cannot_choose_by_accuracy() -> None:
    stage = compose([*WORDS, *CHOICE, "stages.w.choose_on=[data,o]"]).stages["w"]
    assert isinstance(stage, InterpolateStage)
    blind = {"data": SetScores(rows=9, loss=1.0), "o": SetScores(rows=9, loss=1.0)}
    with pytest.raises(DataError, match="data has no accuracy, because it has no options"):
        choose_blend(stage, [blind] * 6, {"data": False, "o": True})


def test_the_greedy_soup_takes_in_what_does_not_hurt() -> None:
    """Qualities of ingredients; of a soup the mean, but two of them spoil it together."""
    words = ("+stage@stages.s=soup", "pipeline=[sft,s]", "stages.s.members=[runs/x]", "stages.s.recipe=greedy")
    stage = compose([*WORDS, *words, "stages.s.choose_on=[data]"]).stages["s"]
    assert isinstance(stage, SoupStage)
    alone = [scores(value, 0.5) for value in (0.6, 0.8, 0.7, 0.75)]
    asked: list[tuple[int, ...]] = []

    def average(numbers: object) -> dict[str, SetScores]:
        asked.append(tuple(numbers))  # type: ignore[arg-type]
        return scores({(1, 3): 0.7, (1, 2): 0.85, (1, 2, 0): 0.85}[asked[-1]], 0.5)

    assert greedy_members(stage, alone, average) == [1, 2, 0]
    assert asked == [(1, 3), (1, 2), (1, 2, 0)]


def test_what_is_told() -> None:
    before, after = scores(0.8, 0.7), scores(0.9, 0.6)
    line = regressions_line(before, after, {"data": False, "o": True})
    assert line == "worse than the base: o (shift) accuracy 0.700 -> 0.600 (one standard error 0.046)"
    assert regressions_line(before, before, {}) == "worse than the base: nothing on 2 sets"
    worse = {**before, "forgetting": SetScores(rows=3, loss=1.0)}
    told = regressions_line(worse, {**before, "forgetting": replace(worse["forgetting"], loss=2.0)}, {})
    assert told == "worse than the base: forgetting perplexity 2.72 -> 7.39"
    assert "| o (shift) | accuracy | 0.700 | 0.600 |" in score_table({"base": before, "tuned": after}, {"o": True})
    assert inner_best([1.0, 0.0, 0.5], [0.7, 0.6, 0.9]).endswith("the endpoints have 0.600 and 0.700: inside by 0.200")
    assert "inside" not in inner_best([0.0, 0.5, 1.0], [0.7, 0.6, 0.9])
