"""Messages of the token channel between a router and a worker.

Every frame is `u32 little-endian length | msgpack`, decoded into exactly one of these structs by its tag.
Bulk values travel packed: token ids as little-endian u32 (`hashes.pack_tokens`), block hashes back to back
(`hashes.join_hashes`). Messages are arrays on the wire: a later version may append fields with defaults
without breaking an older peer, and never reorders them.

    router -> worker   Auth, Submit, Cancel, SnapshotRequest, TextAssetsRequest
    worker -> router   Challenge, Hello, Refused, Step, Events, Snapshot, Stats, Drain, TextAssets
"""

from __future__ import annotations

from typing import Literal

import msgspec

#: Peers of different versions refuse each other with a message naming both.
PROTOCOL_VERSION = 2

Tier = Literal["gpu", "host", "store"]
TIERS: tuple[Tier, ...] = ("gpu", "host", "store")

#: `stop`: end-of-sequence or a stop token id; `length`: max_tokens or the model's length limit;
#: `cancelled`: the router asked; `error`: the worker could not serve it, `Finish.message` says why.
FinishReason = Literal["stop", "length", "cancelled", "error"]

#: Whose fault an `error` is. `invalid_request`: the client's, another worker would answer the same;
#: `draining`: the worker takes no new requests and ends those it has; `internal`: it failed this request;
#: `worker_lost`: its engine is dead. The router's end of the channel says so too when the connection breaks.
ErrorKind = Literal["invalid_request", "draining", "internal", "worker_lost"]

DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100


# ---- shared values -------------------------------------------------------------------------------


class SamplingParams(msgspec.Struct, omit_defaults=True, frozen=True):
    """How to choose the next token. Defaults leave the model's distribution unchanged.

    Penalties follow the OpenAI definition (presence, frequency: over generated tokens, subtracted from the
    logit) and the CTRL paper (repetition: over prompt and generated tokens, divides or multiplies).
    Order: logit_bias, min_tokens mask, penalties, grammar, temperature, min_p, top_k, top_p, draw.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # the router draws one when the client gave none, so that a retry repeats the stream
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence tokens
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    logprobs: int = -1  # -1 = none; k >= 0 = the chosen token's and the k most likely ones'
    grammar: str = (
        ""  # that the answer follows to its end, as llguidance writes it: Lark, or JSON with several
    )


class Retention(msgspec.Struct, omit_defaults=True, frozen=True):
    """Keep the blocks of tokens `start` to `end` (exclusive; None = end of the prompt) with `priority`
    (0 to 100, default 35) for `ttl_s` seconds after the last use (None = no limit)."""

    start: int
    end: int | None = None
    priority: int = DEFAULT_PRIORITY
    ttl_s: float | None = None


class ModelCard(msgspec.Struct, frozen=True):
    """What a router must know of the model that a worker serves."""

    name: str  # the id in /v1/models
    fingerprint: bytes  # 16 bytes: everything KV values depend on besides tokens (see hashes.root_hash)
    text_digest: bytes  # 16 bytes: digest of the TextAssets
    vocab_size: int
    max_model_len: int  # prompt + generated tokens
    eos_token_ids: tuple[int, ...]
    aliases: tuple[str, ...] = ()


# ---- handshake -----------------------------------------------------------------------------------


class Challenge(msgspec.Struct, tag="challenge", array_like=True, frozen=True):
    """Worker's first frame."""

    protocol: int
    worker_id: str
    nonce: bytes


class Auth(msgspec.Struct, tag="auth", array_like=True, frozen=True):
    """Router's first frame: `proof` = HMAC-SHA256(secret, b"router" + worker nonce + router nonce)."""

    protocol: int
    router_id: str
    nonce: bytes
    proof: bytes


class Refused(msgspec.Struct, tag="refused", array_like=True, frozen=True):
    """The handshake failed; the connection closes."""

    reason: str


class Hello(msgspec.Struct, tag="hello", array_like=True, frozen=True):
    """The worker accepts: `proof` = HMAC-SHA256(secret, b"worker" + router nonce + worker nonce)."""

    worker_id: str
    epoch: int  # boot id: events and leases of an old epoch are void
    proof: bytes
    model: ModelCard
    block_size: int
    gpu_blocks: int  # pages of the GPU (or CPU engine) tier
    max_running: int  # sequences in one step at most
    prefill_tokens_per_s: float  # measured at warm-up: seeds the router's learned rate
    decode_step_s: float  # measured at warm-up, one sequence
    max_step_tokens: int = 8192  # one step computes at most so many: says how long an honest one takes


# ---- requests ------------------------------------------------------------------------------------


