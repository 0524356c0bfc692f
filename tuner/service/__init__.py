"""Run a study: the only room that sees both the search and the training."""
