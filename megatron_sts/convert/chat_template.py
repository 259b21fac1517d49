"""Our templates as the Jinja chat templates of transformers."""

from __future__ import annotations

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


def jinja(template: TemplateName, tokenizer: Tokenizer) -> str | None:
    """The chat template that gives the prompts of ``template``, a turn's images first; ``plain`` has none."""
    if template == "plain":
        return None
    hf = tokenizer.hugging_face()
    image, eos = (hf.convert_ids_to_tokens(token) for token in (tokenizer.image_id, tokenizer.eos_id))
    chat = FORMATS[template] if template in FORMATS else _own(hf, tokenizer, eos)
    is_added = hf("x")["input_ids"][0] == tokenizer.bos_id  # by the tokenizer itself
    bos = hf.convert_ids_to_tokens(tokenizer.bos_id) if chat.starts_with_bos and not is_added else ""
    trim = " | trim" if chat.strips_turns else ""
    line = "" if template == "chat" else "\n"
    images = _IMAGES.replace("IMAGE", _quoted(image + line))
    user = f"{_put(chat.before_user)}{images}{{{{ text{trim} }}}}{_put(chat.after_user)}"
    answer = f"{_put(chat.before_answer + chat.answer_start)}{{{{ text{trim} }}}}{_put(chat.end_of_answer + chat.after_answer)}"
    return (
        f"{_put(bos + chat.opening)}{{% for message in messages %}}{_TEXT}"
        f"{{%- if message['role'] == 'user' %}}{user}{{% elif message['role'] == 'assistant' %}}{answer}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{_put(chat.before_answer)}{{% endif %}}"
    )


def _own(hf: object, tokenizer: Tokenizer, eos: str) -> ChatFormat:
    """The template ``chat``, whose role pieces may be stood for by reserved ones of the vocabulary."""
    user, assistant = (
        hf.convert_ids_to_tokens(tokenizer.piece_id(piece))  # type: ignore[attr-defined]
        for piece in (USER_PIECE, ASSISTANT_PIECE)
    )
    return ChatFormat(
        special=(user, assistant),
        starts_with_bos=True,
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
