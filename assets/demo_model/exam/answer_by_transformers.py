"""The second reader of the exam: Hugging Face transformers' own generate, greedy, in batches.

It runs where our engine is not installed (the machine that trains the model) and checks the
engine's answers where it is. Works with transformers from 5.17 and torch from 2.11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.errors import UserError

BATCH_SIZE = 16


class TransformersReader:
    """Answers conversations with the checkpoint in `model_dir`.

    float32 on a CPU (bfloat16 is slow on CPUs without instructions for it), else the checkpoint's
    own dtype. UserError when the folder cannot be loaded.
    """

    def __init__(self, model_dir: Path, *, max_tokens: int, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.max_tokens = max_tokens
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(model_dir), dtype=torch.float32 if self.device == "cpu" else "auto"
            )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"The model {model_dir} cannot be loaded: {reason}") from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.to(self.device).eval()

    def answer_all(self, conversations: Sequence[list[dict[str, str]]]) -> Iterator[str]:
        """Yield one answer a conversation, in order, a batch at a time."""
        for start in range(0, len(conversations), BATCH_SIZE):
            yield from self._answer_batch(conversations[start : start + BATCH_SIZE])

    @torch.inference_mode()
    def _answer_batch(self, conversations: Sequence[list[dict[str, str]]]) -> list[str]:
        prompts = [
            self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
            for c in conversations
        ]
        # Left padding, so that every row's last token is its prompt's last. The template has
        # written the special tokens already.
        inputs = self.tokenizer(
            prompts,
            add_special_tokens=False,
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(self.device)
        output = self.model.generate(
            **inputs,
            max_new_tokens=self.max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            # Greedy whatever the checkpoint's generation_config says.
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        return list(self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True))
