"""The endpoints that are asked rarely: models, health, metrics, documentation."""

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
from services.router.metrics import RouterMetrics
from services.router.tenants import Tenants
from services.router.workers import ServedModel, WorkerPool

#: Of the HTTP API, as /openapi.json gives it.
API_VERSION = "1.0"

_REFERENCE = "#/components/schemas/{name}"

_DESCRIPTION = """OpenAI-compatible inference over a fleet of workers that share their prefix caches.

Fields that are not listed are refused by name. `retention` and a message's `cache_priority` say how long the
KV blocks of a prompt are to be kept; answers carry the worker chosen and why in the header `x-reprise-route`.
"""


def make_cold_app(pool: WorkerPool, tenants: Tenants, metrics: RouterMetrics) -> FastAPI:
    """A FastAPI application around the router's state."""
    app = FastAPI(title="Reprise router", version=API_VERSION, description=_DESCRIPTION)
    app.add_exception_handler(ApiError, _api_error)
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
            paths["/v1/models/{name}"]["get"]["responses"]["404"] = _content("No such model", "ErrorBody")
            paths["/ready"]["get"]["responses"]["503"] = {"description": "No worker is ready"}
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _generation(summary: str, request: str, answer: str) -> dict[str, Any]:
    done = _content("The answer; with `stream`, server-sent events that end with [DONE]", answer)
    done["content"]["text/event-stream"] = {}  # OpenAPI 3.1 has no words for the events of a stream
    done["headers"] = {
        "x-reprise-route": {
            "description": "The worker chosen, what was predicted, the prefix hits by tier, and the reason",
            "schema": {"type": "string"},
        }
    }
    errors = {
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
