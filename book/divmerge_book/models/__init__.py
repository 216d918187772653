"""Encoders and language models as base models, and their fine-tuning into experts."""
