"""Task vectors, coefficients, the merge problem, and the fit of coefficients to an objective."""
