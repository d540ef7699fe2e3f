"""Answers of a tuned model and its base: `python -m orchestrator.evaluation.compare_with_base RUN/run.json`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from orchestrator.models.stage_inputs import find_base_folder
from orchestrator.run_folder.folder import RunFolder
from orchestrator.run_state.frozen import load_config
from orchestrator.run_state.held_out_rows import held_out_examples

Answer = Callable[[Prompt], str]


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


def show(
    prompts: Iterator[Prompt], base: Answer, tuned: Answer, console: Console, *, output: Path | None = None
) -> int:
    """Print question, base answer and tuned answer, and append them to `output`; return the number of prompts."""
    count = 0
    for prompt in prompts:
        count += 1
        table = Table(title=_question(prompt), title_justify="left", title_style="bold", show_lines=False, expand=True)
        table.add_column("base", ratio=1)
        table.add_column("tuned", ratio=1, style="green")
        answers = {"base": base(prompt), "tuned": tuned(prompt)}
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
    runtime = start_single_runtime(config, autocast=config.model.dtype == "bfloat16")
    encoder = make_encoder(load_facts(base_folder), config.stages[options.stage].data)
    dtype = weights_dtype(config, uses_deepspeed=False)
    tuned: Any = (
        open_artifact(folder.artifact, base_folder=base_folder, config=config, weights_dtype=dtype)
        .to(runtime.device)
        .eval()
    )
    is_full = not config.tuning.is_adapter
    base: Any = load_model(base_folder, config, weights_dtype=dtype).to(runtime.device).eval() if is_full else tuned  # pyright: ignore[reportArgumentType]  # transformers' `to` is typed without self
    drawing = Drawing(
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    answer_tuned = answer_with(tuned, base_folder, encoder, runtime, drawing=drawing)
    answer_base = answer_with(base, base_folder, encoder, runtime, drawing=drawing)

    def without_adapter(prompt: Prompt) -> str:
        with nullcontext() if is_full else tuned.disable_adapter():
            return answer_base(prompt)

    def announced(answer: Answer) -> Answer:
        def answered(prompt: Prompt) -> str:
            with phases.during(ANSWERING):
                return answer(prompt)

        return answered

    phases.end()  # the line is cleared: answers follow
    prompts = (_with_system(prompt, options.system) for prompt in _prompts(options, config))
    if show(prompts, announced(without_adapter), announced(answer_tuned), Console(), output=options.output) == 0:
        raise ConfigError("no prompt: give --prompt TEXT, or one prompt per line on standard input")
    return 0


if __name__ == "__main__":
    sys.exit(main())
