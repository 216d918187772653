"""Rows of language tasks: prompts or chat messages, and answers where they are to be scored."""

import json
from collections.abc import Mapping, Sequence
from itertools import permutations

import datasets
import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from divmerge_book.data.tasks import quiet
from divmerge_book.evaluation.language_scoring import rouge1
from divmerge_book.models.language.prompts import normal
from divmerge_book.user_models.data import read_table, require, require_whole, texts
from divmerge_book.user_models.description import TaskFiles
from divmerge_book.user_models.language_tokens import Reading

CURE = "Name columns in the description: columns: {prompt: ..., answer: ...} or {messages: ...}"


def turns(value: object) -> list[dict] | None:
    """Chat messages, out of a list or of JSON; None for anything else."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    found = [{k: v for k, v in m.items() if v is not None} for m in value if isinstance(m, Mapping)]
    words = [isinstance(m.get(key), str) for m in found for key in ("role", "content")]
    return found if len(found) == len(value) and all(words) else None


def rendered(
    column: pd.Series, chats: Sequence[list[dict]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Messages as the expert's chat template writes them, up to where it begins to answer."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{column.index.name}: column {column.name!r} holds chat messages, and neither the "
            "expert's tokenizer nor the base's has a chat template; save the tokenizer that the "
            "expert was trained with beside it, or give prompts"
        )
    found, options = [], {"tokenize": False, "add_generation_prompt": True}
    for place, chat in zip(column.index, chats, strict=True):
        try:
            found.append(tokenizer.apply_chat_template(chat, **options))
        except Exception as error:  # templates are programs, which may raise any kind
            raise ValueError(
                f"{column.index.name} {place}: the expert's chat template refuses the messages: "
                f"{error}"
            ) from error
    what = f"the expert's chat template writes no text of VALUE in column {column.name!r}"
    require(column, map(str.strip, found), what, "mend the template, or correct the row")
    require_whole(column, found, f"column {column.name!r} holds VALUE")
    return found


def prompts(
    table: pd.DataFrame, task: TaskFiles, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], pd.Series | None, bool]:
    """Every row's prompt as the expert reads it, the answers in the rows, and whether it is a chat.

    Of chat messages the last one is the answer where it is the assistant's.
    """
    names, present = task.columns, list(map(str, table.columns))
    chat, named = names.messages, names.model_fields_set & {"prompt", "messages"}
    if len(named) == 2 or (not named and {"prompt", "messages"} <= {*present}):
        raise ValueError(
            f"task {task.name!r}: prompts come from one column, and there are {names.prompt!r} and "
            f"{chat or 'messages'!r}. {CURE}"
        )
    if chat is None and names.prompt not in present and "messages" in present:
        chat = "messages"
    wanted = names.prompt if chat is None else chat
    answer = table[names.answer] if names.answer in present else None
    if present.count(wanted) != 1:
        raise ValueError(
            f"{table.index.name.rpartition(',')[0]} has no column {wanted!r}; it has "
            f"{', '.join(present)}. {CURE}"
        )
    column = table[wanted]
    if chat is None:
        return texts(column, tokenizer), answer, False
    chats = [turns(value) for value in column]
    form = "a list of messages, each with a role and a text as its content"
    require(column, chats, f"column {chat!r} holds VALUE", f"give {form}")
    said = [chat[-1]["content"] if chat[-1]["role"] == "assistant" else None for chat in chats]
    asked = [c if text is None else c[:-1] for c, text in zip(chats, said, strict=True)]
    require(column, asked, f"column {chat!r} holds VALUE", "give a message before the answer")
    if answer is None and said != [None] * len(said):
        answer = pd.Series(said, table.index, name=chat, dtype=object)
    return rendered(column, asked, tokenizer), answer, True


def load_prompts(
    task: TaskFiles, split: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, bool]:
    """Rows of one split, and whether their prompts are chats.

    Columns are `text`, the whole prompt, and outside the merge split its answer: `label`, a
    number, where the task has labels, and else `answer`, a text. Raises ValueError, naming file and
    row, for what cannot be read.
    """
    table = read_table(path := task.files()[split], None)
    asked, said, chat = prompts(table, task, tokenizer)
    columns: dict[str, list] = {"text": asked}
    if split != "merge":
        if said is None:
            raise ValueError(
                f"{path} has no column {task.columns.answer!r} and no assistant's last message; "
                f"{split} rows are scored by their answers. {CURE}"
            )
        what, many = f"the answer VALUE in column {said.name!r}", list | dict | np.ndarray | bytes
        plain = (not isinstance(text, many) for text in said)
        require(said, plain, f"{what} is no text", "give one text a row")
        words = ["" if text is None else str(text).strip() for text in said]
        require(said, words, f"the answer in column {said.name!r} is empty", "fill in the row")
        require_whole(said, words, f"the answer in column {said.name!r} is VALUE")
        columns["answer"] = words
        if task.labels is not None:
            known = [word in task.labels for word in words]
            what = f"answer VALUE in column {said.name!r} is none of {', '.join(task.labels)}"
            require(said, known, what, "correct the row, or the labels in the description")
            columns = {"text": asked, "label": [task.labels.index(word) for word in words]}
    with quiet():
        return datasets.Dataset.from_dict(columns), chat


def answer_notes(own: Reading, score: str, labels: Sequence[str], most: int) -> list[str]:
    """Notes on answers that never score, and on prompts that end in two ways.

    Raises ValueError for a label that could never win.
    """
    spaced = [text for text in own.prompts if text[-1].isspace()]
    who, ended = f"task {own.task!r}", own.chat or len(spaced) == len(own.prompts)
    words = [word if ended else f" {word}" for word in own.said]
    ids = own.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    for (one, short), (other, long) in permutations(zip(labels, ids, strict=False), 2):
        how, same = "is, but for case and marks,", normal(one) == normal(other)
        if score == "likelihood":  # which counts no end
            how, same = "begins with the tokens of", short == long[: len(short)]
        if same:
            raise ValueError(
                f"{who}: the label {other!r} {how} {one!r}, so that it never wins by score "
                f"{score!r}; take the other score, or other labels"
            )
    cut = [len(one) for one in ids if len(one) > most and score != "likelihood"]
    text = f"{who}: {len(cut)} of {len(ids)} answers have more tokens than max_new, {most}"
    found = [f"{text} (up to {max(cut)}), where written ones end"] if cut else []
    if spaced and not ended:
        text = f"{who}: {len(spaced)} of {len(own.prompts)} prompts end with a space or a new line"
        found.append(f"{text}, the others do not, and an answer begins with other tokens after it")
    alone = rouge1(own.said, own.said) if score == "rouge1" else []
    if blind := [one for one, grade in zip(own.said, alone, strict=False) if not grade]:
        text = f"{who}: {len(blind)} of {len(ids)} answers, such as {blind[0][:20]!r}, have no word"
        found.append(f"{text} in a-z or 0-9, which are all that rouge1 reads: take score: exact")
    return found
