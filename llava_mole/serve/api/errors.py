"""Errors in OpenAI's form, and which of ours they stand for."""

from typing import Any

from llava_mole.common.errors import ConfigError, ContextError, DataError
from llava_mole.inference.engine import BusyError, ClosedError

RETRY_SECONDS = "1"


class ApiError(Exception):
    """A request that is answered with an error object: HTTP status, message, and OpenAI's `type`, `code`, `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": RETRY_SECONDS} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """The JSON object `{"error": ...}`."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def internal(message: str = "internal error") -> ApiError:
    """Status 500: not the request's fault."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a request gets for an error of the package; `param` names the part of the request that caused it."""
    if isinstance(error, ApiError):
        return error
    message = getattr(error, "problem", None) or str(error)  # a PromptError without "prompt 0:"
    if isinstance(error, ContextError):
        return ApiError(400, message, code="context_length_exceeded", param=param)
    if isinstance(error, BusyError):
        return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, ClosedError):
        return ApiError(503, message, kind="server_error", code="server_shutting_down")
    if isinstance(error, (DataError, ConfigError)):
        return ApiError(400, message, code="invalid_value", param=param)
    return internal()
