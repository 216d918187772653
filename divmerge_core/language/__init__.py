"""Language models: a task is a prompt, an answer is text, and divergence sees all words.

from divmerge_core import METHODS, evaluate
from divmerge_core.language import prepare_language

bench = prepare_language("embedded_lm", ["trec", "movie"], size="smoke")
merged = METHODS["divmerge"](bench.problem, grouping="block")
evaluate(bench.problem, merged, bench.test)     # by likelihood of the words; else by ROUGE-1
evaluate(bench.problem, merged, bench.written)  # by what it writes
"""

from divmerge_core.language.bench import LANGUAGE_SIZES, LanguageSize, prepare_language
from divmerge_core.language.comparison import LANGUAGE_METHODS, compare_language
from divmerge_core.language.experts import language_expert, load_language_expert
from divmerge_core.language.models import Language, load_language
from divmerge_core.language.prompts import PROMPTS, Prompt
from divmerge_core.language.training import LanguageRecipe

__all__ = [
    "LANGUAGE_METHODS",
    "LANGUAGE_SIZES",
    "PROMPTS",
    "Language",
    "LanguageRecipe",
    "LanguageSize",
    "Prompt",
    "compare_language",
    "language_expert",
    "load_language",
    "load_language_expert",
    "prepare_language",
]
