"""Logits of a 4-bit checkpoint against transformers with the dequantized weights, in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backend.layers.methods.awq import AWQMethod
from backend.models import loader
from tests.parity.test_logits import ids_of, paged_logits
from tests.tiny_model import FAMILIES, make_checkpoint
from tests.unit.test_awq import GROUP, edit_config, quantize_checkpoint

# qwen3's output projection has 4 heads of 32 inputs; the others' smallest layer has 64 inputs.
CASES = {
    **{family: (family, GROUP, {}) for family in FAMILIES},
    "group_64": ("llama", 64, {}),
    "biases": ("llama", GROUP, dict(attention_bias=True, mlp_bias=True)),
}


def expected_logits(folder, tensors, ids):
    """transformers' own model of that config, with the weights that the checkpoint stands for."""
    edit_config(folder, quantization_config=None)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    with torch.inference_mode():
        return model.float()(ids[None]).logits[0]


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_logits(tmp_path, monkeypatch, name, packed):
    family, group_size, overrides = CASES[name]
    make_checkpoint(tmp_path, family, **overrides)
    tensors = quantize_checkpoint(tmp_path, group_size)
    if packed:  # as on a GPU, with the reference's product
        monkeypatch.setattr(
            loader, "linear_method", lambda config, dtype, device: AWQMethod(group_size)
        )
    ids = ids_of(50)
    logits = paged_logits(tmp_path, ids, [37, *range(38, 51)], scattered=True)
    expected = expected_logits(tmp_path, tensors, ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
