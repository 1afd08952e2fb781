"""Prompts as chat models know them: messages, put into text by the tokenizer's template, the same everywhere."""

import datetime

from common.cli import fail

# templates that write the date get this one: what a model reads does not depend on the day it is run
TODAY = datetime.datetime(2025, 1, 1)
CODES = "".join(f" | replace('%{c}', '{TODAY.strftime('%' + c)}')" for c in "aAbBdmyYHIMSp")
STRFTIME = "{%- macro strftime_now(form) %}{{ form" + CODES + " }}{% endmacro %}{{ '' }}"


class Conversation(str):
    """A prompt of several messages. A string for tables, splits and sets; `messages` are what the template gets."""

    def __new__(cls, messages: list[dict]):
        """messages: [{"role": "user", "content": "..."}, ...]"""
        self = super().__new__(cls, "\n".join(f"{m['role']}: {m['content']}" for m in messages))
        self.messages = messages
        return self

    def __getnewargs__(self):
        return (self.messages,)


def render(tokenizer, prompt: str, args, answer: str | None = None) -> str:
    """What the model reads: system prompt, messages, and the beginning of its own turn (or that turn with `answer`).

    A template that adds a beginning-of-text token has added it: tokenize the result without special tokens.
    """
    messages = prompt.messages if isinstance(prompt, Conversation) else [{"role": "user", "content": str(prompt)}]
    if args.system_prompt:
        messages = [{"role": "system", "content": args.system_prompt}, *messages]
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": answer}]
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = STRFTIME + template
    known = {"date_string": TODAY.strftime("%d %b %Y"), "enable_thinking": args.thinking, "chat_template": template}
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None, **known)


def ends(tokenizer, args) -> list[int]:
    """The special token that the template puts behind a model's turn, if it does."""
    if not args.chat:
        return []
    after = render(tokenizer, "?", args, answer="answer").rpartition("answer")[2]
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return [i for i in ids[:1] if tokenizer.added_tokens_decoder.get(i) and tokenizer.added_tokens_decoder[i].special]


def check(tokenizer, args) -> None:
    """The template is there, and takes what the flags ask of it."""
    if not args.chat:
        for flag in ("--system-prompt", "--thinking"):
            if getattr(args, flag[2:].replace("-", "_")):
                fail(f"{flag} is for chat prompts: add --chat")
        return
    name, secret = f"the chat template of '{args.model_name}'", "a system prompt 7391"
    if not tokenizer.chat_template:
        fail(
            f"'{args.model_name}' has no chat template: take a model trained on chats (-Instruct), or leave out --chat"
        )
    try:
        with_system = render(tokenizer, "?", type(args)(chat=True, system_prompt=secret)) if args.system_prompt else ""
    except Exception as error:  # a template raises whatever its author wrote
        fail(f"{name} takes no system prompt ({' '.join(str(error).split())[:100]}): leave out --system-prompt")
    if args.system_prompt and secret not in with_system:
        fail(f"{name} leaves a system prompt out: say it in the prompts, and leave out --system-prompt")
    try:
        with_thought, without = (render(tokenizer, "?", type(args)(chat=True, thinking=t)) for t in (True, False))
        ends(tokenizer, args)
    except Exception as error:
        fail(f"{name} cannot be filled in ({' '.join(str(error).split())[:200]}): leave out --chat")
    if args.thinking and with_thought == without:
        fail(f"{name} has no switch for thinking: leave out --thinking")
