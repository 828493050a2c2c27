"""Text to token ids and back, by the files that a checkpoint has; no code of it is run."""

from backend.tokenizer.tokenizer import Tokenizer, check_unicode, sampling_defaults

__all__ = ["Tokenizer", "check_unicode", "sampling_defaults"]
