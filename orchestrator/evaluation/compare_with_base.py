"""Answers of a tuned model and its base: `python -m orchestrator.evaluation.compare_with_base RUN/run.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.classification.inference import classify_texts, held_out_texts
from orchestrator.config.run import RunConfig, makes_classifier
from orchestrator.data.encoding.encoder import Encoder, encode_prompt, make_encoder
from orchestrator.data.encoding.tokenizer import core_tokenizer, load_facts
from orchestrator.data.formats.examples import Labelled
from orchestrator.data.formats.parse import Chat, Example, Message, Plain, Prompt
from orchestrator.distributed.runtime import Runtime, start_single_runtime
from orchestrator.errors import ConfigError, OrchestratorError
from orchestrator.generation.generator import end_ids_of
from orchestrator.metrics.phases import ANSWERING, LOADING, Phases
from orchestrator.models.artifact import open_artifact
from orchestrator.models.loading import load_model, silence_libraries, weights_dtype
from orchestrator.models.placement import place_for
from orchestrator.models.stage_inputs import find_base_folder
from orchestrator.models.weight_stream import placed_on
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config
from orchestrator.run_state.held_out_rows import held_out_examples

Answer = Callable[[Prompt], str]
Answered = tuple[Prompt, str, str]
"""A prompt, the base's answer and the tuned model's."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How tokens are sampled."""

    max_new_tokens: int
    temperature: float
    """0 takes the most likely token."""
    top_p: float
    seed: int


def answer_with(model: Any, folder: Path, encoder: Encoder, runtime: Runtime, *, drawing: Drawing) -> Answer:
    """Answer one prompt at a time, encoded as in training; stops at the model's or the tokenizer's end token."""
    tokenizer = core_tokenizer(encoder.facts.core)
    ends = end_ids_of(model, folder)

    def answer(prompt: Prompt) -> str:
        torch.manual_seed(drawing.seed)  # base and tuned model sample alike, and each prompt as if it were alone
        ids_BT = torch.tensor([encode_prompt(prompt, encoder)], device=runtime.device)
        with torch.no_grad(), runtime.forward_context():
            out_BT = model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=drawing.temperature > 0,
                max_new_tokens=drawing.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=ends[0],
                temperature=drawing.temperature or None,
                top_p=drawing.top_p if drawing.temperature else None,
                top_k=0 if drawing.temperature else None,
            )
        new = [token for token in out_BT[0, ids_BT.shape[1] :].tolist() if token not in ends]
        return tokenizer.decode(new, skip_special_tokens=True).strip()

    return answer


def show(answered: Iterable[Answered], console: Console, *, output: Path | None = None) -> int:
    """Print question, base answer and tuned answer, and append them to `output`; return the number of prompts."""
    count = 0
    for prompt, base, tuned in answered:
        count += 1
        table = Table(title=_question(prompt), title_justify="left", title_style="bold", show_lines=False, expand=True)
        table.add_column("base", ratio=1)
        table.add_column("tuned", ratio=1, style="green")
        answers = {"base": base, "tuned": tuned}
        table.add_row(*map(Text, answers.values()))
        console.print(table)
        if output is not None:
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompt": _question(prompt), **answers}, ensure_ascii=False) + "\n")
    return count


def _question(prompt: Prompt) -> str:
    return prompt.text if prompt.messages is None else str(prompt.messages[-1]["content"])


def _prompts(options: argparse.Namespace, config: RunConfig) -> Iterator[Prompt]:
    if options.prompt is not None:
        yield _chat(options.prompt)
    elif options.examples:
        run = RunFolder(options.run_file.parent)
        yield from map(_prompt_of, held_out_examples(config, run, options.stage, options.examples))
    else:
        for line in sys.stdin:
            if line.strip():
                yield _chat(line.strip())


def _texts(options: argparse.Namespace, config: RunConfig) -> Iterator[Labelled]:
    """Like `_prompts`, for a classifier."""
    if options.prompt is not None:
        yield Labelled(options.prompt, None)
    elif options.examples:
        run = RunFolder(options.run_file.parent)
        yield from held_out_texts(config, run, options.stage, options.examples)
    else:
        yield from (Labelled(line.strip(), None) for line in sys.stdin if line.strip())


