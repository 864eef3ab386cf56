"""What a client is told when its request is refused: OpenAI's error object, and never a traceback."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from posttrain.errors import UserError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """For the OpenAPI document."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer with an HTTP status of 400 or more. param: the field of the body that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: UserError) -> "ApiError":
        """A mistake in a request, in the words of whoever noticed it: `field: what is wrong`."""
        field, colon, _ = str(error).partition(": ")
        return cls(400, str(error), field if colon and " " not in field else None)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """ASCII, so that whatever a client sent can be quoted: text may hold halves of surrogate pairs, bytes may not."""
    return Response(json.dumps(body), status, dict(headers or {}), "application/json")
