"""A request that gets no answer, as OpenAI's error object."""

from collections.abc import Mapping
from typing import Any

_MOST_CHARACTERS = 4000


class RefusedError(Exception):
    """Why a request gets no answer.

    Args:
        param: the field to blame.
        code: a word for programs.
        headers: more of the response's.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        if len(message) > _MOST_CHARACTERS:
            message = message[:_MOST_CHARACTERS] + "..."
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.content: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }
