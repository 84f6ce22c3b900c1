"""Text to tokens and back: tokenizer, chat template, incremental detokenising, stop strings, logprobs.

Everything here is made from one worker's `TextAssets`, so that a router needs no model files. `ModelText` is
the door: one per distinct tokenizer and template, shared by all requests.
"""

from services.router.text.model_text import ModelText

__all__ = ["ModelText"]
