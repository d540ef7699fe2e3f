"""Writes the weights of a 4-bit GGUF file as bfloat16 safetensors, with configuration and tokenizer."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from orchestrator.architecture.base_model import dequantised_folder
from orchestrator.errors import ModelError
from orchestrator.files.atomic import publish
from orchestrator.files.cache import locked
from orchestrator.files.manifest import file_digest, write_manifest


def dequantise(gguf: Path, *, cache: Path, say: Callable[[str], None]) -> Path:
    """The file's weights as safetensors in a cache folder named by its hash; written once, atomically."""
    folder = dequantised_folder(gguf, cache)
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f".{folder.name}.lock")):
        # A finished folder is renamed into place, so its existence proves it; checked again under the lock.
        if folder.is_dir():
            return folder
        say(f"dequantising {gguf.name} (4 bits to bfloat16), once; this takes about 15 s")
        temporary = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        _write_dequantised(gguf, temporary)
        write_manifest(temporary, {"source": gguf.name, "source_sha256": file_digest(gguf)})
        publish(temporary, folder)
    return folder


def _write_dequantised(gguf: Path, folder: Path) -> None:
    source = str(gguf.parent)
    with _parsed_once():
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=gguf.name).save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse the file once and build the map of tensor names once, instead of 3 and 397 times.

    transformers 5.23 opens the file for the configuration, the weights and the tokenizer, and asks for the map in every
    module. The repetitions took more than half of the conversion (measured on SmolLM2-135M, two cores).

    Raises:
        ModelError: the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "reading a GGUF model needs the package gguf; type pip install 'finetune-orchestrator[demo]'"
        ) from None

    class PlainReader(gguf.GGUFReader):
        """Reads from a plain view of the mapped file: numpy's memmap class costs half of the time of parsing."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = np.asarray(mapped)

    cached: dict[str, Callable[..., Any]] = {
        "GGUFReader": functools.cache(PlainReader),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    originals = {name: getattr(gguf, name) for name in cached}
    for name, function in cached.items():
        setattr(gguf, name, function)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
