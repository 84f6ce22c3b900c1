"""How one engine is set up; everything here is fixed for its life."""

from __future__ import annotations

from dataclasses import dataclass

from services.wire.hashes import check_block_size


@dataclass(frozen=True)
class EngineConfig:
    """Raises ValueError naming the field, the value and the limit."""

    block_size: int = 16  # tokens a page; the deployment's
    kv_bytes: int = 1 << 30  # memory for KV pages
    pages: int | None = None  # so many pages, whatever their bytes
    max_running: int = 16  # sequences that hold pages
    max_step_tokens: int = 512  # decodes and prefill chunks of one step: bounds how long a decode waits
    max_model_len: int | None = None  # lowers the model's own limit
    pipeline_depth: int = 1  # steps under way: 2 overlaps planning with the device

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        for name in ("kv_bytes", "max_running"):
            _at_least(name, getattr(self, name), 1)
        if self.pages is not None:
            _at_least("pages", self.pages, 1)
        if self.max_model_len is not None:
            _at_least("max_model_len", self.max_model_len, 2)
        if self.max_step_tokens < self.max_running:
            raise ValueError(
                f"max_step_tokens must be at least max_running ({self.max_running}): every running sequence "
                f"decodes in one step; got {self.max_step_tokens}"
            )
        if self.pipeline_depth not in (1, 2):
            raise ValueError(f"pipeline_depth must be 1 or 2, got {self.pipeline_depth}")

    def page_count(self, bytes_per_page: int) -> int:
        """Pages to allocate. Raises ValueError if the memory does not hold one."""
        if self.pages is not None:
            return self.pages
        if self.kv_bytes < bytes_per_page:
            raise ValueError(
                f"kv_bytes must hold at least one page of {bytes_per_page} B, got {self.kv_bytes}"
            )
        return self.kv_bytes // bytes_per_page

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
