from __future__ import annotations

import torch

from kernels.linear import linear
from tests.kernels import cases


def test_linear_multiplies_by_the_transposed_weight_and_adds_the_bias() -> None:
    x, weight, bias = (
        cases.random(*shape, seed=i, dtype=torch.float32, device="cpu")
        for i, shape in enumerate([(3, 8), (5, 8), (5,)])
    )
    product = x.double() @ weight.double().T
    cases.assert_close(linear(x, weight), product)
    cases.assert_close(linear(x, weight, bias), product + bias.double())
