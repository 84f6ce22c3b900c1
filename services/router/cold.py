"""The endpoints that are asked rarely: models, tokens of a text, health, metrics, documentation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from services.router.api.errors import ApiError, ErrorBody, failed, invalid
from services.router.api.requests import ChatRequest, CompletionRequest
from services.router.api.responses import ChatCompletion, ModelList, ModelObject, TextCompletion
from services.router.body import read_json_body
from services.router.config import RouterConfig
from services.router.metrics import RouterMetrics
from services.router.prompt import PromptBuilder
from services.router.relay import ClientGone
from services.router.tenants import Tenants
from services.router.tokenize import (
    Detokenized,
    DetokenizeRequest,
    TokenizeRequest,
    Tokenizing,
    Tokens,
)
from services.router.workers import ServedModel, WorkerPool

#: Of the HTTP API, as /openapi.json gives it.
API_VERSION = "1.0"

_REFERENCE = "#/components/schemas/{name}"

_DESCRIPTION = """OpenAI-compatible inference over a fleet of workers that share their prefix caches.

Fields that are not listed are refused by name. `retention` and a message's `cache_priority` say how long the
KV blocks of a prompt are to be kept; answers carry the worker chosen and why in the header `x-reprise-route`.
"""


def make_cold_app(
    config: RouterConfig,
    pool: WorkerPool,
    tenants: Tenants,
    metrics: RouterMetrics,
    prompts: PromptBuilder,
) -> FastAPI:
    """A FastAPI application around the router's state."""
    app = FastAPI(title="Reprise router", version=API_VERSION, description=_DESCRIPTION)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _internal_error)

    def known(request: Request) -> None:
        tenants.identify(request.headers.get("authorization", "").encode("latin-1") or None)

    @app.get("/v1/models", summary="Models with at least one ready worker", dependencies=[Depends(known)])
    async def models() -> Response:
        return _json(ModelList("list", [_model(model) for model in pool.models.values() if model.workers]))

    @app.get("/v1/models/{name:path}", summary="One model, by name or alias", dependencies=[Depends(known)])
    async def one_model(name: str) -> Response:
        model = pool.find(name)
        if model is None:
            raise invalid(f"model: {name[:100]!r} is not served here", "model", "model_not_found", status=404)
        return _json(_model(model))

    tokenizing = Tokenizing(pool, prompts)

    async def body_of(request: Request) -> bytes:
        headers = dict(request.scope["headers"])
        return await read_json_body(headers, request.receive, config.max_body_bytes, config.body_timeout_s)

    @app.post("/tokenize", summary="The tokens that a prompt becomes", dependencies=[Depends(known)])
    async def tokenize(request: Request) -> Response:
        return _json(await tokenizing.tokenize(await body_of(request)))

    @app.post("/detokenize", summary="The text of tokens", dependencies=[Depends(known)])
    async def detokenize(request: Request) -> Response:
        return _json(await tokenizing.detokenize(await body_of(request)))

    @app.post("/v1/embeddings", include_in_schema=False, dependencies=[Depends(known)])
    async def embeddings() -> Response:
        message = "embeddings are not supported: the models served here generate text"
        raise invalid(message, code="unsupported_endpoint", status=404)

    @app.get("/health", summary="The process answers")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="At least one worker can be given requests; 503 otherwise")
    async def ready(response: Response) -> dict[str, Any]:
        response.status_code = 200 if pool.ready else 503
        problems = {str(worker.address): worker.problem for worker in pool.workers.values() if worker.problem}
        return {"ready_workers": pool.ready, "workers": len(pool.workers), "problems": problems}

    @app.get("/metrics", summary="Prometheus metrics, all named reprise_router_*")
    async def scrape() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.openapi = _documented(app)  # type: ignore[method-assign]
    return app


def _model(model: ServedModel) -> ModelObject:
    card = model.card
    return ModelObject(
        id=card.name,
        object="model",
        created=model.created,
        owned_by="reprise",
        max_model_len=card.max_model_len,
        vocab_size=card.vocab_size,
        aliases=list(card.aliases),
    )


# ---- errors --------------------------------------------------------------------------------------


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, dict(error.headers), "application/json")


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    answer = invalid(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
    return Response(answer.body(), error.status_code, error.headers, "application/json")


async def _internal_error(_: Request, error: Exception) -> Response:
    return Response(failed("internal error", "internal_error").body(), 500, None, "application/json")


# ---- OpenAPI -------------------------------------------------------------------------------------


def _documented(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """FastAPI's document of the routes above, with the two that it does not serve added from the structs
    that do."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            structs = (
                ChatRequest,
                CompletionRequest,
                ChatCompletion,
                TextCompletion,
                ErrorBody,
                ModelList,
                ModelObject,
                TokenizeRequest,
                Tokens,
                DetokenizeRequest,
                Detokenized,
            )
            _, schemas = msgspec.json.schema_components(structs, ref_template=_REFERENCE)
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
            paths = document["paths"]
            paths["/v1/chat/completions"] = _generation(
                "Continue a conversation", "ChatRequest", "ChatCompletion"
            )
            paths["/v1/completions"] = _generation("Continue a text", "CompletionRequest", "TextCompletion")
            for path, answer in (("/v1/models", "ModelList"), ("/v1/models/{name}", "ModelObject")):
                responses = paths[path]["get"]["responses"]
                responses["200"] = _content("The answer", answer)
                responses["401"] = _content("No valid API key", "ErrorBody")
            paths["/tokenize"] = _posted("The tokens that a prompt becomes", "TokenizeRequest", "Tokens")
            paths["/detokenize"] = _posted("The text of tokens", "DetokenizeRequest", "Detokenized")
            paths["/v1/models/{name}"]["get"]["responses"]["404"] = _content("No such model", "ErrorBody")
            paths["/ready"]["get"]["responses"]["503"] = {"description": "No worker is ready"}
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _posted(summary: str, request: str, answer: str) -> dict[str, Any]:
    errors = {status: text for status, text in _ERRORS.items() if status not in ("429", "500")}
    return _post(summary, request, _content("The answer", answer), errors)


def _generation(summary: str, request: str, answer: str) -> dict[str, Any]:
    done = _content("The answer; with `stream`, server-sent events that end with [DONE]", answer)
    done["content"]["text/event-stream"] = {}  # OpenAPI 3.1 has no words for the events of a stream
    done["headers"] = {
        "x-reprise-route": {
            "description": "The worker chosen, what was predicted, the prefix hits by tier, and the reason",
            "schema": {"type": "string"},
        }
    }
    return _post(summary, request, done, _ERRORS)


_ERRORS = {
    "400": "The request is not valid; `param` names the field",
    "401": "No valid API key",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "The queue is full; see Retry-After",
    "500": "The worker failed",
    "503": "No worker can serve this now",
}


def _post(summary: str, request: str, done: dict[str, Any], errors: dict[str, str]) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(name=request)}}},
            },
            "responses": {"200": done}
            | {status: _content(description, "ErrorBody") for status, description in errors.items()},
        }
    }


def _content(description: str, schema: str) -> dict[str, Any]:
    reference = {"$ref": _REFERENCE.format(name=schema)}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