def _chat(text: str) -> Prompt:
    messages: tuple[Message, ...] = ({"role": "user", "content": text},)
    return Prompt(messages=messages, tools=None, text="")


def _with_system(prompt: Prompt, text: str | None) -> Prompt:
    """Add a system message to a conversation that has none."""
    if text is None or prompt.messages is None or prompt.messages[0]["role"] == "system":
        return prompt
    system: Message = {"role": "system", "content": text}
    return replace(prompt, messages=(system, *prompt.messages))


def _prompt_of(example: Example) -> Prompt:
    """Everything before the last answer of a row."""
    match example.documents[0]:
        case Chat(messages=messages, tools=tools):
            return Prompt(messages=messages[:-1], tools=tools, text="")
        case Plain(prompt=prompt):
            return Prompt(messages=None, tools=None, text=prompt)
        case Prompt() as prompt:
            return prompt
        case Labelled():
            raise ConfigError("rows with a label and no answer hold no prompt; use --prompt TEXT")


def main(phases: Phases | None = None) -> int:
    parser = argparse.ArgumentParser(prog="orchestrator generate")
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--examples", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--system")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    try:
        return _run(options, phases or Phases())
    except OrchestratorError as error:
        print("\n".join(f"error: {problem}" for problem in error.problems), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace, phases: Phases) -> int:
    run = RunFolder(options.run_file.parent)
    config, folder = load_config(run).for_stage(options.stage), run.stage(options.stage)
    base_folder = find_base_folder(config, run, options.stage)
    silence_libraries()
    phases.begin(LOADING)
    if makes_classifier(config, options.stage):
        return classify_texts(config, folder, base_folder, _texts(options, config), phases=phases)
    runtime = start_single_runtime(config, autocast=config.model.dtype == "bfloat16", phases=phases)
    encoder = make_encoder(load_facts(base_folder), config.stages[options.stage].data)
    drawing = Drawing(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    answering = partial(answer_with, folder=base_folder, encoder=encoder, runtime=runtime, drawing=drawing)
    dtype = weights_dtype(config, uses_deepspeed=False)
    load_tuned = partial(open_artifact, folder.artifact, base_folder=base_folder, config=config, weights_dtype=dtype)
    prompts = (_with_system(prompt, options.system) for prompt in _prompts(options, config))
    with placed_on(place_for(base_folder, config, dtype)):
        if config.tuning.is_adapter:
            answered = _with_one_model(prompts, load_tuned, answering, runtime)
        else:
            loads = (partial(load_model, base_folder, config, weights_dtype=dtype), load_tuned)
            answered = _one_model_after_the_other(prompts, loads, answering, runtime)
        if show(answered, Console(), output=options.output) == 0:
            raise ConfigError("no prompt: give --prompt TEXT, or one prompt per line on standard input")
    return 0


def _with_one_model(
    prompts: Iterable[Prompt], load: Callable[[], Any], answering: Callable[[Any], Answer], runtime: Runtime
) -> Iterator[Answered]:
    """Answer each prompt as it comes: the base is the tuned model without its adapter."""
    tuned: Any = runtime.hold(load())
    answer, phases = answering(tuned), runtime.phases
    phases.end()  # the line is cleared: answers follow
    for prompt in prompts:
        with phases.during(ANSWERING), tuned.disable_adapter():
            base = answer(prompt)
        with phases.during(ANSWERING):
            own = answer(prompt)
        yield prompt, base, own


def _one_model_after_the_other(
    prompts: Iterable[Prompt],
    loads: Iterable[Callable[[], Any]],
    answering: Callable[[Any], Answer],
    runtime: Runtime,
) -> Iterator[Answered]:
    """Answer all prompts with each of two whole models: only one is in memory."""
    phases = runtime.phases
    phases.end()
    given = list(prompts)
    if not given:
        return
    answers: list[list[str]] = []
    for load in loads:
        with phases.during(LOADING):
            model = runtime.hold(load())
        with phases.during(ANSWERING):
            answers.append(list(map(answering(model), given)))
        runtime.release(model)
    yield from zip(given, *answers, strict=True)


if __name__ == "__main__":
    sys.exit(main())
