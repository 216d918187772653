"""Merge bandwidth and step time of this package and its peers, measured side by side."""
