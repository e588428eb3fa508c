"""Items as tokens: chat turns through the template, few-shot where there is none, every spelling, and the end."""

from __future__ import annotations

import json
from dataclasses import replace
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


@pytest.mark.parametrize(
    ("prompt", "answer", "rows"),
    [
        ("Say 3", "3", [" 3"]),
        ("Say ", "3", ["3"]),
        ("Say\n", "3", ["3"]),
        ("Say 3", " 3\n", [" 3"]),
        # Nothing has to stand between what is not read as one word.
        ("1+2=", "3", [" 3", "3"]),
        ("首都は", "東京", [" 東京", "東京"]),
        # Spaces that a user puts in front of an answer count where a text goes on with them, and nowhere else.
        ("def f():\n", "    pass\n", ["pass", "    pass"]),
        ("def f():", "\n    pass", [" pass", "pass", "\n    pass"]),
    ],
)
def test_a_users_prompt_is_continued_as_it_stands(prompt: str, answer: str, rows: list[str], tmp_path: Path) -> None:
    prompter = Prompter(make_tokenizer(), tmp_path)
    item = Item("mine", "", "line 1", prompt, answer, completion=True)
    assert texts(prompter, prompter.question(item)) == (prompt, rows)


def refusal(tokenizer: PreTrainedTokenizerFast, item: Item, tmp_path: Path) -> str:
    with pytest.raises(AccullmError) as error:
        Prompter(tokenizer, tmp_path).question(item)
    return error.value.line()


def test_an_answer_that_a_model_cannot_say_is_none(tmp_path: Path) -> None:
    """Letters without a token, dropped or as an unknown one; an end of the model's within it."""
    for unknown in (None, "<unk>"):
        letters = {letter: number for number, letter in enumerate("\n ab|")}
        tokenizer = Tokenizer(models.BPE(vocab=letters | {"<unk>": 5}, merges=[], unk_token=unknown))
        tokenizer.decoder = decoders.Fuse()
        few = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        item = Item("mine", "", "line 1", "a|", "aéb", completion=True)
        where = "task mine, line 1: "
        assert refusal(few, item, tmp_path) == f"{where}no tokens spell its answer 'aéb'; give another answer"
        known = Prompter(few, tmp_path).question(replace(item, also=("ab",)))
        assert [few.decode(row) for row in known.spellings] == [" ab", "ab"]
        assert refusal(few, replace(item, answer="ab</s>"), tmp_path) == (
            f"{where}no tokens spell its answer 'ab</s>'; give another answer"
        )


def test_a_prompt_of_no_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"\n": 0, "a": 1}, merges=[]))
    few = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    item = Item("mine", "", "line 1", "éé", "a", completion=True)
    assert refusal(few, item, tmp_path) == "task mine, line 1: its prompt has no tokens; give another prompt"


def test_a_model_without_an_end_is_refused_and_one_that_it_cannot_say_is_none(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "?": 1, "|": 2}, merges=[]))
    few = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(AccullmError) as error:
        _ = Prompter(few, tmp_path).ends
    assert error.value.line() == (
        f"{tmp_path}: neither the model nor its tokenizer names a token that ends an answer; give eos_token_id in "
        "generation_config.json"
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [-1, 3]}))
    assert Prompter(few, tmp_path).ends == (3,)
    assert Prompter(few, tmp_path, rows=4).ends == (3,)
    with pytest.raises(AccullmError, match="names a token that ends an answer"):
        _ = Prompter(few, tmp_path, rows=3).ends


def test_a_turns_end_counts_that_is_an_added_token_but_no_special_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<stop>"])
    tokenizer.chat_template = TEMPLATE
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    assert Prompter(tokenizer, tmp_path).ends == tuple(sorted([tokenizer.eos_token_id, stop]))


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
