"""Errors that a user can act on. Anything else keeps its traceback.

A `UserError` is one sentence that names the thing and a hint with the fix. It becomes a toast in
the page, a JSON error with `status` in the API, and exit code 2 in the shell.
"""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a condition that the user can mend.

    Args:
        message: one sentence naming the thing that is wrong.
        hint: what to do about it; empty if the message says it already.
        field: the parameter at fault, for the API's `param`.
    """

    status = 400  # HTTP status
    code = "invalid_request"  # machine-readable, OpenAI's words where it has one

    def __init__(self, message: str, hint: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class ContextLengthError(UserError):
    """Prompt (and the tokens asked for) do not fit into the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(UserError):
    """A request names a model that is not served here."""

    status = 404
    code = "model_not_found"


class AuthError(UserError):
    """No key, or a wrong one."""

    status = 401
    code = "invalid_api_key"


class OverloadedError(UserError):
    """The queue is full; try again later."""

    status = 503
    code = "overloaded"


class EngineNotReadyError(UserError):
    """The model is still loading, or being loaded again."""

    status = 503
    code = "engine_not_ready"


class EngineDeadError(UserError):
    """The engine died while it worked on the request; the request may be sent again."""

    status = 500
    code = "engine_died"


class RemoteError(UserError):
    """A remote api_server cannot be reached, is no api_server, or answered with an error."""

    status = 502
    code = "remote_error"
