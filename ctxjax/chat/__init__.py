"""A conversation in a terminal, in two views at once: without the context and with it."""
