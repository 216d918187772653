"""Published experts: suites whose models and data come from the hub, or from folders laid out so.

from divmerge_book.user_models import check, load, merge_and_score, read
from divmerge_book.published import glue

path = glue.describe(folder, ["cola", "rte"])       # fetch, write rows and a description
bench = load(check(read(path)), device="cuda")      # all that a description goes through
found = merge_and_score(bench, ["divmerge/layer"], suite=glue.SUITE)
"""
