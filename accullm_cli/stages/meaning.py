"""meaning: answers in other words than expected, which only the model's own writing shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from accullm_cli.model.blocks import Decoder
from accullm_cli.run import available_memory
from accullm_cli.tasks import family_of, is_right
from accullm_cli.tasks.prompt import Prompter, Question, with_spellings
from accullm_cli.units import size

# Of the memory that is free, what a whole model in float32 may take.
SHARE_OF_MEMORY = 0.5


def right_by_meaning(
    decoder: Decoder, prompter: Prompter, questions: Mapping[int, Question]
) -> tuple[dict[int, Question], tuple[str, ...]]:
    """Of questions that are not answered with a known text, those whose own answer means the same.

    Such an answer is not known before it is given: the model writes it, whole in memory, greedily.

    Returns: the questions, with that answer as one more spelling; a sentence where the model does not fit.
    """
    questions = {n: q for n, q in questions.items() if (family := family_of(q.item)) and family.by_meaning}
    if not questions:
        return {}, ()
    needed = 4 * sum(parameter.numel() for parameter in decoder.model.parameters())
    free = available_memory()
    if free is not None and needed > SHARE_OF_MEMORY * free:
        count = f"{len(questions)} wrong answer{'s' if len(questions) > 1 else ''}"
        return {}, (
            f"{count} may be right by meaning, which was not looked for: the model takes {size(needed)} of memory, "
            f"of which {size(free)} are free",
        )
    for index in range(len(decoder.block_names)):
        decoder.load_block(index)
    decoder.load_outside()
    found = {}
    for number, question in questions.items():
        said = _written(decoder, question, prompter.ends)
        if said and said[-1] in prompter.ends and is_right(question.item, prompter.text_of(said[:-1])):
            found[number] = with_spellings(question, (*question.spellings, said[:-1]))
    for index in range(len(decoder.block_names)):
        decoder.release_block(index)
    decoder.release_outside()
    return found, ()


@torch.no_grad()
def _written(decoder: Decoder, question: Question, ends: Sequence[int]) -> tuple[int, ...]:
    """What the model says, an end included if it comes to one within twice the answer's length."""
    prompt = torch.tensor([question.prompt])
    ids: torch.Tensor = decoder.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=2 * max(map(len, question.rows)) + 1,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
    )
    return tuple(ids[0, len(question.prompt) :].tolist())
