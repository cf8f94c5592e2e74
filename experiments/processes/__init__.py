"""One run in several processes: who takes part, how they start and how they end."""
