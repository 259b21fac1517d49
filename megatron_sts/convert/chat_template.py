"""Our templates as the Jinja chat templates of transformers."""

from __future__ import annotations

from typing import Any

from megatron_sts.config.schema import TemplateName
from megatron_sts.data.formats import FORMATS, ChatFormat
from megatron_sts.data.template import ASSISTANT_PIECE, USER_PIECE
from megatron_sts.data.tokenizer import Tokenizer

_TEXT = (
    "{%- if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% endif %}"
)
_IMAGES = (
    "{%- if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ IMAGE }}{% endfor %}{% endif %}"
)
_IN_PLACE = (
    "{%- if message['content'] is not string %}{% set user = namespace(text='') %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set user.text = user.text + part['text'] %}"
    "{% elif part['type'] == 'image' %}{% set user.text = user.text + (IMAGE if user.text | replace(IMAGE, '') | trim else LINE) %}"
    "{% endif %}{% endfor %}{% set text = user.text %}{% endif %}"
)
"""Images where they stand; one before the text has a line of its own, as in LLaVA's data."""
_FIRST = "{% set message = messages[0] %}{% if message['role'] == 'system' %}" + _TEXT
_OTHER_ROLE = (
    "{% elif not (loop.first and message['role'] == 'system') %}"
    "{{ raise_exception('only user and assistant take turns here, after at most one system turn, not ' + message['role']) }}"
)


def jinja(template: TemplateName, tokenizer: Tokenizer) -> str | None:
    """The chat template that gives the prompts of ``template``; ``plain`` has none. It refuses other roles than ours.

    As ``transformers`` wants it, bos is always written: ``apply_chat_template(tokenize=True)`` lets no tokenizer add it.
    """
    if template == "plain":
        return None
    hf = tokenizer.hugging_face()
    image, eos = (hf.convert_ids_to_tokens(token) for token in (tokenizer.image_id, tokenizer.eos_id))
    chat = FORMATS[template] if template in FORMATS else _own(hf, tokenizer, eos)
    trim = " | trim" if chat.strips_turns else ""
    gap = _gap(chat.opening, hf, tokenizer) if chat.starts_with_bos else ""
    line = image if template == "chat" else f"{image}{gap}\n"
    if chat.images_first:
        images = _IMAGES.replace("IMAGE", _quoted(line))
    else:
        images = _IN_PLACE.replace("IMAGE", _quoted(image)).replace("LINE", _quoted(line))
    user = f"{_put(chat.before_user)}{images}{{{{ text{trim} }}}}{_put(chat.after_user)}"
    answer = f"{_put(chat.before_answer + chat.answer_start)}{{{{ text{trim} }}}}{_put(chat.end_of_answer + chat.after_answer)}"
    trim_system = " | trim" if template == "chat" else trim
    system = f"{_put(chat.before_system)}{{{{ text{trim_system} }}}}{_put(chat.after_system)}"
    return (
        f"{_bos(chat, hf, tokenizer, gap)}{_FIRST}{system}{{% else %}}{_put(chat.opening)}{{% endif %}}{{% for message in messages %}}{_TEXT}"
        f"{{%- if message['role'] == 'user' %}}{user}{{% elif message['role'] == 'assistant' %}}{answer}"
        f"{_OTHER_ROLE}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{_put(chat.before_answer)}{{% endif %}}"
    )


def _bos(chat: ChatFormat, hf: Any, tokenizer: Tokenizer, gap: str) -> str:
    if not chat.starts_with_bos:
        return ""
    return ("{{ bos_token }}" if hf.bos_token else _put(hf.convert_ids_to_tokens(tokenizer.bos_id))) + _put(gap)


def _gap(opening: str, hf: Any, tokenizer: Tokenizer) -> str:
    """What makes text behind a special piece have the ids of text alone: a space if a tokenizer begins only texts with one."""
    bos = hf.convert_ids_to_tokens(tokenizer.bos_id)
    ids = hf.encode(bos + opening, add_special_tokens=False)
    return "" if ids == [tokenizer.bos_id, *tokenizer.encode(opening)] else " "


def _own(hf: Any, tokenizer: Tokenizer, eos: str) -> ChatFormat:
    """The template ``chat``, whose role pieces may be stood for by reserved ones of the vocabulary."""
    user, assistant = (hf.convert_ids_to_tokens(tokenizer.piece_id(piece)) for piece in (USER_PIECE, ASSISTANT_PIECE))
    return ChatFormat(
        special=(user, assistant),
        starts_with_bos=True,
        before_system=_gap("a", hf, tokenizer),
        before_user=user,
        after_user="",
        before_answer=assistant,
        end_of_answer=eos,
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _put(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}" if text else ""
