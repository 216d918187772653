"""Methods that search with a score on labelled validation rows."""
