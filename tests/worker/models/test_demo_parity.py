"""The real SmolLM2 against transformers, both in fp32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from services.worker.load import LoadedModel
from tests.worker.driver import Driver

pytestmark = pytest.mark.slow

LOGIT_TOLERANCE = 1e-3

PROMPTS = {
    "a question": "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "code": "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n",
    "unicode": "Les élèves mangent à 12h30 — 世界 Привет 🦙",
    "one token": "Hello",
}
LONG_PROMPT = topics["assignment"][:2400]


@pytest.fixture(scope="module")
def transformers_model(demo_model_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        demo_model_path.parent, gguf_file=demo_model_path.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(demo_model: LoadedModel) -> Tokenizer:
    return Tokenizer.from_str(demo_model.text.tokenizer.decode())


def expected_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_match_transformers(
    demo_model: LoadedModel, transformers_model: Any, tokenizer: Tokenizer, prompt: str
) -> None:
    tokens = tokenizer.encode(PROMPTS[prompt]).ids
    difference = Driver(demo_model).logits(tokens) - expected_logits(transformers_model, tokens)
    assert difference.abs().max() <= LOGIT_TOLERANCE


def test_logits_of_a_long_prompt_prefilled_in_chunks_match_transformers(
    demo_model: LoadedModel, transformers_model: Any, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode(LONG_PROMPT).ids
    assert len(tokens) > 500
    difference = Driver(demo_model).logits(tokens, chunk=200) - expected_logits(transformers_model, tokens)
    assert difference.abs().max() <= LOGIT_TOLERANCE


def test_64_greedy_tokens_are_those_of_transformers(
    demo_model: LoadedModel, transformers_model: Any, tokenizer: Tokenizer
) -> None:
    tokens = tokenizer.encode(PROMPTS["a question"]).ids
    generated = Driver(demo_model).greedy(tokens, 64)
    # One pass instead of 64: by induction, each token is its greedy choice after the ones before it.
    logits = expected_logits(transformers_model, tokens + generated[:-1])
    assert logits[len(tokens) - 1 :].argmax(-1).tolist() == generated
