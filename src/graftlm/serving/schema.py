"""What clients send: OpenAI's request bodies, and the fields that vLLM's clients add.

A field that is not known here is refused by name, with the nearest known one: a setting that is passed over in silence
would give other text than what was asked for. Fields that carry no computation (`user`, `metadata`, …) are taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .tools import CLOSE

#: taken and not used: they say who asks, or how a hosted service bills and stores
Neutral = Any
MOST_CHOICES = 128
MOST_INPUTS = 2048  # texts of one request for embeddings, as OpenAI has it
Id = Annotated[int, Field(ge=0, strict=True)]
#: a text, token ids, or several of either
Texts = str | list[str] | list[Id] | list[list[Id]]


def one_by_one(given: Any) -> list[str | list[int]]:
    """`Texts` as a list of them."""
    if isinstance(given, str):
        return [given]
    return [given] if isinstance(given[0], int) else list(given)


def some(given: Any) -> Any:
    """`Texts` that are not none at all."""
    if given == []:
        raise ValueError("an empty list: expected one text at least")
    return given


class Body(BaseModel):
    """What all bodies share."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Body):
    """What chunks tell of tokens: the last one of all (`include_usage`), or each of them so far (vLLM's other)."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class JsonSchema(Body):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, `json_object`, `json_schema`, or (ours) `regex` with `pattern`."""

    type: Literal["text", "json_object", "json_schema", "regex"] = "text"
    json_schema: JsonSchema | None = None
    pattern: str | None = None

    @model_validator(mode="after")
    def complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema: {name, schema}")
        if self.type == "regex" and not self.pattern:
            raise ValueError("response_format of type regex needs pattern")
        return self


class Generation(Body):
    """What chat and completions share."""

    model: str
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: Neutral = None
    metadata: Neutral = None
    store: Neutral = None
    service_tier: Neutral = None
    prompt_cache_key: Neutral = None
    safety_identifier: Neutral = None

    @field_validator("stop")
    @classmethod
    def few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if len(texts) > 16 or not all(texts):
            raise ValueError("stop takes up to 16 texts, none of them empty")
        return value

    @model_validator(mode="after")
    def streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def streaming(self) -> StreamOptions:
        return self.stream_options or StreamOptions()


class TextPart(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: Literal["text", "input_text", "refusal"]
    text: str = ""


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(BaseModel):
    """One turn. Content in parts is joined; parts that are no text are refused, as no base here sees images."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls is not None):
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Body):
    name: str = Field(pattern=r"^[\w.\-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among tools: {names}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if len(set(names)) < len(names):
            raise ValueError(f"tools holds one name twice: {names}")
        return self

    @property
    def forced(self) -> bool:
        """Whether the answer has to be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def calls(self) -> int | None:
        """How many calls an answer may hold; None: any number."""
        return 1 if self.parallel_tool_calls is False else None

    @property
    def stops(self) -> tuple[str, ...]:
        free = bool(self.tools) and self.tool_choice != "none" and not self.forced
        return (*super().stops, CLOSE) if free and self.calls == 1 else super().stops


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Texts
    max_tokens: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20)
    suffix: None = None

    _some = field_validator("prompt")(some)

    @model_validator(mode="after")
    def consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of={self.best_of} is less than n={self.n or 1}")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError("best_of cannot be streamed: the best is known at the end")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        return one_by_one(self.prompt)


class EmbeddingRequest(Body):
    """POST /v1/embeddings. `pooling`, ours: the mean of the last hidden states, or the last token's."""

    model: str
    input: Texts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    pooling: Literal["mean", "last"] = "mean"
    user: Neutral = None

    _some = field_validator("input")(some)

    @property
    def inputs(self) -> list[str | list[int]]:
        return one_by_one(self.input)


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of the two")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class LoadRequest(Body):
    """POST /v1/load_lora_adapter, as vLLM has it; an adapter of any kind."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)
    load_inplace: bool = False
    pinned: bool = False


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
