"""Methods for experts that arrive one at a time."""
