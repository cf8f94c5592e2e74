"""One file per question; `experiments.study` says what such a file holds."""
