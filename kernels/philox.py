"""Random numbers that depend on (seed, position, token id) only: Philox-4x32-10.

Counter-based, so the number of one token can be computed without those of others, in any order, on any
device: a stream resumed on another worker continues as if nothing had happened. The four numbers of one
evaluation serve four neighbouring token ids, which makes noise for a whole vocabulary 4x cheaper.

For tensors in PyTorch, and for Triton kernels as functions to call: the same bits.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). `philox(...)` gives the bits
of `triton.language.philox(seed, c0, c1, c2, c3)`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# Triton reads the annotations of its kernels: only constexpr may stand there.

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_uniform(seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Uniform fp32 numbers in (0, 1), one for each element of the three broadcast int64 tensors.

    The number is lane `token % 4` of philox(seed, token // 4, position, 0, 0), its upper 23 bits x taken as
    (x + 1/2) / 2^23: exact in fp32, never 0 or 1.
    """
    seed, position, token = torch.broadcast_tensors(seed, position, token)
    lanes = _uniform_quads(seed, position, token >> 2)
    return lanes.gather(-1, (token & 3).unsqueeze(-1)).squeeze(-1)


def philox_uniform_vocab(seed: torch.Tensor, position: torch.Tensor, vocab: int) -> torch.Tensor:
    """philox_uniform of the token ids 0 to vocab - 1: seed [R], position [R] -> [R, vocab]."""
    quads = torch.arange(-(-vocab // 4), device=seed.device)
    return _uniform_quads(seed.unsqueeze(-1), position.unsqueeze(-1), quads).flatten(-2)[..., :vocab]


def philox(
    seed: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: int, c3: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random uint32, held in int64, from a 64-bit seed and a counter of four uint32.

    Tensors are int64 and broadcast; the counters must lie in [0, 2^32).
    """
    key0, key1 = seed, seed >> 32
    x0, x1 = torch.broadcast_tensors(c0, c1)
    x2, x3 = torch.full_like(x0, c2), torch.full_like(x0, c3)
    for _ in range(_ROUNDS):
        # x0 and x2 hold 32 bits; x1, x3 and the keys carry dirt above them that never reaches the product.
        even, odd = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]  # modulo 2^64
        x0 = (odd >> 32).bitwise_xor_(x1).bitwise_xor_(key0).bitwise_and_(_MASK)
        x2 = (even >> 32).bitwise_xor_(x3).bitwise_xor_(key1).bitwise_and_(_MASK)
        x1, x3 = odd, even
        key0, key1 = key0 + _KEY_STEPS[0], key1 + _KEY_STEPS[1]
    return x0, x1 & _MASK, x2, x3 & _MASK


def _uniform_quads(seed: torch.Tensor, position: torch.Tensor, quad: torch.Tensor) -> torch.Tensor:
    lanes = philox(seed, quad, position, 0, 0)
    return torch.stack([(bits >> 9).float().add_(0.5).mul_(2.0**-23) for bits in lanes], dim=-1)


@triton.jit
def uniform_in_kernel(seed, position, token):
    """`philox_uniform` in a kernel: seed int64, position int32, token an int32 block."""
    a, b, c, d = tl.philox(seed, token >> 2, position, 0, 0)
    even, odd = tl.where(token & 2 != 0, c, a), tl.where(token & 2 != 0, d, b)
    return _unit(tl.where(token & 1 != 0, odd, even))


@triton.jit
def uniform_run_in_kernel(seed, position, first, COUNT: tl.constexpr):
    """`philox_uniform` of the COUNT tokens from `first` on, which is a multiple of 4: [COUNT]."""
    quads = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = tl.philox(seed, quads, position, 0, 0)
    return _unit(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@triton.jit
def _unit(bits):
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
