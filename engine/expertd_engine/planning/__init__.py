"""From measured bytes to a plan: what the engine allots inside the budget."""