class Submit(msgspec.Struct, tag="submit", array_like=True, frozen=True):
    """Serve this prompt. `request` is unique on the connection and chosen by the router.

    `hashes` names the full blocks of `tokens`; `root` is the parent of block 0. `retention` ranges are in
    prompt tokens, sorted and disjoint. `tenant` owns the blocks in the store's accounts.

    A request that another worker began is continued: the last `generated` of `tokens` are its answer so far.
    `sampling` is that of the whole request: limits, penalties and random numbers go on from there.
    """

    request: int
    tokens: bytes
    root: bytes
    hashes: bytes
    sampling: SamplingParams
    retention: tuple[Retention, ...] = ()
    priority: int = 0  # scheduling class: higher is served first
    tenant: str = ""
    trace_id: str = ""
    generated: int = 0


class Cancel(msgspec.Struct, tag="cancel", array_like=True, frozen=True):
    """Stop `request` and free what it holds. No answer: the router has forgotten it already."""

    request: int


# ---- one engine step -----------------------------------------------------------------------------


class Start(msgspec.Struct, array_like=True, frozen=True):
    """Comes with a request's first token: what its prefill really cost and where its prefix came from."""

    prompt_tokens: int  # with those of its answer that another worker generated
    gpu_tokens: int  # prefix hit tokens by tier; the rest was computed
    host_tokens: int
    store_tokens: int
    queue_s: float  # from arrival at the worker to its first step
    prefill_s: float  # from its first step to its first token, store loads included


class Logprob(msgspec.Struct, array_like=True, frozen=True):
    """Natural-log probabilities under the model's distribution after penalties, before temperature."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first


class Finish(msgspec.Struct, array_like=True, frozen=True):
    reason: FinishReason
    stop_token: int | None = None  # the token id that ended it, when it is one; not among the tokens
    message: str = ""  # for `error`
    preemptions: int = 0
    error_kind: ErrorKind = "internal"  # for `error`; means nothing for the other reasons


class StepItem(msgspec.Struct, array_like=True, frozen=True):
    """What one step did for one request."""

    request: int
    tokens: tuple[int, ...] = ()
    start: Start | None = None
    logprobs: tuple[Logprob, ...] = ()  # as long as `tokens` when asked for
    finish: Finish | None = None


class Step(msgspec.Struct, tag="step", array_like=True, frozen=True):
    """One frame an engine step with everything it did for the streams of this router."""

    items: list[StepItem]


# ---- cache events --------------------------------------------------------------------------------


class Events(msgspec.Struct, tag="events", array_like=True, frozen=True):
    """Blocks that entered or left a tier of this worker since event `seq - 1`. Apply `removed` first.

    `seq` rises by one a frame within an epoch. On a gap: ask for a snapshot.
    """

    seq: int
    stored: dict[Tier, bytes]
    removed: dict[Tier, bytes]


class SnapshotRequest(msgspec.Struct, tag="snapshot_request", array_like=True, frozen=True):
    """Send everything this worker holds."""


class Snapshot(msgspec.Struct, tag="snapshot", array_like=True, frozen=True):
    """All blocks this worker can serve, per tier, as of event `seq`; later events apply on top."""

    seq: int
    held: dict[Tier, bytes]


class Stats(msgspec.Struct, tag="stats", array_like=True, frozen=True):
    """The worker's load, sent with steps while it changes and at least once a second."""

    running: int
    waiting: int
    queued_prefill_tokens: int  # uncached prompt tokens not yet computed, running and waiting
    free_blocks: int  # pages that can be allocated now, evictable ones included
    prefill_tokens_per_s: float
    decode_step_s: float
    store_tokens_per_s: float  # measured store loads; 0 = no store or circuit open


class Drain(msgspec.Struct, tag="drain", array_like=True, frozen=True):
    """No new requests please; running ones finish, then the worker closes."""

    reason: str = ""


# ---- text ----------------------------------------------------------------------------------------


class TextAssetsRequest(msgspec.Struct, tag="text_request", array_like=True, frozen=True):
    """Send the tokenizer and the chat template."""


class TextAssets(msgspec.Struct, tag="text", array_like=True, frozen=True):
    """Everything a router needs to turn text into tokens and back, so that it needs no model files.

    `tokenizer` is a Hugging Face tokenizers JSON document.
    """

    tokenizer: bytes
    chat_template: str | None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = False  # prepend bos_token to raw prompts (chat templates write their own)
    generation_defaults: dict[str, float] = {}  # generation_config.json: temperature, top_p, top_k, …


ToWorker = Auth | Submit | Cancel | SnapshotRequest | TextAssetsRequest
ToRouter = Challenge | Hello | Refused | Step | Events | Snapshot | Stats | Drain | TextAssets
