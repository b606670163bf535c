"""Requests as vLLM 0.32 reads them: fields, limits and the sentences with which it refuses."""

import json
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pdsim.engine.sequence import Sampling
from pdsim.engine.tokenizer import Tokenizer

MAX_LOGPROBS = 20
Body = TypeVar("Body", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0)]


class RequestError(Exception):
    """A request that vLLM refuses.

    Args:
        message: vLLM's sentence.
        param: the field it is about.
        status: HTTP status, also the error's `code`.
        kind: the error's `type`.

    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.kind = message, param, status, kind

    def body(self) -> dict[str, Any]:
        """Give the OpenAI error object."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}


def refuse(message: str, parameter: str, value: Any = None) -> RequestError:
    """Make the error of vLLM's VLLMValidationError, which names parameter and value behind its sentence."""
    tail = f"parameter={parameter}" if value is None else f"parameter={parameter}, value={value}"
    return RequestError(f"{message} ({tail})", parameter)


class StreamOptions(BaseModel):
    """`stream_options`."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationRequest(BaseModel):
    """Fields that completions and chat completions share."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    echo: bool | None = False
    kv_transfer_params: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    suffix: str | None = None


class ChatMessage(BaseModel):
    """One message; content is text or a list of parts."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class TokenizeRequest(BaseModel):
    """Body of /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)


def _located(parts: tuple[int | str, ...]) -> str:
    # pydantic names the branches of a union in the path (`list[...]`, `str`); vLLM leaves these out
    kept = [str(part) for part in parts if part not in ("str", "int") and "[" not in str(part)]
    return ".".join(["body", *kept])


def _validation_error(errors: list[dict[str, Any]]) -> RequestError:
    lines = []
    for error in errors:
        told = {"type": error["type"], "loc": error["loc"], "msg": error["msg"], "input": error["input"]}
        if error.get("ctx"):
            told["ctx"] = error["ctx"]
        lines.append(f"  {told}")
    count = "1 validation error" if len(lines) == 1 else f"{len(lines)} validation errors"
    return RequestError("\n".join([f"{count}:", *lines]), errors[0]["loc"], kind="Bad Request")


