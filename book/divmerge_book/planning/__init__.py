"""What a fit or a fine-tuning needs: memory, seconds, and presets for a device."""
