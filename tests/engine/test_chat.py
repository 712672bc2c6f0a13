"""Chat templates: rendering as transformers does, and chats that go on without being recomputed."""

import pytest
from text_support import BYTE_CHARS, CONTROL, byte_tokenizer

from ksort_gguf.engine.chat import Chat, ChatTemplate, splice
from ksort_gguf.errors import KsortError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<bos>")
BOS = 256 + MARKS.index("<bos>")
END = 256 + MARKS.index("<|im_end|>")


def tokenizer_of(merges=(), **keys):
    special = [(mark, CONTROL) for mark in MARKS]
    return byte_tokenizer(merges=merges, special=special, bos_token_id=BOS, eos_token_id=END, **keys)


def rendered(source: str, messages=(), add_generation_prompt: bool = False) -> str:
    return ChatTemplate(source, tokenizer_of(), "test.jinja").render(messages, add_generation_prompt)


TALK = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "héllo\n"},
    {"role": "assistant", "content": " yes "},
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}\n  {%- if loop.first %}\n    {{ m.content | trim }}\n  {% endif %}\n"
        "{% endfor %}",
        "{% for m in messages %}{{ m | tojson }}{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}",
        "  {% set ns = namespace(n=0) %}\n{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}\n{{ ns.n }}",
        "{{ tools is none }}{{ undefined_name }}{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}",
    ],
)
def test_renders_as_transformers_does(source, add_generation_prompt):
    """A model prompted in a format it was never trained on: whitespace, JSON escapes, missing names."""
    peer = pytest.importorskip("transformers.utils.chat_template_utils")
    expected, _ = peer.render_jinja_template(
        [TALK],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        bos_token="<bos>",
        eos_token="<|im_end|>",
    )
    assert rendered(source, TALK, add_generation_prompt) == expected[0]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must\nalternate') }}", "test.jinja: chat template: roles must alternate"),
        ("\n{% if %}", "test.jinja: chat template, line 2: "),
        ("{{ messages.nothing.content }}", "test.jinja: chat template: .*nothing"),
        ("{{ 1 / 0 }}", "test.jinja: chat template: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_refusals_are_one_line(source, said):
    """A traceback where a template refuses the messages; a template that reaches out of its sandbox."""
    with pytest.raises(KsortError, match=said) as caught:
        rendered(source)
    assert "\n" not in str(caught.value)


def test_templates_in_metadata():
    """The wrong one of several templates, or a KeyError where there is none."""
    metadata = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tools": "with tools"}
    tokenizer = tokenizer_of()
    assert ChatTemplate.from_metadata(metadata, tokenizer, "m.gguf").render([]) == "plain"
    assert ChatTemplate.from_metadata(metadata, tokenizer, "m.gguf", "tools").render([]) == "with tools"
    with pytest.raises(KsortError, match=r"m\.gguf: has no tokenizer\.chat_template\.rag: .*`chat_template_file`"):
        ChatTemplate.from_metadata(metadata, tokenizer, "m.gguf", "rag")


def chat_of(tokenizer, source: str = CHATML) -> Chat:
    chat = Chat(ChatTemplate(source, tokenizer, "test.jinja"), tokenizer, "Be kind.")
    chat.add("user", "hi")
    return chat


def test_second_turn_keeps_the_models_own_tokens():
    """Answers tokenized again: the model said `a`, `b` where the tokenizer says `ab`, and the cache is thrown away."""
    tokenizer = tokenizer_of(merges=("a b",))
    chat = chat_of(tokenizer)
    past = [*chat.prompt_ids(), ord("a"), ord("b"), END + 1]
    chat.add("assistant", "ab")
    chat.add("user", "ab")
    ids = chat.prompt_ids(past)
    assert ids[: len(past)] == past
    assert ids[len(past) :] == tokenizer.encode("\n<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n")


def test_interrupted_answer_goes_on():
    """After Ctrl-C the end mark is missing from the cache: it must be fed, and nothing before it again."""
    tokenizer = tokenizer_of()
    chat = chat_of(tokenizer)
    past = chat.prompt_ids() + tokenizer.encode("ye")
    chat.add("assistant", "ye")
    chat.add("user", "go on")
    ids = chat.prompt_ids(past)
    assert ids[: len(past)] == past
    assert ids[len(past)] == tokenizer.encode("<|im_end|>")[0]


def test_rewritten_history_is_followed():
    """A template that trims old answers: keeping the cache as it is shows the model another conversation."""
    tokenizer = tokenizer_of()
    source = CHATML.replace("message['content']", "(message['content'] | trim)")
    chat = chat_of(tokenizer, source)
    past = chat.prompt_ids() + tokenizer.encode("  yes<|im_end|>")
    chat.add("assistant", "  yes")
    chat.add("user", "more")
    ids = chat.prompt_ids(past)
    assert tokenizer.decode(ids) == ChatTemplate(source, tokenizer, "test.jinja").render(chat.messages)
    assert ids[: len(past) - 6] == past[:-6]  # all but the answer and its end


def test_bos_is_not_doubled():
    """Two BOS tokens where the template writes one and the tokenizer adds one: quality drops without a word."""
    for source in ("{{ bos_token }}x", "x"):
        tokenizer = tokenizer_of(add_bos_token=True)
        assert Chat(ChatTemplate(source, tokenizer, "test.jinja"), tokenizer).prompt_ids() == [BOS, ord("x")]


def test_no_eos_behind_the_answers_opening():
    """A tokenizer that appends EOS to texts would end the answer before it begins."""
    tokenizer = tokenizer_of(add_eos_token=True)
    assert Chat(ChatTemplate("x", tokenizer, "test.jinja"), tokenizer).prompt_ids() == [ord("x")]


def test_splice_tells_a_token_from_its_text():
    """A user who types <|im_end|> in letters: the letters in the cache are not the token."""
    tokenizer = tokenizer_of()
    letters = tokenizer.encode("a<|im_end|>", parse_special=False)
    token = tokenizer.encode("a<|im_end|>")
    assert splice(letters, token, tokenizer) == token
    assert splice(token, letters, tokenizer) == letters


def test_splice_changes_over_at_token_ends_only():
    """A change-over inside a token repeats or swallows text."""
    tokenizer = tokenizer_of(merges=("a b", "ab c", "b c"))
    ab, abc, bc = (tokenizer.encode(text)[0] for text in ("ab", "abc", "bc"))
    a, c = BYTE_CHARS.index("a"), BYTE_CHARS.index("c")
    assert splice([ab, c], [abc, a], tokenizer) == [ab, c, a]
    assert splice([ab], [a, bc], tokenizer) == [a, bc]
    assert splice([a, bc, c], [ab, c, a], tokenizer) == [a, bc, a]
    assert splice([], [ab], tokenizer) == [ab]
    assert splice([ab, c], [ab], tokenizer) == [ab]
