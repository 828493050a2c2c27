"""Workspaces on a GPU, where tensors are read by several threads: the weights of the model."""

from __future__ import annotations

import pytest
import torch

from backend.layers.parallel import ParallelContext
from backend.models.loader import load_model
from backend.workspace.convert import convert
from tests.tiny_model import make_checkpoint
from tests.unit.test_awq import quantize_checkpoint

CUDA = torch.device("cuda")


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("awq", [False, True], ids=["16_bit", "4_bit"])
def test_weights(tmp_path, awq, within):
    make_checkpoint(tmp_path / "model", "llama", attention_bias=True)
    if awq:
        quantize_checkpoint(tmp_path / "model")
    workspace = convert("tiny", tmp_path / "model", tmp_path / "workspace")
    with within():
        expected, found = (
            dict(load_model(str(folder), torch.float16, CUDA, ParallelContext())[0]
                 .named_parameters())
            for folder in (tmp_path / "model", workspace)
        )  # fmt: skip
        assert expected.keys() == found.keys()
        for name in expected:
            assert found[name].is_cuda and torch.equal(expected[name], found[name]), name
