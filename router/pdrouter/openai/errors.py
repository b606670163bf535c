"""Errors as an OpenAI client expects them: `{"error": {"message", "type", "param", "code"}}`."""

from http import HTTPStatus

import orjson

_KINDS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    413: "RequestTooLargeError",
    414: "TargetTooLongError",
    415: "UnsupportedMediaTypeError",
    431: "RequestHeaderFieldsTooLargeError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


def error_body(status: int, message: str, leg: str | None = None) -> bytes:
    """Encode an error; `leg` names the leg of the handoff that failed (`prefill`, `decode`)."""
    kind = _KINDS.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    error: dict[str, object] = {"message": message, "type": kind, "param": None, "code": status}
    if leg is not None:
        error["leg"] = leg
    return orjson.dumps({"error": error})


class RequestError(Exception):
    """A request that cannot be served as it is; the message tells the client why, `reason` is one word for metrics."""

    def __init__(self, status: int, message: str, reason: str = "body") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason

    def body(self) -> bytes:
        """Encode for the client."""
        return error_body(self.status, self.message)
