"""Studies of what one merged vector cannot do: each module is one question, `plans` runs them."""
