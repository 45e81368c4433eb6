"""The budgeted expert cache: who is resident (pure) and how bytes move (thin)."""
