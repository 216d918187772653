"""Downloads by hash, labelled texts in four disjoint splits, tasks and suites, GLUE; code digests.

Imports the core alone; every other room may import it.
"""
