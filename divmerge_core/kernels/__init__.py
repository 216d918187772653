"""The two computations that every adaptive merge repeats at each step, one file each."""
