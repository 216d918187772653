"""Language models: a task is a prompt, an answer is text, the vocabulary is what divergence sees.

from divmerge_core.language import prepare_language
from divmerge_core import METHODS, evaluate

bench = prepare_language("embedded_lm", ["trec", "movie"], size="smoke")
merged = METHODS["divmerge"](bench.problem, grouping="block")
evaluate(bench.problem, merged, bench.test)        # by label likelihood; headlines by ROUGE-1
evaluate(bench.problem, merged, bench.generated)   # by what it writes
"""
