"""Answers of the routes other than 200, in the form of OpenAI's errors."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def refusal(status: int, message: str) -> JSONResponse:
    """The answer."""
    kind = {
        403: "PermissionDeniedError", 404: "NotFoundError", 406: "NotAcceptableError", 409: "ConflictError",
        413: "ContentTooLargeError",
    }.get(status, "BadRequestError")  # fmt: skip
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def refuse(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI answers where a route raised a RefusalError."""
    assert isinstance(error, RefusalError)
    return refusal(error.status, str(error))
