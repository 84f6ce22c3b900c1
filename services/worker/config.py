"""How one engine is set up; everything here is fixed for its life."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.cache_store.frames import CODEC_IDS
from services.wire.hashes import check_block_size


@dataclass(frozen=True)
class EngineConfig:
    """Raises ValueError naming the field, the value and the limit."""

    block_size: int = 16  # tokens a page; the deployment's
    kv_bytes: int | None = None  # memory for KV pages; None = 1 GiB on a CPU, what is left on a GPU
    gpu_memory: float = 0.92  # share of the card that may be used, KV pages and everything else
    pages: int | None = None  # so many pages, whatever their bytes
    max_running: int = 16  # sequences that hold pages
    max_step_tokens: int = 512  # decodes and prefill chunks of one step: bounds how long a decode waits
    max_model_len: int | None = None  # lowers the model's own limit
    pipeline_depth: int = 1  # steps under way: 2 overlaps planning with the device
    host_bytes: int = 0  # host memory for blocks that leave the pages; 0 = none
    store_codec: str = "none"  # how blocks travel to host memory and the store, see kernels.kv_payload

    @classmethod
    def for_device(cls, device: str, **given: Any) -> EngineConfig:
        """Defaults that suit the device, and over them what is given and not None.

        On a GPU a page of 64 tokens is one tile of attention, 8,192 tokens a step keep its tensor cores busy,
        and the next step is launched while one runs. It makes 5 GB of an 8B model's KV a second (bf16, 4,096
        tokens in 99 ms), more than a connection to a store brings; so blocks travel as int8, the most exact
        codec of those that halve them (perplexity within 0.03 % of the exact one, fp8 + 0.1 %:
        `python -m benchmarks.codecs`). On a CPU a load is worth it in any form, so blocks travel as they
        are: no text depends on where its prefix was held.

        Host memory is nobody's unasked: pinned, it is taken from everything else on the machine, and it holds
        what the pages hold, so that it is of use from about twice their blocks on. A CPU's pages are host
        memory: `kv_bytes` says how much.
        """
        defaults: dict[str, Any] = {}
        if device.partition(":")[0] == "cuda":
            defaults = {"block_size": 64, "max_running": 256, "max_step_tokens": 8192}
            defaults |= {"pipeline_depth": 2, "store_codec": "int8"}
        return cls(**defaults | {name: value for name, value in given.items() if value is not None})

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        _at_least("max_running", self.max_running, 1)
        for name in ("kv_bytes", "pages"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if not 0 < self.gpu_memory <= 1:
            raise ValueError(f"gpu_memory must be above 0 and at most 1, got {self.gpu_memory}")
        _at_least("host_bytes", self.host_bytes, 0)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens must be at least max_running ({self.max_running}): every running sequence "
                f"decodes in one step; got {self.max_step_tokens}"
            )
        if self.store_codec not in CODEC_IDS:
            raise ValueError(f"store_codec must be one of {', '.join(CODEC_IDS)}, got {self.store_codec!r}")
        if self.pipeline_depth not in (1, 2):
            raise ValueError(f"pipeline_depth must be 1 or 2, got {self.pipeline_depth}")

    def page_count(self, bytes_per_page: int, available: int) -> int:
        """Pages to allocate, `available` bytes being there unless the config says how many to take. Raises
        ValueError if the memory does not hold one."""
        if self.pages is not None:
            return self.pages
        kv_bytes = available if self.kv_bytes is None else self.kv_bytes
        if kv_bytes < bytes_per_page:
            raise ValueError(
                f"kv_bytes must hold at least one page of {bytes_per_page} B, got {kv_bytes}"
                + (f" (left of gpu_memory {self.gpu_memory})" if self.kv_bytes is None else "")
            )
        return kv_bytes // bytes_per_page

    def model_len(self, model_limit: int, pages: int) -> int:
        """Prompt and generated tokens of one request at most: what model, memory and this setting allow."""
        if self.max_model_len is not None and self.max_model_len > model_limit:
            raise ValueError(
                f"max_model_len must be at most the model's {model_limit}, got {self.max_model_len}"
            )
        return min(self.max_model_len or model_limit, pages * self.block_size)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
