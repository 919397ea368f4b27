"""Chat: labels on the assistant's turns only, however they are found."""

import pytest
from datasets import Dataset

from graftlm.data import chat_ids_and_mask, prepare, prompts_and_targets, render_chat
from graftlm.errors import DataError

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# forgets all earlier answers, so that no prefix agrees
FORGETFUL = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
)


def answers(row, tokenizer):
    """The labelled runs as texts."""
    runs, current = [], []
    for label in [*row["labels"], -100]:
        if label != -100:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


@pytest.fixture
def data():
    return Dataset.from_list([{"messages": MESSAGES}])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_templates_with_and_without_marks(template, data, tokenizer):
    tokenizer.chat_template = template
    row = prepare(data, tokenizer)[0]
    assert answers(row, tokenizer) == ["Hi there.<|im_end|>\n", "Fine.<|im_end|>\n"]
    whole = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert row["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_both_ways_give_the_same_mask(tokenizer):
    tokenizer.chat_template = CHATML
    by_prefixes = chat_ids_and_mask(MESSAGES, tokenizer)
    tokenizer.chat_template = MARKED
    assert chat_ids_and_mask(MESSAGES, tokenizer) == by_prefixes


def test_a_template_brings_its_own_bos(data, bos_tokenizer):
    bos_tokenizer.chat_template = "{{ bos_token }}" + CHATML
    assert prepare(data, bos_tokenizer)[0]["input_ids"].count(1) == 1
    prompt = prepare(data, bos_tokenizer, for_generation=True)[0]
    assert prompt["input_ids"].count(1) == 1 and prompt["target"] == "Fine."
    ids, _ = chat_ids_and_mask(MESSAGES, bos_tokenizer)
    assert ids[: len(prompt["input_ids"])] == prompt["input_ids"]


def test_templates_that_rewrite_history_raise(data, tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match="row 0: the chat template does not build the conversation turn by turn"):
        prepare(data, tokenizer)


def test_errors_of_the_template_are_passed_on(data, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refused the conversation: .*roles must alternate"):
        prepare(data, tokenizer)


def test_without_a_template_one_question_is_the_alpaca_layout(tokenizer, bos_tokenizer):
    chat = Dataset.from_list([{"messages": MESSAGES[1:3]}])
    alpaca = Dataset.from_list([{"instruction": "Hello", "output": "Hi there."}])
    for tok in (tokenizer, bos_tokenizer):
        assert list(prepare(chat, tok)) == list(prepare(alpaca, tok))


def test_the_plain_template_with_several_turns(data, tokenizer):
    row = prepare(data, tokenizer)[0]
    text = "System: Be short.\n\nHuman: Hello\n\nAssistant: Hi there.</s>Human: How are you?\n\nAssistant: Fine.</s>"
    assert tokenizer.decode(row["input_ids"]) == text
    assert answers(row, tokenizer) == ["Hi there.</s>", "Fine.</s>"]
    assert render_chat(MESSAGES[:4], tokenizer) + "Fine.</s>" == text


def test_a_conversation_without_answers_is_dropped(data, tokenizer):
    both = Dataset.from_list([{"messages": MESSAGES[:2]}, {"messages": MESSAGES}])
    with pytest.warns(UserWarning, match="1 of 2 examples have no labelled token"):
        assert len(prepare(both, tokenizer)) == 1


def test_prompts_and_targets(data, tokenizer):
    prompts, targets = prompts_and_targets(data)
    assert targets == ["Fine."] and prompts[0].endswith("How are you?\n\nAssistant: ")
    tokenizer.chat_template = CHATML
    prompts, _ = prompts_and_targets(data, tokenizer=tokenizer)
    assert prompts[0].endswith("<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match="row 0: the conversation ends with role 'user'"):
        prompts_and_targets(Dataset.from_list([{"messages": MESSAGES[:2]}]))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "should hold a list"),
        ([{"role": "user", "content": None}], "should have a text 'role' and a text 'content'"),
        ([{"role": "tool", "content": "x"}], "knows only system, user and assistant"),
    ],
)
def test_unusable_messages(messages, error, tokenizer):
    data = Dataset.from_list([{"messages": messages}, {"messages": MESSAGES}])
    with pytest.raises(DataError, match=error):
        prepare(data, tokenizer)


def test_sharegpt_is_the_same_conversation(data, tokenizer):
    speakers = {"user": "human", "assistant": "gpt"}
    shared = [{"from": speakers[m["role"]], "value": m["content"]} for m in MESSAGES[1:]]
    for given in (
        {"conversations": shared, "system": "Be short."},
        {"conversations": [{"from": "system", "value": "Be short."}, *shared], "system": "Not this."},
        {"conversations": [{"from": "system", "value": "Be short."}, *shared], "id": "7"},
    ):
        for template in (None, CHATML):
            tokenizer.chat_template = template
            assert list(prepare(Dataset.from_list([given]), tokenizer)) == list(prepare(data, tokenizer)), given
    unknown = [{"from": "narrator", "value": "Once"}, *shared]
    with pytest.raises(DataError, match="message 0 is from 'narrator', expected one of human"):
        prepare(Dataset.from_list([{"conversations": unknown}]), tokenizer)
    with pytest.raises(DataError, match="should hold a list"):
        prepare(Dataset.from_list([{"conversations": "Hello there"}]), tokenizer)
    with pytest.raises(DataError, match="message 1 should have a text 'role'"):
        prepare(Dataset.from_list([{"conversations": [shared[0], {"from": "gpt", "value": None}]}]), tokenizer)


def test_truncation_of_the_prompt_is_refused(data, tokenizer):
    with pytest.raises(DataError, match="chat template"):
        prepare(data, tokenizer, truncation="prompt")
