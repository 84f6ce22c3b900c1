"""What KV codecs do to the texts of the demo model; `python -m benchmarks.codecs` has the figures."""

from __future__ import annotations

import pytest

from benchmarks.codecs import Quality, passages, quality, through
from kernels.kv_payload import Codec
from services.worker.load import LoadedModel


@pytest.fixture(scope="module")
def texts(demo_model: LoadedModel) -> list[list[int]]:
    return passages(demo_model, windows=2)


@pytest.fixture(scope="module")
def exact(demo_model: LoadedModel, texts: list[list[int]]) -> Quality:
    return quality(demo_model, texts, through(Codec.NONE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codec", "most_change", "least_agreement"),
    [(Codec.INT8, 0.01, 0.98), (Codec.FP8, 0.01, 0.95), (Codec.K8V4, 0.02, 0.94)],
)
def test_perplexity_survives_the_codec(
    demo_model: LoadedModel,
    texts: list[list[int]],
    exact: Quality,
    codec: Codec,
    most_change: float,
    least_agreement: float,
) -> None:
    found = quality(demo_model, texts, through(codec))
    change, _ = found.change(exact)
    assert -most_change < change <= most_change
    assert found.agreement(exact) >= least_agreement
    assert not found.losses.equal(exact.losses), "the codec had no part in it"
