"""Language models: a task is a prompt, an answer is text, and divergence sees all words.

from divmerge_book import evaluate, prepare_language
from divmerge_core import METHODS

experiment = prepare_language("embedded_lm", ["trec", "movie"], size="smoke")
problem = experiment.problem
merged = METHODS["divmerge"](problem, grouping="block")
evaluate(problem, merged, experiment.test)     # likelihood of the words; free-form: ROUGE-1
evaluate(problem, merged, experiment.written)  # generated text
"""

from divmerge_book.models.language.finetuning import language_expert, load_language_expert
from divmerge_book.models.language.models import Language, load_language
from divmerge_book.models.language.prompts import PROMPTS, Prompt
from divmerge_book.models.language.training import LanguageRecipe

__all__ = [
    "PROMPTS",
    "Language",
    "LanguageRecipe",
    "Prompt",
    "language_expert",
    "load_language",
    "load_language_expert",
]
