"""Conversations through chat templates: only what the assistant says is trained on."""

import pytest

from megatron_hypenet.data.chat import ChatEncoder
from megatron_hypenet.data.places import RecordError, Where
from megatron_hypenet.data.tokenizer import load_tokenizer
from megatron_hypenet.errors import DataError

PLAIN = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""
# as Qwen3 does it: the last answer gets an empty thought, earlier ones get none
THINKING = """{%- for m in messages %}{%- if m.role == 'assistant' and loop.last %}
{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content + '<|im_end|>\n' }}{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MARKED = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}
{{- m.content + '<|im_end|>' }}{%- endif %}{{ '\n' }}{%- endfor %}"""
WHERE = Where("a.jsonl", "line", 4)


def message(role, content):
    return {"role": role, "content": content}


CHAT = [
    message("system", "Be brief."),
    message("user", "Say assistant\n twice."),
    message("assistant", "assistant assistant"),
    message("user", "Again."),
    message("assistant", "No, I will not."),
]


@pytest.fixture(scope="module")
def tokenizer(repo_root):
    loaded = load_tokenizer(repo_root / "assets" / "tiny-qwen3")
    loaded.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        if hasattr(loaded, "additional_special_tokens")
        else {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    return loaded


def trained_on(tokenizer, template, messages):
    """Return the stretches of text that are to be predicted."""
    tokenizer.chat_template = template
    ids, mask = ChatEncoder(tokenizer).encode(messages, WHERE)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    stretches, current = [], []
    for token, counted in zip([*ids.tolist(), 0], [*mask.tolist(), 0], strict=True):
        if counted:
            current.append(token)
        elif current:
            stretches.append(tokenizer.decode(current))
            current = []
    return stretches


def test_answers_and_the_ends_of_their_turns(tokenizer):
    answers = ["assistant assistant<|im_end|>", "No, I will not.<|im_end|>"]
    assert trained_on(tokenizer, PLAIN, CHAT) == answers
    assert trained_on(tokenizer, MARKED, CHAT) == answers
    last = "<think>\n\n</think>\n\n" + answers[1]
    assert trained_on(tokenizer, THINKING, CHAT) == [answers[0], last]
    assert trained_on(tokenizer, PLAIN, [*CHAT, message("user", "Oh.")]) == answers


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (PLAIN, CHAT[:2], "no message of the role assistant"),
        (PLAIN, CHAT[2:], "the conversation begins with the assistant"),
        ("{{ raise_exception('no tools') }}", CHAT, "refuses the conversation: no tools"),
        ("{{ messages[0].absent.more }}", CHAT, "refuses the conversation"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            CHAT,
            "message 3: the chat template writes what comes before it differently",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}",
            CHAT,
            "message 3: the chat template ends an answer with no special token",
        ),
        ("{% generation %}{% endgeneration %}text", CHAT, "marks no token of the assistant"),
    ],
)
def test_conversations_that_cannot_be_followed(tokenizer, template, messages, reason):
    tokenizer.chat_template = template
    with pytest.raises(RecordError, match=f"a.jsonl, line 4: .*{reason}"):
        ChatEncoder(tokenizer).encode(messages, WHERE)


def test_tokenizers_that_cannot_do_it(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        ChatEncoder(tokenizer)

    class Slow:
        chat_template = PLAIN
        is_fast = False

    with pytest.raises(DataError, match="cannot say which characters a token has"):
        ChatEncoder(Slow())
