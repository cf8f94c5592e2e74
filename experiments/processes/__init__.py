"""One run in several processes: joins or launches them, and lets them agree."""
