"""Methods that work on singular values of task vectors."""
