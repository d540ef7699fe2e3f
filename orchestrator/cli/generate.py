"""`generate`: answers of a tuned model next to those of its base."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import add_run_folder, add_stage, number, run_folder_of, whole_number
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import ConfigError


def configure(parser: VerbParser) -> None:
    add_run_folder(parser)
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="one prompt, as with --prompt")
    parser.takes = "one run folder and at most one prompt, quoted for the shell"
    add_stage(parser, "model of this stage (default: the last one)")
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt")
    parser.add_argument("--examples", type=whole_number(0), metavar="N", help="prompts from the held-out rows")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), metavar="N", help="maximum length of an answer, in tokens (96)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before every prompt that has none")
    parser.add_argument(
        "--temperature", type=number, metavar="T", help="sample at this temperature; 0, the default, is greedy"
    )
    parser.add_argument(
        "--top-p", type=number, metavar="P", help="sample from the most likely tokens whose probabilities sum to this"
    )
    parser.add_argument("--seed", type=whole_number(0), metavar="N", help="seed of the sampling (0)")
    parser.add_argument("--output", metavar="FILE", help="also write prompts and answers to this JSONL file")


def run(arguments: argparse.Namespace) -> int:
    from orchestrator.commands.generate import generate

    if arguments.text is not None and arguments.prompt is not None:
        raise ConfigError("a prompt and --prompt: give one of them")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p {arguments.top_p:g}: a number above 0 and at most 1 is required")
    if arguments.top_p is not None and not arguments.temperature:
        raise ConfigError("--top-p needs --temperature: greedy decoding takes the most likely token")
    options = {
        "--prompt": arguments.prompt if arguments.text is None else arguments.text,
        "--examples": arguments.examples,
        "--max-new-tokens": arguments.max_new_tokens,
        "--system": arguments.system,
        "--temperature": arguments.temperature,
        "--top-p": arguments.top_p,
        "--seed": arguments.seed,
        "--output": arguments.output,
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    return generate(run_folder_of(arguments), stage=arguments.stage, options=given)
