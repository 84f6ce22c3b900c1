"""The rules of sampling, in PyTorch: the next token of every row as one pure function of logits, parameters
and (seed, position).

Order: bias, penalties, mask, [log-probabilities are taken here], temperature, min_p, top_k, top_p, draw.

The draw is Gumbel-max: argmax of logit + noise, noise = -log(-log u), u from Philox keyed by the row's seed,
the number of tokens it generated before and the token id. So a row's token never depends on the batch around
it or on the worker, and noise is needed only for the tokens that may still win.

Each restriction is a threshold on the scaled logit; tokens that tie with it are kept:
    min_p   probability >= min_p * the highest probability
    top_k   logit >= the k-th largest logit (0 = off)
    top_p   logit >= that of the last token of the shortest descending run with mass >= top_p, the mass taken
            of what min_p and top_k left; at least one token (1 = off)
Scaled is (logit - the row's maximum) * (1 / temperature). Temperature 0 is argmax; equal logits or scores go
to the lowest token id. A row with a logit that is NaN or +inf, or with none above -inf, yields token 0.

Sources: Gumbel-max: Maddison et al., "A* Sampling" (arXiv 1411.0030); top_p: Holtzman et al. (arXiv
1904.09751); min_p: Nguyen et al. (arXiv 2407.01082); repetition penalty: Keskar et al., "CTRL" (arXiv
1909.05858).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.philox import philox_uniform, philox_uniform_vocab
from kernels.sampling_table import LEAST_TEMPERATURE

#: How many of the best tokens top-p looks at, first and second; only a flatter row is sorted whole. On prose,
#: SmolLM2 with top_p 0.9 keeps 120 tokens on average and 970 at the 99th percentile; the best 256 of 49,152
#: are found in 0.1 ms a row, all in 3.5 ms.
_TOP_P_HEADS = (256, 4096)


@dataclass(frozen=True)
class Bias:
    """Sparse additions to logits, one (row, token id, value) triple an entry; -inf forbids a token."""

    rows: torch.Tensor  # [N] int64, index into the batch
    tokens: torch.Tensor  # [N] int64
    values: torch.Tensor  # [N] fp32


@dataclass(frozen=True)
class History:
    """What the rows that have penalties said before; the other rows are not listed."""

    rows: torch.Tensor  # [H] int64, index into the batch, each at most once
    tokens: torch.Tensor  # [H, max_len] int32: prompt, then generated tokens; the rest of a row is ignored
    prompt_len: torch.Tensor  # [H]
    total_len: torch.Tensor  # [H], prompt and generated


@dataclass(frozen=True)
class TokenMask:
    """What the rows that follow a grammar may say; the other rows are not listed."""

    rows: torch.Tensor  # [N] int32 or int64, index into the batch, each at most once
    words: torch.Tensor  # [N, ceil(V / 32)] int32: bit t % 32 of word t // 32 is set if t is allowed


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of the rows of one step: tensors of R elements on the logits' device.

    The penalties act on the rows listed in `history` only.
    """

    temperature: torch.Tensor  # fp32; 0 = greedy
    top_p: torch.Tensor  # fp32 in (0, 1]; 1 = off
    top_k: torch.Tensor  # int64; 0 = off
    min_p: torch.Tensor  # fp32 in [0, 1]; 0 = off
    presence: torch.Tensor  # fp32, subtracted once from each token generated before
    frequency: torch.Tensor  # fp32, subtracted for each time it was generated
    repetition: torch.Tensor  # fp32; divides positive and multiplies negative logits of all tokens seen
    seed: torch.Tensor  # int64
    position: torch.Tensor  # int64: tokens that the request has generated so far
    bias: Bias | None = None
    history: History | None = None
    mask: TokenMask | None = None


@dataclass(frozen=True)
class SampleResult:
    """Log-probabilities are natural, after bias, penalties and mask, before temperature;
    None unless asked for.

    A row's `finite` is False where its logits say nothing: one of them is NaN or +inf, or none is above -inf.
    """

    tokens: torch.Tensor  # [R] int64 or int32; 0 where not finite
    finite: torch.Tensor  # [R] bool
    chosen_logprob: torch.Tensor | None = None  # [R] fp32
    top_tokens: torch.Tensor | None = None  # [R, k] int64, most likely first
    top_logprobs: torch.Tensor | None = None  # [R, k] fp32

    def first(self, rows: int) -> SampleResult:
        """That of the first so many rows, as views."""
        explained = (self.chosen_logprob, self.top_tokens, self.top_logprobs)
        cut = [None if values is None else values[:rows] for values in explained]
        return SampleResult(self.tokens[:rows], self.finite[:rows], *cut)


def sample_rows(logits: torch.Tensor, params: SamplingBatch, *, logprobs: int = -1) -> SampleResult:
    """Choose one token for each row of logits [R, V] fp32 (left unchanged).

    `logprobs`: -1 = none; k >= 0 = the chosen token's and the k most likely ones', for every row. Looks at
    the parameters to leave out what no row asks for, so on CUDA it waits for the device.
    """
    broken = ~(logits < torch.inf).all(-1)  # NaN is less than nothing
    if bool(broken.any()):
        logits = logits.masked_fill(broken.unsqueeze(-1), -torch.inf)
    logits = _masked(_penalised(_biased(logits, params.bias), params), params.mask)
    finite = logits.amax(-1) > -torch.inf
    tokens = logits.argmax(-1)
    drawn = ((params.temperature > 0) & finite).nonzero().squeeze(-1)
    if drawn.numel():
        tokens[drawn] = _draw(logits[drawn], params, drawn)
    if logprobs < 0:
        return SampleResult(tokens, finite)
    table = logits.log_softmax(-1)
    chosen = table.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    top = table.topk(min(logprobs, table.shape[-1]), dim=-1)
    return SampleResult(tokens, finite, chosen, top.indices, top.values)


