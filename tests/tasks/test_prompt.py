"""Items as tokens: chat turns through the template, few-shot where there is none, every spelling, and the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from accullm_cli.errors import AccullmError
from accullm_cli.tasks.item import Item
from accullm_cli.tasks.prompt import Prompter, Question
from tests.tiny import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ITEM = Item("arithmetic", "easy", "add", "1+2?", "3", also=("3.",), examples=(("2+2?", "4"),), chat_examples=1)


def chatting() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def merging() -> PreTrainedTokenizerFast:
    """Bytes, and two tokens more: "99", and a space with a 9 behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "99", "Ġ9"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "9"), ("9", "9")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def texts(prompter: Prompter, question: Question) -> tuple[str, list[str]]:
    return prompter.text_of(question.prompt), [prompter.text_of(row) for row in question.rows]


def test_a_chat_turn_goes_through_the_models_template_behind_its_examples(tmp_path: Path) -> None:
    prompter = Prompter(chatting(), tmp_path)
    question = prompter.question(ITEM)
    prompt = "<|user|>2+2?<stop>\n<|assistant|>4<stop>\n<|user|>1+2?<stop>\n<|assistant|>"
    assert texts(prompter, question) == (prompt, ["3."])
    assert [node.may_end for node in question.nodes] == [False, True, True]


def test_a_users_messages_stand_as_they_are(tmp_path: Path) -> None:
    prompter = Prompter(chatting(), tmp_path)
    item = Item("mine", "", "line 1", "b", "c", messages=(("system", "s"), ("user", "b")))
    assert texts(prompter, prompter.question(item)) == ("<|system|>s<stop>\n<|user|>b<stop>\n<|assistant|>", ["c"])


def test_without_a_template_examples_show_the_form(tmp_path: Path) -> None:
    prompter = Prompter(make_tokenizer(), tmp_path)
    prompt = "Question: 2+2?\nAnswer: 4\n\nQuestion: 1+2?\nAnswer:"
    assert texts(prompter, prompter.question(ITEM)) == (prompt, [" 3."])


@pytest.mark.parametrize(("prompt", "row"), [("Say 3", " 3"), ("Say ", "3"), ("Say\n", "3")])
def test_a_users_prompt_is_continued_as_it_stands(prompt: str, row: str, tmp_path: Path) -> None:
    prompter = Prompter(make_tokenizer(), tmp_path)
    item = Item("mine", "", "line 1", prompt, "3", completion=True)
    assert texts(prompter, prompter.question(item)) == (prompt, [row])


def test_where_tokenization_allows_two_spellings_both_are_right(tmp_path: Path) -> None:
    """Behind a prompt that ends with 9, "9" becomes "99" with it: then the answer alone is the only one."""
    prompter = Prompter(merging(), tmp_path)
    question = prompter.question(Item("mine", "", "line 1", "a\n", "999", completion=True))
    assert [prompter.tokenizer.convert_ids_to_tokens(list(row)) for row in question.rows] == [["99", "9"]]
    question = prompter.question(Item("mine", "", "line 1", "a 9\t", "9", also=("99",), completion=True))
    assert [prompter.tokenizer.convert_ids_to_tokens(list(row)) for row in question.rows] == [["9"], ["99"]]
    question = prompter.question(Item("mine", "", "line 1", "a", "9", completion=True))
    assert [prompter.tokenizer.convert_ids_to_tokens(list(row)) for row in question.rows] == [["Ġ9"]]


def test_an_answer_ends_with_the_tokens_that_the_model_names_and_the_templates(tmp_path: Path) -> None:
    tokenizer = chatting()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 12}))
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert Prompter(tokenizer, tmp_path).ends == tuple(sorted([7, 11, 12, tokenizer.eos_token_id, stop]))


def test_without_a_template_a_lines_end_is_an_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ends = Prompter(tokenizer, tmp_path).ends
    assert ends == tuple(sorted([tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]]))


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    item = Item("mine", "", "line 4", "b", "c", messages=(("user", "b"),))
    with pytest.raises(AccullmError) as error:
        Prompter(make_tokenizer(), tmp_path).question(item)
    assert error.value.line() == (
        "task mine, line 4: has messages, but the model's tokenizer has no chat template; give prompt in their place"
    )


def test_a_template_that_refuses_is_named(tmp_path: Path) -> None:
    tokenizer = chatting()
    tokenizer.chat_template = "{{ raise_exception('no examples here') }}"
    with pytest.raises(AccullmError) as error:
        Prompter(tokenizer, tmp_path).question(ITEM)
    assert error.value.line() == (
        f"{tmp_path}: a task does not fit the model's chat template (no examples here); mend chat_template.jinja"
    )


def test_another_cut_of_the_same_answer_is_right_as_soon_as_the_model_begins_it(tmp_path: Path) -> None:
    prompter = Prompter(merging(), tmp_path)
    question = prompter.question(Item("mine", "", "line 1", "a\n", "9991", completion=True))
    assert [prompter.tokenizer.convert_ids_to_tokens(list(row)) for row in question.rows] == [["99", "9", "1"]]
    nine, two = (prompter.tokenizer.convert_tokens_to_ids(token) for token in "92")
    other = prompter.respelled(question, (), nine)
    assert other is not None
    assert [prompter.tokenizer.convert_ids_to_tokens(list(row)) for row in other.rows] == [
        ["99", "9", "1"],
        ["9", "99", "1"],
    ]
    # What leads elsewhere, and what is known already, is none.
    assert prompter.respelled(question, (), two) is None
    assert prompter.respelled(other, (), nine) is None


def test_spaces_at_the_beginning_of_an_answer_are_no_spelling_of_it(tmp_path: Path) -> None:
    prompter = Prompter(merging(), tmp_path)
    question = prompter.question(Item("mine", "", "line 1", "a\n", "91", completion=True))
    (space,) = prompter.tokenizer(" ")["input_ids"]
    assert prompter.respelled(question, (), space) is None
