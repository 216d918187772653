"""Methods that match statistics of experts: Fisher information, layer outputs."""
