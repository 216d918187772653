"""Methods that return no single model: they route, stack or fuse answers."""
