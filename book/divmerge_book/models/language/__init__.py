"""Language models: a task is a prompt, an answer is text, and divergence sees all words.

from divmerge_book import evaluate, prepare_language
from divmerge_core import METHODS

experiment = prepare_language("embedded_lm", ["trec", "movie"], size="smoke")
problem = experiment.problem
merged = METHODS["divmerge"](problem, grouping="block")
evaluate(problem, merged, experiment.test)     # likelihood of the words; free-form: ROUGE-1
evaluate(problem, merged, experiment.written)  # generated text
"""