def _biased(logits: torch.Tensor, bias: Bias | None) -> torch.Tensor:
    if bias is None:
        return logits
    return logits.index_put((bias.rows, bias.tokens), bias.values, accumulate=True)


def _penalised(logits: torch.Tensor, params: SamplingBatch) -> torch.Tensor:
    history = params.history
    if history is None:
        return logits
    vocab = logits.shape[-1]
    place = torch.arange(history.tokens.shape[1], device=logits.device)
    said = place < history.total_len.unsqueeze(-1)
    generated = said & (place >= history.prompt_len.unsqueeze(-1))
    tokens = history.tokens.long().where(said, vocab)  # what does not count goes to a column of its own
    zeros = logits.new_zeros(len(history.rows), vocab + 1)
    seen = zeros.scatter(-1, tokens, 1.0)[:, :vocab] > 0
    count = zeros.scatter_add(-1, tokens, generated.to(zeros.dtype))[:, :vocab]

    rows = logits[history.rows]
    repetition = params.repetition[history.rows].unsqueeze(-1)
    rows = torch.where(seen, rows * torch.where(rows > 0, 1 / repetition, repetition), rows)
    rows = rows.clamp(max=torch.finfo(rows.dtype).max)  # where a tiny repetition penalty overflowed
    rows = rows - params.frequency[history.rows].unsqueeze(-1) * count
    rows = rows - params.presence[history.rows].unsqueeze(-1) * (count > 0)
    return logits.index_copy(0, history.rows, rows)


def _masked(logits: torch.Tensor, mask: TokenMask | None) -> torch.Tensor:
    if mask is None:
        return logits
    bits = mask.words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = (bits & 1).flatten(1)[:, : logits.shape[-1]].bool()
    rows = mask.rows.long()
    return logits.index_copy(0, rows, logits[rows].masked_fill(~allowed, -torch.inf))


def _draw(logits: torch.Tensor, params: SamplingBatch, rows: torch.Tensor) -> torch.Tensor:
    # Minus the maximum first: no temperature, however small, overflows.
    inverse = params.temperature[rows].clamp(min=LEAST_TEMPERATURE).reciprocal()
    scaled = (logits - logits.amax(-1, keepdim=True)) * inverse.unsqueeze(-1)
    floor = _floor(scaled, params.top_k[rows], params.top_p[rows], params.min_p[rows])
    seed, position = params.seed[rows], params.position[rows]

    # Rows that nothing restricts need noise for the whole vocabulary, which is cheaper by the row; the others
    # need it for the few tokens that are left.
    whole = floor.isneginf()
    scores = scaled.masked_fill_(scaled < floor.unsqueeze(-1), -torch.inf)
    scores[whole] += _gumbel(philox_uniform_vocab(seed[whole], position[whole], scores.shape[-1]))
    row, token = (~whole.unsqueeze(-1) & scores.isfinite()).nonzero(as_tuple=True)
    scores[row, token] += _gumbel(philox_uniform(seed[row], position[row], token))
    return scores.argmax(-1)


def _gumbel(uniform: torch.Tensor) -> torch.Tensor:
    return uniform.log_().neg_().log_().neg_()


def _floor(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The smallest scaled logit that each row keeps; -inf where nothing restricts it. Rows' maximum is 0."""
    vocab = scaled.shape[-1]
    floor = min_p.log()  # log(0) = -inf
    by_k = (top_k > 0) & (top_k < vocab)
    if bool(by_k.any()):
        best = scaled.topk(int(top_k[by_k].max()), dim=-1).values
        kth = best.gather(-1, (top_k.clamp(1, best.shape[-1]) - 1).unsqueeze(-1)).squeeze(-1)
        floor = torch.where(by_k, floor.maximum(kth), floor)
    by_p = (top_p < 1).nonzero().squeeze(-1)
    if by_p.numel():
        floor[by_p] = _nucleus_floor(scaled[by_p], floor[by_p], top_p[by_p])
    return floor


def _nucleus_floor(scaled: torch.Tensor, floor: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    kept = scaled.masked_fill(scaled < floor.unsqueeze(-1), -torch.inf).log_softmax(-1)
    result = floor.clone()
    pending = torch.arange(len(floor), device=floor.device)
    for head in (*_TOP_P_HEADS, scaled.shape[-1]):
        best = kept[pending].topk(min(head, scaled.shape[-1]), dim=-1)
        mass = best.values.exp().cumsum(-1, dtype=torch.float64)
        enough = mass >= top_p[pending].unsqueeze(-1)
        reached = enough[:, -1]
        last = best.indices.gather(-1, enough.int().argmax(-1, keepdim=True))
        values = scaled[pending].gather(-1, last).squeeze(-1)
        result[pending[reached]] = values[reached]
        pending = pending[~reached]
        if not pending.numel():
            break
    return result  # rounding may leave the whole mass a hair below top_p: then all that was kept stays
