"""Methods that work in subspaces of the layers: essential, shared, interfering."""
