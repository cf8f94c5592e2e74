"""Generated pages: experiments/README.md from results, and blocks of README.md and docs from measurements."""
