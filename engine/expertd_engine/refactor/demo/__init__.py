"""What the demo model was made with: its texts, its prompts and its recipe."""
