"""Workers as the pure routing core sees them."""

from services.router.load import WorkerLoad
from services.router.rates import Rates
from services.wire.messages import Hello, ModelCard

CARD = ModelCard(
    name="m",
    fingerprint=bytes(16),
    text_digest=bytes(16),
    vocab_size=1000,
    max_model_len=8192,
    eos_token_ids=(0,),
    aliases=("latest",),
)


def hello(*, rate=1000.0, decode_step_s=0.0, gpu_blocks=10_000, max_running=64, block_size=16):
    return Hello(
        worker_id="w",
        epoch=1,
        proof=b"",
        model=CARD,
        block_size=block_size,
        gpu_blocks=gpu_blocks,
        max_running=max_running,
        prefill_tokens_per_s=rate,
        decode_step_s=decode_step_s,
    )


def load(**fields):
    greeting = hello(**fields)
    return WorkerLoad(greeting, Rates(greeting, None))
