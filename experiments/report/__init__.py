"""Pages written from files: experiments/README.md from results, README.md and docs from measurements."""
