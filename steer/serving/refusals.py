"""Refusals in the shape of OpenAI's API: {"error": {message, type, param, code, detail}}.

detail has where, expected, got and fix. Left out: what is refused, and when.
"""

import json
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette import exceptions

from activations.errors import EngineError, SaekitError
from steer.browser.guard import detail_of, refusal
from steer.serving.desk import UnknownModelError
from steer.serving.engine import TooLongError

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
CODES_OF_ERRORS = {UnknownModelError: "model_not_found", TooLongError: "context_length_exceeded"}
"""by which clients know what to do, such as to shorten a conversation"""


def answer_of(refused: exceptions.HTTPException) -> JSONResponse:
    """A refusal in the shape of OpenAI's API."""
    return JSONResponse(_error_of(refused), refused.status_code, refused.headers)


def _error_of(refused: exceptions.HTTPException) -> dict[str, Any]:
    detail: Any = refused.detail
    kind = TYPES.get(refused.status_code, "server_error" if refused.status_code >= 500 else "invalid_request_error")
    if not isinstance(detail, dict):
        return {"error": {"message": str(detail), "type": kind, "param": None, "code": None, "detail": None}}
    code = detail.pop("code", None) or CODES.get(refused.status_code)
    message = f"{detail['where']}: expected {detail['expected']}, got {detail['got']}. {detail['fix']}"
    return {"error": {"message": message, "type": kind, "param": detail["where"], "code": code, "detail": detail}}


def event_of(refused: exceptions.HTTPException) -> str:
    """The same as an event of a stream."""
    return f"data: {json.dumps(_error_of(refused))}\n\n"


def late() -> HTTPException:
    """Of an answer that took too long."""
    fix = "Ask for fewer tokens, or try again later."
    return refusal(504, "server", expected="an answer in time", got="a part of one", fix=fix)


def refusal_of(error: SaekitError) -> HTTPException:
    """What an error is over HTTP."""
    status = 404 if isinstance(error, UnknownModelError) else 500 if isinstance(error, EngineError) else 400
    return HTTPException(status, {**detail_of(error), "code": CODES_OF_ERRORS.get(type(error))})


async def as_answer(request: Request, error: Exception) -> JSONResponse:
    """What the application makes of anything that a route raises."""
    if isinstance(error, SaekitError):
        return answer_of(refusal_of(error))
    if isinstance(error, exceptions.HTTPException):
        return answer_of(error)
    if isinstance(error, UnicodeEncodeError):  # JSON can spell half a character, which nothing can read
        got = repr(error.object)[:100]
        return answer_of(refusal(400, "request", expected="text of whole characters", got=got, fix="Correct it."))
    if not isinstance(error, RequestValidationError):
        got, fix = type(error).__name__, "Tell whoever runs the server."
        return answer_of(refusal(500, "server", expected="an answer", got=got, fix=fix))
    # Where a text or a list may stand, what is wrong inside the list is behind its being no text.
    first = max(error.errors(), key=lambda each: len(each["loc"]))
    if isinstance(first.get("input"), bytes):  # a body that is not said to be JSON comes as it was sent
        got, fix = request.headers.get("content-type", "none")[:100], "Send the header content-type: application/json."
        return answer_of(refusal(400, "content-type", expected="application/json", got=got, fix=fix))
    where, got = ".".join(str(part) for part in first["loc"][1:]) or "body", repr(first.get("input"))[:100]
    if first["type"] == "extra_forbidden":
        detail = {"where": where, "expected": "only what can be done here", "got": got, "fix": "Leave it out."}
        return answer_of(HTTPException(400, {**detail, "code": "unsupported_parameter"}))
    return answer_of(refusal(400, where, expected=first["msg"], got=got, fix="Correct it."))
