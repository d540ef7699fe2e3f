"""Words of the command line that cannot be obeyed: exit code 2, a sentence each, the nearest real word, nothing written."""

from __future__ import annotations

import pytest
from command_line import Asker

from orchestrator.composition.compose import experiments

LORA = "+experiment=llama_lora"

TOLD_TOGETHER = {
    "words": [
        ("two words", "'two words' is not an override (token recognition error at: ' '); type key=value or group=choice, quoted for the shell"),
        ("seed=1,2", "'seed=1,2' holds several values; give one, a list in brackets (key=[a,b]), or -m for a run each"),
        ("hydra.run.dir=x", "'hydra.run.dir=x' sets Hydra itself, which writes nothing here; the run folder is output_dir/name"),
        ("llama_full", "llama_full is not an override; did you mean +experiment=llama_full?"),
    ],
    "groups": [
        ("tuning=lorra", "tuning=lorra: there is no such tuning; did you mean lora? There are: adalora, freeze, full, ia3, lora, loreft, oft, prefix, prompt, vera"),
        ("sharding=", "sharding=: there is no such sharding; there are: auto, none, zero1, zero2, zero3, zero3_offload"),
        ("tracking=3", "tracking=3: there is no such tracking; there are: none, wandb"),
        ("quantization=null", "quantization=null: there is no such quantization; did you mean none? There are: nf4, none"),
        ("~tuning", "~tuning: a group cannot be removed; choose one of adalora, freeze, full, ia3, lora, loreft, oft, prefix, prompt, vera"),
        ("+launcher=local", "+launcher=local: launcher is chosen already; type launcher=local"),
        ("optimizer=adamw", "optimizer=adamw: optimizer belongs to a stage; type optimizer@stages.sft.optimizer=adamw"),
        ("experiment=llama_full", "experiment=llama_full: an experiment is added; type +experiment=llama_full"),
    ],
    "unknown keys": [
        ("seeed=3", "seeed: unknown key; did you mean seed?"),
        ("max_steps=1", "max_steps: unknown key; did you mean stages.sft.max_steps?"),
        ("optimzer=adamw", "optimzer: unknown key; did you mean stages.sft.optimizer?"),
        ("stages.sft.optimizer.lrr=1", "stages.sft.optimizer.lrr: unknown key; did you mean stages.sft.optimizer.lr?"),
        ("stages.sft.optimzer.lr=1", "stages.sft.optimzer.lr: unknown key; did you mean stages.sft.optimizer.lr?"),
        ("stages.stf.max_steps=1", "stages.stf.max_steps: unknown key; did you mean stages.sft.max_steps?"),
        ("+stages.sft.optimizer.rank=1", "stages.sft.optimizer.rank: unknown key; allowed are beta1, beta2, epsilon, head_lr, layer_decay, lr, max_grad_norm, name, weight_decay"),
        ("+stages.sft.schedul.name=x", "stages.sft.schedul: unknown key; did you mean schedule?"),
        ("stages.sft.batch={global_sizee: 4}", "stages.sft.batch.global_sizee: unknown key; did you mean global_size?"),
        ("stages.sft.data.mix=[{path: x, formatt: text}]", "stages.sft.data.mix.0.formatt: unknown key; did you mean format?"),
        ("~sede", "sede: unknown key; did you mean seed?"),
        ("~stages.sft.optimizer.lr", "stages.sft.optimizer.lr: this key is missing"),
        ("+name=3", "+name=3: this key exists already; type name=3"),
    ],
    "types": [
        ("stages.sft.max_steps=many", 'stages.sft.max_steps: input should be a valid integer, not "many"'),
        ("seeds.data=1.5", "seeds.data: input should be a valid integer, not 1.5"),
        ("stages.sft.batch=3", "stages.sft.batch: input should be an object, not 3"),
        ("output_dir=null", "output_dir: input should be a valid string, not null"),
        ("model.base=", 'model.base: string should have at least 1 character, not ""'),
        ("stages.sft.data.train.path=", 'stages.sft.data.train.path: string should have at least 1 character, not ""'),
        ("stages.sft.optimizer.lr=-1", "stages.sft.optimizer.lr: input should be greater than 0, not -1"),
        ("stages.sft.optimizer.beta1=nan", "stages.sft.optimizer.beta1: input should be less than or equal to 1, not NaN"),
        ("model.dtype=fp16", "model.dtype: fp16 is not supported yet; type model.dtype=auto, float32 or bfloat16"),
        ("tuning.method=lorra", "tuning.method: 'lorra' is not one of 'full', 'freeze', 'lora', 'ia3', 'prompt', 'prefix', 'vera', 'oft', 'adalora', 'loreft'"),
        ("name=a/b", 'name: letters, digits, ".", "_" and "-" are allowed, up to 100 of them, the first a letter or a digit, not "a/b"; try name=a_b'),
        ("stages.sft.data.deduplicate=maybe", 'stages.sft.data.deduplicate: input should be a valid boolean, not "maybe"'),
    ],
}  # fmt: skip

