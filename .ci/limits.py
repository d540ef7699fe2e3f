"""The lengths and arguments of functions and the lines of files, which ruff has no rule for: run by `make check`.

DESIGN: files up to 300 lines, functions up to 30 and never over 60, up to 5 parameters. The numbers here are as near to that as the code is
today: lower one, or take a name off a list, whenever the code allows it. A name that no longer needs its line is a failure too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOTS = ("orchestrator", "launchers", "slurm")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 40, 6
LONGER = {
    "orchestrator.data.preparation.store.write_store",
    "orchestrator.dataloader.prepared_rows.batch",
    "orchestrator.estimate.memory._training_phases",
    "orchestrator.execution.run_pipeline.execute",
    "orchestrator.models.attention.documents_attention",
    "orchestrator.planning.measured_speed.measure",
    "orchestrator.preflight.data_check.check_data",
    "orchestrator.preflight.main.check_stage",
    "orchestrator.run_state.model_card.write_card",
    "orchestrator.stages.merge.run",
    "orchestrator.worker._made_ready",
}
"""Functions of up to 60 lines: one sequence of steps, a table or a page, whose parts would have no name of their own."""
WIDER = {
    "orchestrator.classification.report.class_report",
    "orchestrator.data.preparation.build.build_rows",
    "orchestrator.data.preparation.prepare.ensure_prepared",
    "orchestrator.data.preparation.store._statistics",
    "orchestrator.data.prepared.key.prepared_key",
    "orchestrator.data.prepared.parts._part",
    "orchestrator.evaluation.classifier_scores._scores",
    "orchestrator.metrics.display.view_of_stage",
    "orchestrator.models.attention.documents_attention",
    "orchestrator.preflight.data_check.check_data",
    "orchestrator.training.evaluation.evaluate",
    "slurm.client.submit",
}
"""Functions of up to 8 parameters, the receiver not counted: keyword-only, or the signature of a library."""
MOST_LINES, MOST_PARAMETERS = 60, 8


def main() -> int:
    """Print every function and file over its limit; 1 where there is one."""
    problems = [problem for root in ROOTS for file in sorted(Path(root).rglob("*.py")) for problem in _file(file)]
    problems += [f"{name}: no longer over the limit; take it off the list in .ci/limits.py" for name in _unneeded()]
    print(*problems, sep="\n") if problems else None
    return 1 if problems else 0


def _file(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > FILE_LINES:
        yield f"{file}: {lines} lines, {FILE_LINES} are allowed"
    for name, function in _functions(file, ast.parse(text)):
        lines, parameters = _size(function)
        most = MOST_LINES if name in LONGER else FUNCTION_LINES
        if lines > most:
            yield f"{file}:{function.lineno}: {name} has {lines} lines, {most} are allowed"
        most = MOST_PARAMETERS if name in WIDER else PARAMETERS
        if parameters > most:
            yield f"{file}:{function.lineno}: {name} has {parameters} parameters, {most} are allowed"


def _unneeded() -> Iterator[str]:
    sizes = {
        name: _size(function)
        for root in ROOTS
        for file in Path(root).rglob("*.py")
        for name, function in _functions(file, ast.parse(file.read_text(encoding="utf-8")))
    }
    yield from (name for name in sorted(LONGER) if name not in sizes or sizes[name][0] <= FUNCTION_LINES)
    yield from (name for name in sorted(WIDER) if name not in sizes or sizes[name][1] <= PARAMETERS)


def _functions(file: Path, tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    module = ".".join(file.with_suffix("").parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", node


def _size(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """(lines from `def` to the end, parameters without the receiver)."""
    given = function.args
    names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return (function.end_lineno or function.lineno) - function.lineno + 1, len(names) - (
        names[:1] in (["self"], ["cls"])
    )


if __name__ == "__main__":
    sys.exit(main())
