"""How a model is split and what it keeps in memory."""
