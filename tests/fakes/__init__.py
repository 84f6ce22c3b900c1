"""Stand-ins with the true interfaces: a scripted engine, a byte-level tokenizer, a worker around both.

`python -m tests.fakes.worker` runs the worker as a process of its own.
"""

from tests.fakes.engine import FakeEngine
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.text import EOS, FAKE_VOCAB, byte_text_assets, fake_card

__all__ = ["EOS", "FAKE_VOCAB", "FakeEngine", "FakeWorker", "byte_text_assets", "fake_card"]
