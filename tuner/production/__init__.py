"""From the best trial to a model in use."""
