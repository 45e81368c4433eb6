"""What `expertd bench` runs: random models of real shapes, routes and foresight made to measure, timings in turn."""
