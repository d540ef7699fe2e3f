"""One of two ranks: rank 0 prepares slowly, rank 1 waits on the file system; then both form a group that allows 5 s. Run as a script."""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))


def main(folder: Path, slow_seconds: float) -> None:
    from data_parts import data_config

    from orchestrator.data.preparation import build
    from orchestrator.data.preparation.prepare import ensure_prepared

    config = data_config(train__path=str(folder / "rows.jsonl"), packing="best_fit", max_length=64)
    note, rank = folder / "note.json", int(os.environ["RANK"])
    started = time.monotonic()
    if rank == 0:
        encode = build.encode_chunk

        def slowly(*arguments: Any) -> Any:
            time.sleep(slow_seconds)
            return encode(*arguments)

        build.encode_chunk = slowly
        found = ensure_prepared(
            config, tokenizer_folder=folder / "tokenizer", cache=folder / "cache", seed=0, say=print
        )
        (folder / "note.tmp").write_text(json.dumps({"train": str(found.train)}))
        (folder / "note.tmp").rename(note)
    while not note.exists():
        time.sleep(0.05)
    waited = time.monotonic() - started

    import torch
    import torch.distributed as dist

    from orchestrator.data.order import BatchOrder
    from orchestrator.dataloader.prepared_rows import PreparedRows

    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    rows = PreparedRows.open(Path(json.loads(note.read_text())["train"]))
    order = BatchOrder(rows.rows, 4, 0, lengths=rows.lengths)
    seen = torch.zeros(rows.rows, dtype=torch.int64)
    for step in range(order.steps_per_epoch):
        for indices in order.micro_batches(step, rank=rank, world_size=2, micro_size=1):
            batch = rows.batch(indices)
            seen[indices[indices >= 0]] += 1
            total = torch.tensor(batch.num_trained_tokens)
            dist.all_reduce(total)
    dist.all_reduce(seen)
    assert "tokenizers" not in sys.modules or rank == 0, "ranks only map the file"
    print(json.dumps({"rank": rank, "waited": waited, "exact": bool((seen == 1).all()), "rows": rows.rows}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
