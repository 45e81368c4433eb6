"""transformers' own model definitions with our experts, attention and sampling behind their public seams."""
