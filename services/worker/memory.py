"""GPU memory: how much of it KV pages may take, and a ledger of who has what.

The KV cache gets what is left of the card after everything else, so everything else is measured, not
guessed: weights lie there already, and the largest step is run once to see what its activations take.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, fields

import numpy as np
import torch

from kernels.attention import AttentionBatch, Workspace
from services.worker.batch import Batch
from services.worker.config import EngineConfig
from services.worker.kv import KVCache
from services.worker.models.decoder import Decoder
from services.worker.staging import Staging

#: For what cannot be measured before there is a KV cache: the graphs (their nodes take driver memory), the
#: tables, kernels' code.
_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True)
class MemoryLedger:
    """Bytes of the card by owner; the parts add up to `total`."""

    total: int
    weights: int
    kv: int
    activations: int  # PyTorch's other memory: activations, graphs' buffers, tables, what it caches
    driver: int  # CUDA context, graphs' nodes, kernels' code, and other processes
    free: int

    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "total"}


def ledger(decoder: Decoder, kv: KVCache) -> MemoryLedger:
    """Who has what now, on the decoder's CUDA device."""
    free, total = torch.cuda.mem_get_info(decoder.device)
    torch_bytes = torch.cuda.memory_reserved(decoder.device)
    weights, kv_bytes = _weight_bytes(decoder), kv.storage.nbytes
    return MemoryLedger(
        total=total,
        weights=weights,
        kv=kv_bytes,
        activations=torch_bytes - weights - kv_bytes,
        driver=total - free - torch_bytes,
        free=free,
    )


def kv_bytes_available(decoder: Decoder, config: EngineConfig, max_length: int) -> int:
    """What `config.gpu_memory` of the decoder's card leaves for KV pages.

    Runs the largest step that the config allows once, over a cache of one page. Raises ValueError if that
    does not fit into the card.
    """
    device = decoder.device
    _release_cached()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        _run_largest_step(decoder, config, max_length)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a step of max_step_tokens ({config.max_step_tokens}) does not fit into the GPU beside the "
            f"weights of {_weight_bytes(decoder) / 2**30:.1f} GiB: lower it or max_running"
        ) from error
    activations = torch.cuda.max_memory_allocated(device) - before
    _release_cached()
    free, total = torch.cuda.mem_get_info(device)
    used = total - free
    return max(0, int(total * config.gpu_memory) - used - activations - _RESERVE_BYTES)


@torch.inference_mode()
def _run_largest_step(decoder: Decoder, config: EngineConfig, max_length: int) -> None:
    spec, device = decoder.spec, decoder.device
    kv = KVCache(spec, 1, config.block_size, decoder.dtype, device)
    chunk = min(max_length, config.max_step_tokens)
    rows = -(-config.max_step_tokens // chunk)
    lengths = np.full(rows, chunk, dtype=np.int32)
    lengths[-1] = config.max_step_tokens - chunk * (rows - 1)
    query_start = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sampled = min(config.max_running, config.max_step_tokens)
    padding, positions, context_len, start, logit_rows = Staging(device).send(
        [
            np.full(config.max_step_tokens, -1, dtype=np.int32),  # slots: nothing is written
            np.zeros(config.max_step_tokens, dtype=np.int32),
            lengths,
            query_start,
            np.arange(sampled, dtype=np.int32),
        ]
    )
    blocks = -(-max_length // config.block_size)
    attention = AttentionBatch(
        block_tables=torch.zeros(rows, blocks, dtype=torch.int32, device=device),  # all read the one page
        slots=torch.arange(rows, dtype=torch.int32, device=device),
        query_start=start,
        context_len=context_len,
        decodes=0,
        max_query=chunk,
        workspace=Workspace(config.max_running, spec.heads, spec.kv_heads, spec.head_dim, device=device),
    )
    tokens = torch.zeros(rows, max_length, dtype=torch.int32, device=device)
    decoder.forward(Batch(padding, positions, positions, tokens, attention, logit_rows), kv)


def _weight_bytes(decoder: Decoder) -> int:
    weights = decoder.weights
    tensors = [weights.embedding, weights.norm, decoder.cos_sin]
    if weights.head is not weights.embedding:
        tensors.append(weights.head)
    for layer in weights.layers:
        tensors += vars(layer).values()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _release_cached() -> None:
    gc.collect()
    torch.cuda.empty_cache()