def parse(kind: type[Body], content: bytes) -> tuple[Body, dict[str, Any]]:
    """Read a body; give it validated and raw.

    Raises:
        RequestError: it is no JSON object of that kind, in the words of FastAPI and vLLM.

    """
    if not content:
        raise _validation_error([{"type": "missing", "loc": "body", "msg": "Field required", "input": "None"}])
    try:
        raw = orjson.loads(content)
    except orjson.JSONDecodeError:
        raw = _parse_strictly(content)
    if not isinstance(raw, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise _validation_error(
            [{"type": "model_attributes_type", "loc": "body", "msg": message, "input": _shown(raw)}]
        )
    try:
        return kind.model_validate(raw), raw
    except ValidationError as error:
        found = [
            {
                "type": item["type"],
                "loc": _located(item["loc"]),
                "msg": item["msg"],
                "input": _shown(item["input"]),
                "ctx": item.get("ctx"),
            }
            for item in error.errors(include_url=False)
        ]
        raise _validation_error(found) from error


def _parse_strictly(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        position = getattr(error, "pos", 0)
        detail = getattr(error, "msg", str(error))
        raise _validation_error(
            [
                {
                    "type": "json_invalid",
                    "loc": f"body.{position}",
                    "msg": "JSON decode error",
                    "input": "<dict of 0 items>",
                    "ctx": {"error": detail},
                }
            ]
        ) from error


@dataclass(frozen=True, slots=True)
class Limits:
    """What the model can take."""

    model: str
    max_model_len: int
    vocabulary: int


def check_model(name: str | None, limits: Limits) -> None:
    """Refuse another model's name."""
    if name is not None and name != limits.model:
        message = f"The model `{name}` does not exist. Valid aliases: {limits.model}."
        raise RequestError(message, "model", 404, "NotFoundError")


def check_body(request: CompletionRequest | ChatRequest) -> None:
    """Refuse what vLLM's request models refuse while they are read, before the engine hears of the request."""
    if request.stream_options is not None and not request.stream:
        raise refuse("Stream options can only be defined when `stream=True`.", "stream_options")
    if request.prompt_logprobs is not None:
        if request.stream and request.prompt_logprobs >= 0:
            raise refuse("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        if request.prompt_logprobs < 0:
            raise refuse(
                "`prompt_logprobs` must be a positive value or -1.", "prompt_logprobs", request.prompt_logprobs
            )
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise refuse("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    elif request.prompt is None or request.prompt == "":
        raise refuse("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")


def check_fields(request: CompletionRequest | ChatRequest) -> None:
    """Refuse what vLLM refuses of a well-formed request before anything is tokenized."""
    if isinstance(request, ChatRequest):
        if request.tools and request.tool_choice in (None, "auto"):
            raise RequestError('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        if not request.messages:
            raise RequestError("Cannot apply chat template to an empty conversation. Provide at least one message.")
    else:
        if request.suffix:
            raise RequestError("suffix is only supported for models with FIM completion rendering", "suffix")
        if request.prompt == []:
            raise RequestError("You must pass at least one prompt")


def is_text(request: CompletionRequest | ChatRequest) -> bool:
    """Whether the prompts of a request have to be tokenized."""
    if isinstance(request, ChatRequest) or isinstance(request.prompt, str):
        return True
    return isinstance(request.prompt, list) and isinstance(request.prompt[0], str)


def prompts_of(request: CompletionRequest | ChatRequest, tokenizer: Tokenizer, limits: Limits) -> list[list[int]]:
    """Give the token ids of the prompts of a request.

    Raises:
        RequestError: a token is unknown or a prompt too long.

    """
    if isinstance(request, ChatRequest):
        messages = [{"role": message.role, "content": _flat(message.content)} for message in request.messages]
        texts: list[str | list[int]] = [
            tokenizer.chat(messages, request.add_generation_prompt, request.continue_final_message)
        ]
    else:
        prompt = request.prompt
        many = isinstance(prompt, list) and isinstance(prompt[0], str | list)
        texts = list(prompt) if many else [prompt]  # type: ignore[arg-type,list-item]
    prompts = [tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
    for prompt_ids in prompts:
        if max(prompt_ids, default=0) >= limits.vocabulary:
            unknown = next(token for token in prompt_ids if token >= limits.vocabulary)
            raise RequestError(f"Token id {unknown} is out of vocabulary")
        if len(prompt_ids) > limits.max_model_len:
            # text is tokenized only one token further than fits
            count, told = len(prompt_ids), str(len(prompt_ids))
            if is_text(request):
                count, told = limits.max_model_len + 1, f"at least {limits.max_model_len + 1}"
            message = (
                f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
                f"{told} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                "length of the input prompt."
            )
            raise refuse(message, "input_tokens", count)
    return prompts


def _flat(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return content or ""


def sampling_of(request: CompletionRequest | ChatRequest, prompt_tokens: int, limits: Limits, seed: int) -> Sampling:
    """Give the sampling parameters for one prompt; `seed` is used when the request brings none.

    Raises:
        RequestError: a parameter is out of its range, in vLLM's words and order.

    """
    room = limits.max_model_len - prompt_tokens
    if isinstance(request, ChatRequest):
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is None and request.echo:
            prompt_logprobs = logprobs or 0
    else:
        wanted = 16 if request.max_tokens is None else request.max_tokens
        if request.echo and wanted == 0:
            wanted = 1
        logprobs = request.logprobs
        prompt_logprobs = request.prompt_logprobs
        if prompt_logprobs is None and request.echo:
            prompt_logprobs = logprobs
    if wanted is not None and wanted > limits.max_model_len:
        message = (
            f"max_tokens={wanted} cannot be greater than max_model_len={limits.max_model_len}. "
            "Please request fewer output tokens."
        )
        raise refuse(message, "max_tokens", wanted)
    max_tokens = room if wanted is None else min(wanted, room)
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = request.top_k or 0
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if request.n < 1:
        raise RequestError(f"n must be at least 1, got {request.n}.")
    if temperature < 0:
        raise refuse(f"temperature must be non-negative, got {temperature}.", "temperature", temperature)
    if not 0 < top_p <= 1:
        raise refuse(f"top_p must be in (0, 1], got {top_p}.", "top_p", top_p)
    if top_k < -1:
        raise RequestError(f"top_k must be 0 (disable), or at least 1, got {top_k}.")
    if max_tokens < 1:
        raise refuse(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    if request.min_tokens < 0:
        raise RequestError(f"min_tokens must be greater than or equal to 0, got {request.min_tokens}.")
    if request.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {request.min_tokens}."
        )
    if logprobs is not None and logprobs > MAX_LOGPROBS:
        message = f"Requested sample logprobs of {logprobs}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise refuse(message, "logprobs", logprobs)
    if prompt_logprobs is not None and prompt_logprobs > MAX_LOGPROBS:
        message = f"Requested prompt logprobs of {prompt_logprobs}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise refuse(message, "prompt_logprobs", prompt_logprobs)
    if "" in stop:
        raise RequestError("stop cannot contain an empty string.")
    if request.n > 1 and temperature == 0:
        raise RequestError(f"n must be 1 when using greedy sampling, got {request.n}.")
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        seed=seed if request.seed is None else request.seed,
        min_tokens=request.min_tokens,
        ignore_eos=request.ignore_eos,
        stop=tuple(stop),
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        include_stop=request.include_stop_str_in_output,
        skip_special=request.skip_special_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed=frozenset(request.allowed_token_ids or ()),
        bias={int(token): value for token, value in (request.logit_bias or {}).items()},
    )
