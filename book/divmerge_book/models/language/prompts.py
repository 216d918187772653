"""The prompt of each task, and the words of its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from divmerge_book.data.tasks import TASKS
from divmerge_core.registry import Registry

PROMPTS = Registry("prompt")


@dataclass(frozen=True)
class Prompt:
    """A prompt template, and one answer word per class; none for a free-form task.

    template: contains {text}, and {pair} for tasks with two texts; a space and the answer follow.
    """

    task: str
    template: str
    words: tuple[str, ...] = ()

    def ask(self, row: Mapping[str, object]) -> str:
        """The prompt of one row."""
        return self.template.format(text=row["text"], pair=row.get("pair"))

    def answer(self, row: Mapping[str, object]) -> str:
        """The right answer of a labelled row, with the space before it."""
        return " " + (self.words[row["label"]] if self.words else row["answer"])

    def read(self, completion: str) -> int:
        """The class whose word a completion is, in any case and spacing; one past the last if none.

        >>> PROMPTS["sst2"].read("  Positive "), PROMPTS["sst2"].read("very positive")
        (1, 2)
        """
        said = normal(completion)
        words = [normal(word) for word in self.words]
        return words.index(said) if said in words else len(words)


def normal(text: str) -> str:
    """A text without case, outer punctuation and doubled spaces: what exact matches compare."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'`*")


def add(task: str, template: str, *words: str) -> None:
    """Register a prompt. Raises ValueError where it does not fit its task."""
    known = TASKS[task]
    if "{text}" not in template or ("{pair}" in template) != known.pair:
        raise ValueError(f"the prompt of {task!r} must hold {{text}}, and {{pair}} for two texts")
    if len(words) != len(known.answers) or len(set(map(normal, words))) < len(words):
        raise ValueError(f"{task!r} needs one word for each of {known.answers}, got {words}")
    PROMPTS.register(task)(Prompt(task, template, words))


def table(tasks: Sequence[str] = ()) -> pd.DataFrame:
    """Task, what is asked, and the words: the prompts as the book prints them."""
    chosen = [PROMPTS[task] for task in tasks or PROMPTS]
    rows = [(one.task, one.template, ", ".join(one.words) or "any text") for one in chosen]
    return pd.DataFrame(rows, columns=["task", "prompt", "answers"])


YES, ENTAILS = ("no", "yes"), ("yes", "no")
add("cola", "Does this sentence read as correct English?\nSentence: {text}\nCorrect:", *YES)
add("sst2", "Is this review positive or negative?\nReview: {text}\nAnswer:", "negative", "positive")
TWO = "\nFirst: {text}\nSecond: {pair}\n"
add("mrpc", f"Do these two sentences say the same?{TWO}Same:", *YES)
add("rte", f"Does the second text follow from the first?{TWO}Follows:", *ENTAILS)
add(
    "qnli",
    "Does the sentence hold the answer to the question?\n"
    "Question: {text}\nSentence: {pair}\nHolds it:",
    *ENTAILS,
)
add("qqp", f"Do these two questions ask for the same?{TWO}Same:", *YES)
add(
    "mnli",
    "Given the premise, is the claim true, false, or maybe either?\n"
    "Premise: {text}\nClaim: {pair}\nThe claim is:",
    *("true", "maybe", "false"),
)
add(
    "trec",
    "Does this question ask for an abbreviation, description, thing, person, place or number?\n"
    "Question: {text}\nAsks for:",
    *("abbreviation", "description", "thing", "person", "place", "number"),
)
add("movie", PROMPTS["sst2"].template, "negative", "positive")
add("sms", "Is this message wanted or spam?\nMessage: {text}\nAnswer:", "wanted", "spam")
add("headline", "Write a headline for this article.\nArticle: {text}\nHeadline:")
