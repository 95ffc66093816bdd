"""From a checked request body to the engine's requests."""

from collections.abc import Sequence

import numpy as np

from llmopt.optimizer.lora.adapter_file import AdapterFile
from llmopt.runtime.build import Build
from llmopt.runtime.request import Generation, Request, Sender
from llmopt.runtime.sampler import Sampling
from llmopt.runtime.server.errors import ApiError
from llmopt.runtime.server.protocol import ChatBody, CompletionBody, GenerationBody
from llmopt.runtime.structured.grammar import Grammar
from llmopt.runtime.text import TextStream

__all__ = ["chat_prompt", "completion_parts", "completion_prompts", "make_requests"]

_DEFAULT_COMPLETION_TOKENS = 16  # as in the OpenAI API


def completion_parts(body: CompletionBody) -> Sequence[str | list[int]]:
    """Each prompt as it was sent, in any of the four forms the API allows."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [[token for token in prompt if isinstance(token, int)]]
    return [part for part in prompt if not isinstance(part, int)]


def completion_prompts(body: CompletionBody, build: Build) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        ApiError: 400 for an empty prompt or an unknown token.
    """
    prompts = [
        build.tokenizer.encode(part, add_special_tokens=body.add_special_tokens) if isinstance(part, str) else part
        for part in completion_parts(body)
    ]
    vocab = build.backend.engine.vocab_size
    for ids in prompts:
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if not all(0 <= token < vocab for token in ids):
            raise ApiError(400, f"the prompt has a token outside of 0 .. {vocab - 1}", param="prompt")
    return prompts


def chat_prompt(body: ChatBody, build: Build) -> list[int]:
    """The token ids of a conversation, rendered by the model's chat template.

    Raises:
        ApiError: 400 for content that is not text, or a model without a template.
        InputError: The template does not accept the messages.
    """
    template = build.tokenizer.chat_template
    if template is None:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
    messages = [
        message.model_dump(exclude_unset=True) | {"content": _content(message.content)} for message in body.messages
    ]
    variables = body.chat_template_kwargs or {}
    if taken := {"messages", "add_generation_prompt"} & set(variables):
        raise ApiError(400, f"{min(taken)} is a field of the request itself", param="chat_template_kwargs")
    text = template.render(messages, add_generation_prompt=body.add_generation_prompt, **variables)
    ids = build.tokenizer.encode(text, add_special_tokens=body.add_special_tokens)
    if not ids:
        raise ApiError(400, "the chat template makes an empty prompt of these messages", param="messages")
    return ids


def _content(content: str | list[dict[str, object]] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            raise ApiError(400, f"this model reads text, not {part.get('type')}", param="messages")
        texts.append(text)
    return "\n".join(texts)


def make_requests(
    body: GenerationBody,
    prompts: Sequence[list[int]],
    build: Build,
    *,
    timeout: float | None = None,
    grammar: Grammar | None = None,
    adapter: AdapterFile | None = None,
) -> list[Request]:
    """``n`` requests for each prompt, checked against the model's vocabulary and context.

    Args:
        body: What was asked.
        prompts: The token ids of each prompt.
        build: Who answers.
        timeout: Seconds that each may take; None is no limit.
        grammar: What each answer has to obey.
        adapter: Whose changes of the model answer.

    Raises:
        ApiError: 400 for a token outside of the vocabulary.
        ContextLengthError: A prompt and its answer do not fit.
    """
    vocab = build.backend.engine.vocab_size
    _check_tokens(body, vocab)
    sender = Sender(
        tenant=body.user or "", priority=body.priority or 0, cache_salt=body.cache_salt or "", timeout=timeout
    )
    made = []
    for ids in prompts:
        for choice in range(body.choices):
            request = Request(
                np.array(ids, np.int64),
                _generation(body, len(ids), choice, build),
                text=TextStream(
                    build.tokenizer,
                    stop=body.stop_strings,
                    skip_special_tokens=body.skip_special_tokens,
                    include_stop=body.include_stop_str_in_output,
                    # An answer begins a text of its own; a completion goes on with the prompt's.
                    context=ids if isinstance(body, CompletionBody) else (),
                ),
                sender=sender,
                guide=None if grammar is None else grammar.copy(),
                adapter=adapter,
            )
            request.check(build.backend.capacity, vocab)
            made.append(request)
    return made


def _generation(body: GenerationBody, prompt: int, choice: int, build: Build) -> Generation:
    eos = frozenset[int]() if body.ignore_eos else build.tokenizer.stop_ids
    logprobs = _logprobs(body)
    return Generation(
        max_tokens=_max_tokens(body, prompt, build.backend.capacity),
        min_tokens=body.min_tokens,
        stop_ids=eos | frozenset(body.stop_token_ids or ()),
        sampling=Sampling(
            temperature=_given(body.temperature, 1.0),
            top_k=max(body.top_k or 0, 0),
            top_p=_given(body.top_p, 1.0),
            min_p=_given(body.min_p, 0.0),
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            # Philox takes 128 bits and no sign; the choices of one request draw differently.
            seed=None if body.seed is None else (body.seed + choice) % 2**64,
            logprobs=logprobs,
        ),
        prompt_logprobs=logprobs if isinstance(body, CompletionBody) and body.echo else None,
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _max_tokens(body: GenerationBody, prompt: int, capacity: int) -> int:
    """What was asked for; else 16 for completions, and all that is left of the context for chats."""
    if isinstance(body, ChatBody):
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        return asked if asked is not None else max(capacity - prompt, 1)
    return body.max_tokens if body.max_tokens is not None else _DEFAULT_COMPLETION_TOKENS


def _logprobs(body: GenerationBody) -> int | None:
    """How many alternatives are to be reported, or None for no log-probabilities at all."""
    if isinstance(body, ChatBody):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionBody) else None


def _check_tokens(body: GenerationBody, vocab: int) -> None:
    for name in body.logit_bias or {}:
        if not (name.isdecimal() and int(name) < vocab):
            raise ApiError(400, f"{name!r} is not a token of this model (0 .. {vocab - 1})", param="logit_bias")
    if not all(0 <= token < vocab for token in body.stop_token_ids or ()):
        raise ApiError(400, f"a token is outside of 0 .. {vocab - 1}", param="stop_token_ids")
