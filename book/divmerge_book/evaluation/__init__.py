"""From a suite's name to a Report: experiments, searches, metrics, statistics, the result cache."""
