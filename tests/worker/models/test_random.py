from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from services.worker.models.config import ModelError
from services.worker.models.random import TINY, random_model
from tests.worker.driver import Driver


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    first, again, other = random_model(seed=1), random_model(seed=1), random_model(seed=2)
    assert torch.equal(first.decoder.weights.embedding, again.decoder.weights.embedding)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert not torch.equal(first.decoder.weights.embedding, other.decoder.weights.embedding)


def test_the_last_logits_depend_on_the_first_token() -> None:
    """A test that reads a wrong KV block must be able to notice."""
    driver = Driver(random_model())
    tokens = list(range(100))
    changed = [7, *tokens[1:]]
    assert (driver.logits(tokens)[-1] - driver.logits(changed)[-1]).abs().max() > 1e-3


def test_any_text_survives_the_byte_tokenizer() -> None:
    tokenizer = Tokenizer.from_str(random_model().text.tokenizer.decode())
    text = "naïve 世界\n\t 12"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    assert max(ids) < 256
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_family_runs_in_bfloat16(architecture: str) -> None:
    model = random_model({**TINY, "architectures": [architecture]}, dtype=torch.bfloat16)
    assert Driver(model).logits(range(40)).isfinite().all()


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ModelError, match="vocab_size must be >= 256"):
        random_model({**TINY, "vocab_size": 100})
