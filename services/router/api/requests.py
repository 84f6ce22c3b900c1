"""Request objects: types, ranges and what each field does. The OpenAPI document is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

MAX_CHOICES = 8
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOP_K = 2**31 - 1  # what workers count with
MAX_SCHEDULING_PRIORITY = 10
MAX_RANGES = 64
MAX_TOOLS = 128
MAX_PROMPTS = 128

NonNegative = Annotated[int, Meta(ge=0)]
TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
CachePriority = Annotated[
    int,
    Meta(ge=0, le=100, description="How long to keep the blocks: higher ones are evicted later; 35 is usual"),
]
CacheTtl = Annotated[
    float, Meta(gt=0, le=31_536_000, description="Seconds after the last use for which the priority holds")
]
OnlyFalse = Annotated[bool, Meta(extra_json_schema={"const": False})]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class Input(msgspec.Struct, forbid_unknown_fields=True):
    """Base of everything a client sends: fields that are not declared are refused by name."""


class StreamOptions(Input):
    include_usage: Annotated[
        bool | None, Meta(description="End the stream with a chunk that carries `usage` and no choices")
    ] = None
    include_obfuscation: OnlyFalse | None = None


class RetentionRange(Input):
    """Tokens `start` to `end` of the prompt and how long to keep their blocks."""

    start: NonNegative
    end: Annotated[int, Meta(ge=1)] | None = None
    priority: CachePriority = 35
    ttl_s: CacheTtl | None = None


class JsonSchema(Input):
    name: str
    description: str | None = None
    schema: Annotated[dict[str, Any] | None, Meta(description="A JSON schema. Default: any JSON object")] = (
        None
    )
    strict: Annotated[
        bool | None, Meta(description="Refuse keywords that cannot be enforced, which are ignored otherwise")
    ] = None


class ResponseFormat(Input):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Meta(description="With type `json_schema` only")] = None


JsonForm = Annotated[dict[str, Any] | str, Meta(description="A JSON schema, as an object or in a string")]
Regex = Annotated[
    str, Meta(min_length=1, description="A regular expression (of Rust's regex crate) for the whole answer")
]
Choices = Annotated[list[str], Meta(min_length=1, description="The answer is one of these")]
Grammar = Annotated[str, Meta(min_length=1, description="A grammar in Lark's or llama.cpp's (GBNF) language")]


class StructuredOutputs(Input):
    """One form of the answer, as vLLM has it since 0.12."""

    json: JsonForm | None = None
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: Annotated[bool | None, Meta(description="The answer is a JSON object")] = None


class Sampling(Input):
    """What both kinds of completion have in common."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Answers to generate")] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    min_tokens: (
        Annotated[NonNegative, Meta(description="No end of sequence before so many tokens")] | None
    ) = None
    temperature: (
        Annotated[
            float,
            Meta(ge=0, le=2, description="0 is greedy. Default: the model's generation config, else 1"),
        ]
        | None
    ) = None
    top_p: (
        Annotated[float, Meta(gt=0, le=1, description="Default: the model's generation config, else 1")]
        | None
    ) = None
    top_k: (
        Annotated[
            int,
            Meta(
                ge=-1,
                le=MAX_TOP_K,
                description="0 and -1: off. Default: the model's generation config, else off",
            ),
        ]
        | None
    ) = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: (
        Annotated[float, Meta(gt=0, le=10, description="Default: the model's generation config, else 1")]
        | None
    ) = None
    seed: (
        Annotated[int, Meta(description="Same seed and request, same text; a signed 64-bit integer")] | None
    ) = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None,
        Meta(description=f"Token id to a value added to its logit; at most {MAX_LOGIT_BIASES}"),
    ] = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonForm | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    priority: (
        Annotated[
            int,
            Meta(ge=0, le=MAX_SCHEDULING_PRIORITY, description="Scheduling class: higher is served first"),
        ]
        | None
    ) = None
    retention: Annotated[
        Annotated[list[RetentionRange], Meta(max_length=MAX_RANGES)] | None,
        Meta(description="Disjoint ranges of prompt tokens and how long their KV blocks are to be kept"),
    ] = None
    user: Annotated[str | None, Meta(description="No effect")] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="No effect")] = None
    safety_identifier: Annotated[str | None, Meta(description="No effect")] = None
    prompt_cache_key: Annotated[
        str | None, Meta(description="No effect: equal prefixes are found without a key")
    ] = None
    service_tier: Literal["auto", "default"] | None = None


class TextPart(Input):
    """A part of a message's content. Only text is supported."""

    type: Literal["text"]
    text: str


class FunctionCall(Input):
    name: str
    arguments: Annotated[str, Meta(description="A JSON object, as a string")]


class ToolCall(Input):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Input):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: Annotated[
        str | None, Meta(description="An assistant's thoughts, for templates that want them back")
    ] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    audio: Annotated[None, Meta(description="Not supported")] = None
    function_call: Annotated[None, Meta(description="Not supported")] = None
    annotations: Annotated[list[None], Meta(max_length=0, description="Not supported")] | None = None
    cache_priority: Annotated[CachePriority | None, Meta(description="`retention` of this message")] = None
    cache_ttl_s: CacheTtl | None = None


class FunctionDefinition(Input):
    name: str
    description: str | None = None
    parameters: Annotated[
        dict[str, Any] | None, Meta(description="A JSON schema of an object. Default: any object")
    ] = None
    strict: Annotated[
        bool | None, Meta(description="Arguments always fit the schema, all of whose keywords are enforced")
    ] = None


class Tool(Input):
    type: Literal["function"]
    function: FunctionDefinition


class ToolName(Input):
    name: str


class NamedTool(Input):
    """The one function that must be called."""

    type: Literal["function"]
    function: ToolName


class ChatRequest(Sampling, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="Wins over max_tokens. Default: what the model's context leaves"),
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[
        Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None,
        Meta(description="Functions that the model may call"),
    ] = None
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | NamedTool | None,
        Meta(description="Default: auto. With `required` or a function's name the answer is calls only"),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="false: at most one call. Default: true")
    ] = None
    modalities: list[Literal["text"]] | None = None
    store: OnlyFalse | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Variables for the model's chat template")
    ] = None


class CompletionRequest(Sampling, kw_only=True):
    """Body of POST /v1/completions. `max_tokens` is 16 by default, as OpenAI has it."""

    prompt: (
        Annotated[str, Meta(min_length=1)]
        | Annotated[
            list[int | Annotated[str, Meta(min_length=1)] | Annotated[list[int], Meta(min_length=1)]],
            Meta(
                min_length=1,
                description=f"Token ids; or up to {MAX_PROMPTS} prompts, each a text or token ids",
                extra_json_schema={
                    "anyOf": [
                        {"items": {"type": "integer"}},
                        {"items": {"type": "string", "minLength": 1}, "maxItems": MAX_PROMPTS},
                        {
                            "items": {"type": "array", "items": {"type": "integer"}, "minItems": 1},
                            "maxItems": MAX_PROMPTS,
                        },
                    ]
                },
            ),
        ]
    )
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=1, description="Only 1 is supported")] | None = None
    echo: Annotated[
        bool | None, Meta(description="The prompt comes before its answer; not with `logprobs`")
    ] = None
    suffix: Annotated[None, Meta(description="Not supported")] = None