ONE_WORD = [
    ("+experiment=llama_full", "+experiment=llama_lora +experiment=llama_full: a run has one experiment; leave out all but one"),
    ("name=???", "name: Missing mandatory value: name"),
    ("name=${nothing}", "name: Interpolation key 'nothing' not found"),
    ("format=xml", "format=xml: json or table is allowed"),
    ("pipeline=[]", "pipeline: no stage to run; add an experiment, such as +experiment=llama_lora"),
    ("pipeline=[sft,dpo]", "pipeline: dpo has no entry under stages; there are ['sft']"),
    ("pipeline=[sft,sft]", "pipeline: a stage appears twice in ['sft', 'sft']"),
    ("stages.sft.max_steps=null", "stages.sft: both max_steps and epochs are null; set one of them"),
]  # fmt: skip

SEVERAL_WORDS = {
    "QLoRA without an adapter": (
        ("tuning=full", "quantization=nf4"),
        "quantization: nf4 holds a frozen base and cannot be trained with tuning=full; type tuning=lora (QLoRA) or quantization=none",
    ),
    "batch that does not divide": (
        ("stages.sft.batch.global_size=7", "stages.sft.batch.micro_size=2", "cluster.processes_per_node=2"),
        "stages.sft.batch: global_size 7 is not a multiple of micro_size x ranks = 2 x (1 node x 2 processes) = 4; "
        "7 / 4 = 1.75; try stages.sft.batch.global_size=4",
    ),
    "batch smaller than a pass": (
        ("stages.sft.batch.global_size=3", "stages.sft.batch.micro_size=4"),
        "stages.sft.batch: global_size 3 is not a multiple of micro_size x ranks = 4 x (1 node x 1 process) = 4; "
        "3 / 4 = 0.75; try stages.sft.batch.micro_size=3, or stages.sft.batch.global_size=4",
    ),
    "ZeRO++ under zero2": (
        ("sharding=zero2", "sharding.hpz_partition_size=1"),
        "sharding.hpz_partition_size: ZeRO++ is a part of zero3, not of zero2; type sharding=zero3",
    ),
    "ZeRO++ over a share of the ranks that does not divide them": (
        ("sharding=zero3", "sharding.hpz_partition_size=3"),
        "sharding.hpz_partition_size: 3 does not divide the 1 ranks; type sharding.hpz_partition_size=1, the ranks of a node",
    ),
    "8-bit gathers on a CPU": (
        ("sharding=zero3", "sharding.quantized_weights=true", "cluster.device=cpu"),
        "sharding.quantized_weights: its kernels need GPUs, and cluster.device is cpu; set it to false",
    ),
    "offload of parameters under zero2": (
        ("sharding=zero2", "sharding.offload_parameters=cpu"),
        "sharding.offload_parameters: only zero3 can offload parameters, not zero2",
    ),
    "flash attention in 32 bits": (
        ("model.attention=flash_attention_2", "model.dtype=float32"),
        "model.attention: flash_attention_2 needs 16 bits; type model.dtype=bfloat16 or model.attention=sdpa",
    ),
    "two nodes under launcher=local": (
        ("cluster.nodes=2", "launcher=local", "stages.sft.batch.global_size=8"),
        "cluster.nodes is 2: launcher=local starts one node; use launcher=torchrun or launcher=slurm.",
    ),
}


@pytest.mark.parametrize("kind", TOLD_TOGETHER)
def test_every_fault_of_a_kind_is_told_in_one_go(ask: Asker, kind: str) -> None:
    words, sentences = zip(*TOLD_TOGETHER[kind], strict=True)
    assert sorted(ask.refused("plan", LORA, *words)) == sorted(sentences)


@pytest.mark.parametrize(("word", "sentence"), ONE_WORD)
def test_one_word_that_cannot_be_obeyed(ask: Asker, word: str, sentence: str) -> None:
    assert ask.refused("plan", LORA, word) == (sentence,)


@pytest.mark.parametrize("case", SEVERAL_WORDS)
def test_words_that_do_not_go_together(ask: Asker, case: str) -> None:
    words, sentence = SEVERAL_WORDS[case]
    assert ask.refused("run", LORA, *words) == (sentence,)


def test_an_unknown_experiment_is_answered_with_the_list(ask: Asker) -> None:
    (told,) = ask.refused("+experiment=lama_lora")
    assert told.startswith("experiment=lama_lora: there is no such experiment; did you mean llama_lora? There are: ")
    assert told.count(", ") == len(experiments()) - 1 and "mixtral_8x7b_lora_zero3" in told


@pytest.mark.parametrize("verb", ["run", "plan", "render"])
def test_all_problems_are_told_at_once(ask: Asker, verb: str) -> None:
    words = (
        "tuning=lorra",
        "seeed=3",
        "two words",
        "a=1,2",
        "stages.sft.batch.global_size=7",
        "cluster.nodes=2",
        "launcher=local",
    )
    missing = ("model.base=./no_model", "stages.sft.data.train.path=no.jsonl", "stages.sft.data.eval.path=nor.jsonl")
    told = ask.refused(verb, LORA, *words, *missing, "stages.sft.data.mix=[{path: neither.jsonl}]")
    needles = (
        "'two words'", "'a=1,2'", "tuning=lorra", "seeed", "stages.sft.batch", "model.base", "data.train.path=", "data.mix.0.path=",
        "data.eval.path=", "cluster.nodes is 2",
    )  # fmt: skip
    assert len(told) == len(needles)
    for needle, line in zip(needles, told, strict=True):
        assert needle in line


def test_faults_of_keys_and_types_are_told_together(ask: Asker) -> None:
    told = ask.refused("plan", LORA, "seeed=1", "stages.sft.max_steps=x", "cluster.nodes=0", "+tuning.rnk=3")
    assert [line.split(":")[0] for line in told] == ["seeed", "stages.sft.max_steps", "tuning.rnk", "cluster.nodes"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("plann",), "plann: no such verb; did you mean plan?"),
        (("xyz",), "xyz: no such verb; verbs are run, resume, "),
        (
            ("status",),
            "status takes one run folder, or a folder of runs: python -m orchestrator status runs/llama_lora",
        ),
        (("status", "a", "b"), "status takes one run folder, or a folder of runs"),
        (
            ("resume", "a", "b"),
            "resume takes one run folder and nothing else: python -m orchestrator resume runs/llama_lora",
        ),
        (("resume", "nowhere"), "nowhere is not a run folder: it holds no run.json, since there is no such folder"),
        (("logs", "--wibble"), "--wibble: logs has no such option; it has --help, --stage, "),
        (("cancel", "."), ". is not a run folder: it holds no run.json"),
        (
            ("generate", "x", "--repetition-penalty", "1.2"),
            "--repetition-penalty: generate has no such option; it has --help, --stage, ",
        ),
        (("doctor", "x"), "doctor takes no arguments: python -m orchestrator doctor"),
        (("plan",), "pipeline: no stage to run; add an experiment, such as +experiment=llama_lora"),
        (("plan", LORA, "-mall"), "-mall: -m takes no value; type -m --all"),
        (("version",), "version: no such verb; type python -m orchestrator --version"),
        (
            ("plan", "stages.sft.optimizer.lr=1", "stages.sft.epochs=2"),
            "stages.sft.optimizer.lr, stages.sft.epochs: no experiment was chosen, so there are no stages; add +experiment= with one of llama",
        ),
        (
            ("plan", LORA, "stages.sft.metrics.functions=[metrics.py:exact]"),
            'stages.sft.metrics.functions.0: a function is a map with its source, not "metrics.py:exact"; '
            "type 'stages.sft.metrics.functions=[{source: metrics.py:exact}]'",
        ),
        (
            (
                "plan",
                LORA,
                "stages.sft.batch.global_size=9",
                "stages.sft.batch.micro_size=2",
                "cluster.processes_per_node=8",
            ),
            "stages.sft.batch: global_size 9 is not a multiple of micro_size x ranks = 2 x (1 node x 8 processes) = 16",
        ),
        (("plan", LORA, "llama_full"), "llama_full is not an override; did you mean +experiment=llama_full?"),
        (("plan", LORA, ""), "'' is not an override ("),
        (("plan", LORA, "x="), "x: unknown key"),
        (("plan", "--config-dir"), "--config-dir: a value is required"),
        (("plan", "--config-dir", "nowhere"), "--config-dir: nowhere is not a folder"),
    ],
)
def test_verbs_and_folders(ask: Asker, words: tuple[str, ...], sentence: str) -> None:
    (told,) = ask.refused(*words)
    assert told.startswith(sentence)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("cluster.environment.GREETING=hello",), {"GREETING": "hello"}),
        (("+cluster.environment.GREETING=hello",), {"GREETING": "hello"}),
        (("cluster.environment={A: x, B: 'y z'}",), {"A": "x", "B": "y z"}),
        (("++cluster.environment.A=x", "cluster.environment.B=y"), {"A": "x", "B": "y"}),
    ],
)
def test_open_maps_take_new_keys(words: tuple[str, ...], expected: dict[str, str]) -> None:
    from orchestrator.composition.compose import compose

    assert compose([LORA, *words]).cluster.environment == expected


def test_words_win_over_files_and_later_words_over_earlier_ones() -> None:
    from orchestrator.composition.compose import compose

    config = compose(
        [LORA, "stages.sft.data.train.columns={prompt: question}", "seed=3", "seed=4", "seeds.data=5", "tuning.rank=2"]
    )
    assert config.stages["sft"].data.train.columns == {"prompt": "question"}
    assert (config.seed, config.seeds.weights, config.seeds.data) == (4, 4, 5)
    assert config.tuning.method == "lora" and config.tuning.rank == 2
